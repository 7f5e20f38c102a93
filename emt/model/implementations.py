"""Which attention function a model has chosen, and the stand-in that is selected for it.

transformers calls what a config names. While a model is attached, its configs name stand-ins, which
compute what was chosen and send each call to the memory:

* `extended_mind` for `sdpa`, and for what computes the same faster (flash, flex, kernels of a hub);
* `extended_mind_eager` for `eager`;
* `extended_mind_own_0` and so on for each function that the user registered.

What is chosen may change afterwards, by `set_attn_implementation` or in a config: the next forward
follows.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, cast
from weakref import WeakSet, WeakValueDictionary

import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.eager_paged import eager_paged_attention_forward
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from emt.errors import UnsupportedModelError
from emt.model.attention_call import AttentionCall
from emt.model.hook import EAGER_IMPLEMENTATION, IMPLEMENTATION, register

_BUILT_IN = (
    eager_paged_attention_forward,
    flash_attention_forward,
    flex_attention_forward,
    sdpa_attention_forward,
)
_functions: Mapping[str, Any] = cast(Any, AttentionInterface)()
_masks: Mapping[str, Any] = cast(Any, AttentionMaskInterface)()
_own_names: list[str] = []  # `extended_mind_own_<number>` stands in for the one of that number


def is_users_own(chosen: str | None) -> bool:
    """Tell whether an implementation is a function that the user registered."""
    if chosen is None or chosen not in _functions or "/" in chosen:  # kernels of a hub have a path
        return False
    function = _functions[chosen]
    while isinstance(function, functools.partial):
        function = function.func
    return function not in _BUILT_IN


def _stand_in_for(chosen: str | None) -> str:
    """Return the name of what is selected instead of an implementation."""
    if chosen is None or not is_users_own(chosen):
        return EAGER_IMPLEMENTATION if chosen == "eager" else IMPLEMENTATION
    if chosen not in _own_names:
        _own_names.append(chosen)
    name = f"{IMPLEMENTATION}_own_{_own_names.index(chosen)}"
    # Looked up at each call, for another function may be registered under the same name.
    mask = (lambda *args, **options: _masks[chosen](*args, **options)) if chosen in _masks else None
    register(name, lambda _: _functions[chosen], mask, is_users_own=True)
    return name


def _chosen_by(selected: str | None) -> str | None:
    """Return what a selected implementation stands in for: itself, if it is none of ours."""
    if selected == IMPLEMENTATION:
        return "sdpa"
    if selected == EAGER_IMPLEMENTATION:
        return "eager"
    _, is_ours, number = (selected or "").partition(f"{IMPLEMENTATION}_own_")
    return _own_names[int(number)] if is_ours else selected


class _Choice:
    """What a config has chosen, while a stand-in is selected in it.

    Attributes:
        config: the config.
        chosen: the implementation.
        users: the models that share the config.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        self.config = config
        self.users: WeakSet[Implementations] = WeakSet()
        self.take_over()

    def take_over(self) -> None:
        """Select the stand-in for what the config names."""
        self.chosen = _chosen_by(self.config._attn_implementation)
        self._stand_in = _stand_in_for(self.chosen)
        self.config._attn_implementation = self._stand_in

    @property
    def is_in_force(self) -> bool:
        """Whether nobody has chosen another implementation since."""
        return bool(self.config._attn_implementation == self._stand_in)


_choices: WeakValueDictionary[int, _Choice] = WeakValueDictionary()  # by the id of the config


class Implementations:
    """The implementations that a model has chosen, while stand-ins are selected for them.

    Args:
        decoder: the model without its language-model head; the configs of its modules name
            stand-ins from now on.
    """

    def __init__(self, decoder: PreTrainedModel) -> None:
        of_modules = (getattr(module, "config", None) for module in decoder.modules())
        configs = {id(config): config for config in of_modules if config is not None}
        self._choices: list[_Choice] = []
        self._call: AttentionCall | None = None
        for key, config in configs.items():
            if isinstance(config, PreTrainedConfig):
                choice = _choices.get(key) or _Choice(config)
                _choices[key] = choice
                choice.users.add(self)
                self._choices.append(choice)

    def prove(self, call: AttentionCall) -> None:
        """Prove that functions of the user's own can be given memories.

        Args:
            call: one of the model's; later choices are tried with it, too.

        Raises:
            UnsupportedModelError: naming the function.
        """
        self._call = call
        for chosen in {choice.chosen for choice in self._choices}:
            _prove(chosen, call)

    def follow(self) -> None:
        """Select stand-ins for what was chosen since, by `set_attn_implementation` or in a config.

        Raises:
            UnsupportedModelError: as for `prove`; what was chosen stays selected.
        """
        for choice in self._choices:
            if not choice.is_in_force:
                if self._call is not None:
                    _prove(_chosen_by(choice.config._attn_implementation), self._call)
                choice.take_over()

    def restore(self) -> None:
        """Select again what the model has chosen, where no other model shares its config."""
        for choice in self._choices:
            choice.users.discard(self)
            if not choice.users and choice.is_in_force:
                choice.config._attn_implementation = choice.chosen
        self._choices = []


@torch.no_grad()
def _prove(chosen: str | None, call: AttentionCall) -> None:
    """Prove that a function of the user's own can be given memories: more keys than tokens.

    A mask hides them, or shows them to some heads and queries.

    Raises:
        UnsupportedModelError: they change what it computes though no query sees them, or nothing
            though all do.
    """
    if not is_users_own(chosen):
        return
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(*part.shape[:2], 5, part.shape[3], generator=generator).to(part)
        for part in (call.query, call.key, call.value)
    )
    least = torch.finfo(query.dtype).min
    local = torch.full((2, 2), least).triu(1).to(query)
    shown = torch.zeros(1, query.shape[1], 2, 5).to(query)
    shown[..., 3:] = local
    hidden = shown.clone()
    hidden[..., :3] = least

    def output(mask: Tensor, first: int) -> Tensor:
        keys, values = key[:, :, first:], value[:, :, first:]
        function = _functions[str(chosen)]
        result = function(call.module, query[:, :, 3:], keys, values, mask, **call.options)
        return cast(Tensor, result[0]).float()

    try:
        alone = output(local[None, None], 3)
        is_hidden = torch.allclose(output(hidden, 0), alone, rtol=1e-2, atol=1e-2)
        is_shown = not torch.allclose(output(shown, 0), alone, rtol=1e-2, atol=1e-2)
    except Exception as error:  # the function is the user's and may raise anything
        raise UnsupportedModelError(_cannot_be_given(chosen, f"raises {error!r:.200}")) from error
    if not is_hidden or not is_shown:
        does = "sees keys that the mask hides" if not is_hidden else "leaves out further keys"
        raise UnsupportedModelError(_cannot_be_given(chosen, does))


def _cannot_be_given(chosen: str | None, does: str) -> str:
    return (
        f"the attention function '{chosen}' cannot be given memories: called with 2 queries, 5 "
        "keys and a mask of shape (1, num_attention_heads, 2, 5) that is added to logits, it "
        f"{does}. Choose another one with model.set_attn_implementation(), or teach it that."
    )
