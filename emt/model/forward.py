"""What the arguments of a decoder's forward say of its tokens: where each stands in its prompt."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from emt.errors import ConfigError, UnsupportedModelError


@dataclass(frozen=True)
class NewTokens:
    """The tokens that one forward adds to B prompts.

    Attributes:
        batch: B.
        index: (B or 1, Q) int64, each token's place in its prompt, padding not counted.
        num_tokens: tokens of the cache and of this forward, padding counted.
        padding: (B, num_tokens), 0 where there is a token of padding; None if there is none, or
            only `index` tells.
        is_bare: no prompt is padded, for sure.
        cache: what holds the tokens before, or None.
        has_mask: whether the forward was given an attention mask.
    """

    batch: int
    index: Tensor
    num_tokens: int
    padding: Tensor | None
    is_bare: bool
    cache: Any
    has_mask: bool

    @classmethod
    def of(
        cls, signature: inspect.Signature, args: tuple[Any, ...], options: dict[str, Any]
    ) -> NewTokens:
        """Read the arguments of a forward.

        Raises:
            ConfigError: positions that do not count the tokens from 0.
            UnsupportedModelError: it cannot be told which tokens are padding, or a token has
                several positions.
        """
        given = {**signature.bind_partial(*args, **options).arguments, **options}
        tokens = given.get("input_ids")
        tokens = given["inputs_embeds"] if tokens is None else tokens
        batch, num_queries = tokens.shape[:2]
        cache, mask = given.get("past_key_values"), given.get("attention_mask")
        past = 0 if cache is None else int(cache.get_seq_length())
        positions = given.get("position_ids")
        if positions is not None and positions.ndim != 2:
            raise UnsupportedModelError(
                "recall needs one position for each token; got position_ids of shape "
                f"{tuple(positions.shape)}. Models with several cannot recall passages."
            )
        has_positions = "position_ids" in signature.parameters
        padding = _padding(mask, past + num_queries, positions, has_positions)
        if padding is not None:
            index = (padding.long().cumsum(-1) - 1).clamp(min=0)[:, -num_queries:]
        elif mask is None or positions is None:
            index = torch.arange(past, past + num_queries, device=tokens.device)[None]
        else:  # a mask that `generate` has made ready
            index = positions
        if positions is not None and not past:
            _check_positions(positions, index, padding)
        return cls(batch, index, past + num_queries, padding, mask is None, cache, mask is not None)

    @property
    def num_new(self) -> int:
        """How many tokens each prompt gets."""
        return self.index.shape[1]


def _padding(
    mask: Any, num_tokens: int, positions: Tensor | None, has_positions: bool
) -> Tensor | None:
    """Return which tokens are not padding, (B, num_tokens), where the mask says it."""
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return mask[:, :num_tokens]
    if isinstance(mask, Tensor) and mask.ndim == 4 and not has_positions:
        # A model that is told no positions has no windows either: the last query sees all tokens.
        seen = mask[:, 0, -1, :num_tokens]
        return seen if seen.dtype == torch.bool else seen > torch.finfo(seen.dtype).min / 2
    if mask is not None and positions is None:
        raise UnsupportedModelError(
            "recall needs to know which tokens are padding: expected an attention_mask of two "
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


def with_arguments(
    signature: inspect.Signature,
    args: tuple[Any, ...],
    options: dict[str, Any],
    put: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call with some of them replaced."""
    names, changed = list(signature.parameters), list(args)
    options = dict(options)
    for name, value in put.items():
        if name in names[: len(args)]:
            changed[names.index(name)] = value
        else:
            options[name] = value
    return tuple(changed), options
