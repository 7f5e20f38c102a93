"""One call of a decoder's forward: its arguments, and where in its prompt each token stands."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from emt.errors import ConfigError, UnsupportedModelError


def signature_of(module: nn.Module) -> inspect.Signature:
    """Return what a module's forward takes; looked up once, for every forward asks."""
    if "forward" in vars(module):  # one of its own, such as accelerate's
        return inspect.signature(module.forward)
    return _signature_of(type(module).forward)


@functools.cache
def _signature_of(forward: Callable[..., Any]) -> inspect.Signature:
    signature = inspect.signature(forward)
    return signature.replace(parameters=list(signature.parameters.values())[1:])  # without self


@dataclass(frozen=True)
class Forward:
    """One call of a decoder, the model without its language-model head, before it runs."""

    decoder: PreTrainedModel
    args: tuple[Any, ...]
    options: dict[str, Any]

    @cached_property
    def signature(self) -> inspect.Signature:
        """What the decoder's forward takes."""
        return signature_of(self.decoder)

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """All arguments by name."""
        bound = self.signature.bind_partial(*self.args, **self.options).arguments
        return {**bound, **self.options}

    @property
    def cache(self) -> Any:
        """The cache that holds the tokens before, or None."""
        if "past_key_values" in self.options or not self.args:
            return self.options.get("past_key_values")
        return self.arguments.get("past_key_values")

    @property
    def input_ids(self) -> Tensor | None:
        """The new tokens, (B, Q) int64; None if embeddings were given instead."""
        token_ids = self.arguments.get("input_ids")
        return token_ids if isinstance(token_ids, Tensor) else None

    @property
    def num_new(self) -> int:
        """Tokens that each prompt gets, padding counted."""
        token_ids = self.arguments.get("input_ids")
        tokens = self.arguments["inputs_embeds"] if token_ids is None else token_ids
        return int(tokens.shape[1])

    @cached_property
    def tokens(self) -> NewTokens:
        """Where the new tokens stand; raises what `NewTokens.of` does."""
        return NewTokens.of(self)

    @property
    def takes_positions(self) -> bool:
        """Whether the decoder can be told where its tokens stand."""
        return "position_ids" in self.signature.parameters

    def replacing(self, **arguments: Any) -> Self:
        """Return the same call with some arguments replaced."""
        names, args, options = list(self.signature.parameters), list(self.args), dict(self.options)
        for name, value in arguments.items():
            if name in names[: len(args)]:
                args[names.index(name)] = value
            else:
                options[name] = value
        return replace(self, args=tuple(args), options=options)


@dataclass(frozen=True)
class NewTokens:
    """The tokens that one forward adds to B prompts.

    Attributes:
        batch: B.
        index: (B or 1, Q) int64, each token's place in its prompt, padding not counted.
        num_tokens: tokens of the cache and of this forward, padding counted.
        padding: (B, num_tokens), 0 where there is a token of padding; None if there is none, or if
            only `index` tells.
        is_unpadded: whether it is certain that no prompt is padded.
    """

    batch: int
    index: Tensor
    num_tokens: int
    padding: Tensor | None
    is_unpadded: bool

    @classmethod
    def of(cls, forward: Forward) -> Self:
        """Read the arguments of a forward.

        Raises:
            ConfigError: positions that do not count the tokens from 0.
            UnsupportedModelError: it cannot be told which tokens are padding, or a token has
                several positions.
        """
        arguments, cache = forward.arguments, forward.cache
        tokens = arguments.get("input_ids")
        tokens = arguments["inputs_embeds"] if tokens is None else tokens
        batch, num_new = tokens.shape[:2]
        mask, positions = arguments.get("attention_mask"), arguments.get("position_ids")
        num_past = 0 if cache is None else int(cache.get_seq_length())
        if positions is not None and positions.ndim != 2:
            raise UnsupportedModelError(
                "passages need one position for each token; got position_ids of shape "
                f"{tuple(positions.shape)}. Models with several cannot recall passages."
            )
        padding = _padding(mask, num_past + num_new, positions, forward.takes_positions)
        if padding is not None:
            index = (padding.long().cumsum(-1) - 1).clamp(min=0)[:, -num_new:]
        elif mask is None or positions is None:
            index = torch.arange(num_past, num_past + num_new, device=tokens.device)[None]
        else:  # a mask that `generate` has made ready
            index = positions
        if positions is not None and not num_past:
            _check_positions(positions, index, padding)
        return cls(batch, index, num_past + num_new, padding, mask is None)

    @property
    def num_new(self) -> int:
        """Tokens that each prompt gets."""
        return self.index.shape[1]

    @property
    def num_past(self) -> int:
        """Tokens of the cache, padding counted."""
        return self.num_tokens - self.num_new


def _padding(
    mask: Any, num_tokens: int, positions: Tensor | None, takes_positions: bool
) -> Tensor | None:
    """Return which tokens are not padding, (B, num_tokens), where the mask says it."""
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return mask[:, :num_tokens]
    if isinstance(mask, Tensor) and mask.ndim == 4 and not takes_positions:
        # A model that is told no positions has no windows either: the last query sees all tokens.
        visible = mask[:, 0, -1, :num_tokens]
        if visible.dtype == torch.bool:
            return visible
        return visible > torch.finfo(visible.dtype).min / 2
    if mask is not None and positions is None:
        raise UnsupportedModelError(
            "passages need to know which tokens are padding: expected an attention_mask of two "
            f"dimensions, or position_ids; got a {type(mask).__name__} of another kind. Pass "
            "attention_mask as the tokenizer gives it."
        )
    return None


def _check_positions(positions: Tensor, index: Tensor, padding: Tensor | None) -> None:
    is_token: Any = True if padding is None else padding[:, -index.shape[1] :] != 0
    if bool(((positions != index) & is_token).any()):
        raise ConfigError(
            "position_ids must count the tokens of each prompt from 0 when passages are recalled, "
            "which are given their place by it. Leave position_ids out."
        )
