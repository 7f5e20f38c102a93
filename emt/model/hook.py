"""The seam to transformers: attention functions, mask functions, and a register of who listens.

Importing this registers two attention implementations, which compute what the model's own would
unless their module is attached to a memory (`bind`) or is being watched (`emt.model.watch`):

* `extended_mind` stands in for `sdpa` and for anything faster (flash, flex), with sdpa's masks;
* `extended_mind_eager` stands in for `eager`, with eager's masks.

`emt.model.implementations` registers one more for each function of a user's own. The names avoid
`sdpa`, `flash`, `flex_attention` and `/`: transformers looks for these substrings.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any, Protocol, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from emt.errors import UnsupportedModelError
from emt.model.attention_call import AttentionCall, AttentionFunction
from emt.model.forward import Forward
from emt.model.watch import watcher

IMPLEMENTATION = "extended_mind"
EAGER_IMPLEMENTATION = "extended_mind_eager"

_uncompiled = cast(Callable[[Callable[..., Any]], Callable[..., Any]], torch.compiler.disable)


class Listener(Protocol):
    """What the forwards of an attached model are reported to."""

    def begin(self, forward: Forward) -> Forward:
        """Decide what holds for a forward of the decoder; return the call to make instead."""

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        """Compute a layer's attention: output (B, Q, H, Dv) and weights or None."""

    def end(self, output: Any) -> None:
        """Take notice of what the decoder returned; None if it failed."""


_listeners: WeakKeyDictionary[nn.Module, Listener] = WeakKeyDictionary()
_before: WeakKeyDictionary[nn.Module, Callable[[], None]] = WeakKeyDictionary()


def bind(
    decoder: nn.Module,
    modules: Iterable[nn.Module],
    listener: Listener,
    before: Callable[[], None] | None = None,
) -> None:
    """Report a decoder's forwards, and its attention modules' calls, to a listener.

    `before` is called before each forward, watched ones too.
    """
    for module in (decoder, *modules):
        _listeners[module] = listener
    if before is not None:
        _before[decoder] = before
    if _hooks_of(decoder):  # a copy of a decoder has them already
        return
    decoder.register_forward_pre_hook(_before_forward, with_kwargs=True)
    decoder.register_forward_hook(_after_forward, with_kwargs=True, always_call=True)
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # what was compiled before does not call hooks


def is_bound(module: nn.Module) -> bool:
    """Tell whether an attention module has a listener."""
    return module in _listeners


def unbind(decoder: nn.Module, modules: Iterable[nn.Module]) -> None:
    """Undo `bind`."""
    for hooks, key in _hooks_of(decoder):
        del hooks[key]
        for flags in (
            decoder._forward_pre_hooks_with_kwargs,
            decoder._forward_hooks_with_kwargs,
            decoder._forward_hooks_always_called,
        ):
            flags.pop(key, None)
    for module in (decoder, *modules):
        _listeners.pop(module, None)
    _before.pop(decoder, None)


def _hooks_of(decoder: nn.Module) -> list[tuple[dict[int, Any], int]]:
    """Return where a module keeps our hooks: torch's own handles do not survive a deep copy."""
    ours = (_before_forward, _after_forward)
    return [
        (hooks, key)
        for hooks in (decoder._forward_pre_hooks, decoder._forward_hooks)
        for key, hook in list(hooks.items())
        if hook in ours
    ]


# Functions of the module, not methods: a copied or pickled decoder keeps them, and has no listener.
# Torch may call a hook that is being put in or taken out without keywords: the forward of another
# thread, which has begun without us.


@_uncompiled
def _before_forward(module: nn.Module, args: tuple[Any, ...], *keywords: Any) -> Any:
    listener, before = _listeners.get(module), _before.get(module)
    if before is not None:
        before()
    if listener is None or not keywords or watcher() is not None:
        return None
    given = Forward(cast(PreTrainedModel, module), args, keywords[0])
    forward = listener.begin(given)
    return None if forward is given else (forward.args, forward.options)


@_uncompiled
def _after_forward(module: nn.Module, args: tuple[Any, ...], *keywords_and_output: Any) -> None:
    listener = _listeners.get(module)
    if listener is not None and watcher() is None:
        listener.end(keywords_and_output[-1])


def is_heard(module: nn.Module) -> bool:
    """Tell whether `dispatch` does more for a module than to compute its own attention."""
    return module in _listeners or watcher() is not None


def own_eager(module: nn.Module) -> AttentionFunction:
    """Return the eager attention function of the file that defines a module.

    Raises:
        UnsupportedModelError: the file has none.
    """
    eager: AttentionFunction | None = vars(sys.modules[type(module).__module__]).get(
        "eager_attention_forward"
    )
    if eager is None:
        raise UnsupportedModelError(
            f"expected an eager_attention_forward beside {type(module).__name__}; found none. "
            'Load the model with attn_implementation="sdpa".'
        )
    return eager


def dispatch(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """Dispatch a call: to the active watcher, else to the module's listener, else to the model."""
    seen = watcher()
    if seen is not None:
        seen.calls.append(call)
        if call.position_embeddings is not None:
            seen.position_embeddings[call.module] = call.position_embeddings
        return seen.compute(call)
    listener = _listeners.get(call.module)
    if listener is None:  # a copy of an attached model, or a model built from the same config
        return call.compute()
    return listener.attend(call)


def register(
    name: str,
    own: Callable[[nn.Module], AttentionFunction],
    mask: Callable[..., Any] | None,
    *,
    is_users_own: bool = False,
) -> None:
    """Register an attention implementation that dispatches its calls.

    Args:
        name: of the implementation.
        own: gives a module the function that it stands in for.
        mask: makes the masks; None for none at all, as transformers does it without a function.
        is_users_own: whether it stands in for a function that the user registered.
    """

    @_uncompiled
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        call = AttentionCall(
            module,
            query,
            key,
            value,
            attention_mask,
            options,
            own(module),
            is_users_own=is_users_own,
        )
        return dispatch(call)

    AttentionInterface.register(name, attention)
    if mask is not None:
        AttentionMaskInterface.register(name, mask)


register(IMPLEMENTATION, lambda _: sdpa_attention_forward, sdpa_mask)
register(EAGER_IMPLEMENTATION, own_eager, eager_mask)
