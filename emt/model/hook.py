"""The seam to transformers: attention functions, mask functions, and a register of who listens.

Importing this registers two attention implementations. Each computes what the model's own
implementation would, unless the module that calls it is attached to a memory (`bind`) or is being
watched (`watching`):

* `extended_mind` stands in for `sdpa` and for anything faster (flash, flex), with sdpa's masks;
* `extended_mind_eager` stands in for `eager`, with eager's masks.

Families that compute attention inline have an adapter (`emt.model.adapters`) that calls `dispatch`.

The names avoid `sdpa`, `flash`, `flex_attention` and `/`: transformers looks for these substrings.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from emt.attention.alibi import Alibi
from emt.errors import UnsupportedModelError
from emt.model.forward import Forward

IMPLEMENTATION = "extended_mind"
EAGER_IMPLEMENTATION = "extended_mind_eager"

_CHUNK_BYTES = 64 * 2**20  # what one chunk of queries may take for its logits or its memories

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]
_uncompiled = cast(Callable[[Callable[..., Any]], Callable[..., Any]], torch.compiler.disable)


@dataclass(frozen=True)
class AttentionCall:
    """One call of a layer's attention, as transformers makes it.

    Attributes:
        module: the attention module.
        query: (B, H, Q, D), after norms and RoPE.
        key: (B, Hkv, S, D), KV heads not repeated.
        value: (B, Hkv, S, Dv).
        attention_mask: (B, 1, Q, S) bool or additive; None for causal (Q > 1) or all visible
            (Q = 1).
        options: keywords: `scaling`, `softcap`, `sliding_window`, `s_aux` and what else the family
            passes.
        own: the model's own attention function.
        alibi: linear biases, of families with an adapter; not part of `attention_mask`.
        position_embeddings: cos and sin, from adapters of families that rotate their keys.
        rotate: `rotate(query, key, cos, sin)`, where the family's file has no such function.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    attention_mask: Tensor | None
    options: dict[str, Any]
    own: AttentionFunction
    alibi: Alibi | None = None
    position_embeddings: Any = None
    rotate: Callable[..., Any] | None = None

    def compute(self) -> tuple[Tensor, Tensor | None]:
        """Return the model's own attention, bit for bit."""
        return self.own(
            self.module, self.query, self.key, self.value, self.attention_mask, **self.options
        )

    @property
    def is_inline(self) -> bool:
        """Whether an adapter made it, whose `own` attention has keys and biases of its own."""
        return self.alibi is not None or self.position_embeddings is not None

    @property
    def layer_idx(self) -> int:
        """The layer, as the module itself numbers it."""
        layer_idx = getattr(self.module, "layer_idx", None)
        if not isinstance(layer_idx, int):
            raise UnsupportedModelError(
                f"{type(self.module).__name__} must have an integer layer_idx; got {layer_idx!r}. "
                "Its layers cannot be told apart."
            )
        return layer_idx

    @property
    def scaling(self) -> float:
        """The factor on the layer's logits."""
        scaling = self.options.get("scaling")
        return float(self.query.shape[-1] ** -0.5 if scaling is None else scaling)

    @property
    def softcap(self) -> float | None:
        """The layer's soft cap on logits."""
        return self.options.get("softcap")

    @property
    def sinks(self) -> Tensor | None:
        """Logits (H,) that take part in the softmax and carry no value (GPT-OSS)."""
        return self.options.get("s_aux")

    @property
    def mask(self) -> Tensor | None:
        """The mask of the keys that are there; a cache of fixed size may mask more."""
        mask = self.attention_mask
        return None if mask is None else mask[..., : self.key.shape[2]]


def check_options(call: AttentionCall) -> None:
    """Refuse a call that does more than attend.

    Raises:
        UnsupportedModelError: naming what it does.
    """
    for option in ("position_bias", "cache"):
        if call.options.get(option) is not None:
            raise UnsupportedModelError(
                f"memories cannot be read in a call with '{option}' (layer {call.layer_idx}). "
                "Detach the memory, or generate without continuous batching."
            )


