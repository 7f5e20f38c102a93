"""What a cache remembers of the passages that its keys were computed with.

Passages belong to keys, not to a setting: copies of a cache and beams have them, and a mode that
changes meanwhile breaks nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from emt.model.forward import Forward
from emt.modes.passage.rows import PlacedRows
from emt.passage import Recalled

_MARK = "_emt_passages"  # the attribute of a cache


@dataclass(frozen=True, eq=False)
class PassageState:
    """The passages of some prompts, placed in them.

    Attributes:
        rows: their rows.
        passages: of each prompt, in the order they are put.
        prompt_end: tokens of a prompt, padding counted; those after it were generated. 0 if nobody
            has to know.
        retrieves: whether queries retrieve single memories, too.
        tokens: (B, n) int64, the tokens that a cache holds, padding counted; None if not known.
        origin: the same object in all states that may go on with each other's caches.
    """

    rows: PlacedRows
    passages: Sequence[Sequence[Recalled]]
    prompt_end: int = 0
    retrieves: bool = False
    tokens: Tensor | None = None
    origin: object = field(default_factory=object)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return the same state: nothing in it changes, and copies of a cache share the rows."""
        return self

    def all_tokens(self, forward: Forward) -> Tensor | None:
        """Return the tokens of a forward and of its cache, (B, n) int64, if all are known."""
        token_ids, num_past = forward.input_ids, forward.tokens.num_past
        if token_ids is None or not num_past:
            return token_ids
        past = self.tokens
        if past is None or past.shape[1] < num_past or len(past) != len(token_ids):
            return None
        return torch.cat([past[:, :num_past].to(token_ids.device), token_ids], dim=1)

    def keep(self, output: Any, tokens: Tensor | None) -> None:
        """Mark the caches in what a decoder returned.

        Args:
            output: a model output, a tuple, or None.
            tokens: (B, n) int64, what the caches hold, if known.
        """
        parts = output.values() if isinstance(output, dict) else output
        for cache in parts if isinstance(output, dict | tuple) else ():
            if isinstance(cache, Cache):
                setattr(cache, _MARK, replace(self, tokens=tokens))


def state_of(forward: Forward) -> PassageState | None:
    """Return what the keys in a forward's cache were computed with.

    A cache of fixed size that is used again is empty, and forgets what it held before.
    """
    cache = forward.cache
    state = state_in(cache)
    if state is not None and not int(cache.get_seq_length()):
        delattr(cache, _MARK)
        return None
    return state


def state_in(cache: Any) -> PassageState | None:
    """Return what a cache's keys were computed with; None for no passages."""
    state: PassageState | None = getattr(cache, _MARK, None)
    return state


def forget_passages(cache: Any) -> None:
    """Let a cache that was cut back to before its passages be one without them."""
    if state_in(cache) is not None:
        delattr(cache, _MARK)