def chunk_length(call: AttentionCall, topk: int) -> int:
    """Return how many queries to attend with at once, each to `topk` memories and its context."""
    batch, num_heads, num_queries, dim = call.query.shape
    memory_size = topk * (dim + call.value.shape[-1])
    per_query = 4 * batch * num_heads * max(call.key.shape[2], memory_size)
    return max(min(_CHUNK_BYTES // per_query, num_queries), 1)


class Listener(Protocol):
    """What the forwards of an attached model are reported to."""

    def begin(self, forward: Forward) -> Forward:
        """Decide what holds for a forward of the decoder; return the call to make instead."""

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        """Compute a layer's attention: output (B, Q, H, Dv) and weights or None."""

    def end(self, output: Any) -> None:
        """Take notice of what the decoder returned; None if it failed."""


_listeners: WeakKeyDictionary[nn.Module, Listener] = WeakKeyDictionary()


def bind(decoder: nn.Module, modules: Iterable[nn.Module], listener: Listener) -> None:
    """Report a decoder's forwards, and its attention modules' calls, to a listener."""
    for module in (decoder, *modules):
        _listeners[module] = listener
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
    for module in (decoder, *modules):
        _listeners.pop(module, None)


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
    listener = _listeners.get(module)
    if listener is None or not keywords or _watched.get() is not None:
        return None
    given = Forward(cast(PreTrainedModel, module), args, keywords[0])
    forward = listener.begin(given)
    return None if forward is given else (forward.args, forward.options)


@_uncompiled
def _after_forward(module: nn.Module, args: tuple[Any, ...], *keywords_and_output: Any) -> None:
    listener = _listeners.get(module)
    if listener is not None and _watched.get() is None:
        listener.end(keywords_and_output[-1])


@dataclass
class Watched:
    """What `watching` saw of one forward: attention calls, and what RoPE each module was given."""

    compute: AttentionFunction = AttentionCall.compute
    calls: list[AttentionCall] = field(default_factory=list)
    position_embeddings: dict[nn.Module, Any] = field(default_factory=dict)


_watched: ContextVar[Watched | None] = ContextVar("emt_watched", default=None)


def is_heard(module: nn.Module) -> bool:
    """Tell whether `dispatch` does more for a module than to compute its own attention."""
    return module in _listeners or is_watched()


def is_watched() -> bool:
    """Tell whether this thread runs a model only to see its attention calls: nobody listens."""
    return _watched.get() is not None


@contextlib.contextmanager
def watching(
    model: nn.Module, compute: AttentionFunction = AttentionCall.compute
) -> Iterator[Watched]:
    """Collect the attention calls this thread makes; the model computes as if not attached.

    Args:
        model: what will run.
        compute: takes a call and stands in for its attention.
    """
    seen = Watched(compute)
    hooks = [
        module.register_forward_pre_hook(_keep_embeddings(seen), with_kwargs=True)
        for module in model.modules()
        if "position_embeddings" in _signature(module).parameters
    ]
    token = _watched.set(seen)
    try:
        yield seen
    finally:
        _watched.reset(token)
        for hook in hooks:
            hook.remove()


def _signature(module: nn.Module) -> inspect.Signature:
    """Return what a module's forward takes; looked up once, for it is asked at every forward."""
    if "forward" in vars(module):  # one of its own, such as accelerate's
        return inspect.signature(module.forward)
    return _signature_of(type(module).forward)


@functools.cache
def _signature_of(forward: Callable[..., Any]) -> inspect.Signature:
    signature = inspect.signature(forward)
    return signature.replace(parameters=list(signature.parameters.values())[1:])  # without self


def _keep_embeddings(seen: Watched) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _watched.get() is not seen:  # another thread runs the same model
            return
        given = _signature(module).bind_partial(*args, **kwargs).arguments
        seen.position_embeddings[module] = given.get("position_embeddings")

    return hook


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
    seen = _watched.get()
    if seen is not None:
        seen.calls.append(call)
        if call.position_embeddings is not None:
            seen.position_embeddings[call.module] = call.position_embeddings
        return seen.compute(call)
    listener = _listeners.get(call.module)
    if listener is None:  # a copy of an attached model, or a model built from the same config
        return call.compute()
    return listener.attend(call)


@_uncompiled
def _over_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    return dispatch(
        AttentionCall(module, query, key, value, attention_mask, options, sdpa_attention_forward)
    )


@_uncompiled
def _over_eager(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    return dispatch(
        AttentionCall(module, query, key, value, attention_mask, options, own_eager(module))
    )


AttentionInterface.register(IMPLEMENTATION, _over_sdpa)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
AttentionInterface.register(EAGER_IMPLEMENTATION, _over_eager)
AttentionMaskInterface.register(EAGER_IMPLEMENTATION, eager_mask)
