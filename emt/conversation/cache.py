"""The cache of a chat between its turns, cut back to what the next prompt begins with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import Cache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from emt.model.chat import num_shared
from emt.modes.passage.state import forget_passages, state_in

_CUT = (DynamicLayer, DynamicSlidingWindowLayer)  # a recurrent state cannot be cut back


class ChatCache:
    """What is computed of a chat already; a prompt that goes on with it is not read from its start.

    Attributes:
        cache: None if nothing is computed.
        token_ids: what it holds.
    """

    def __init__(self) -> None:
        self.cache: Cache | None = None
        self.token_ids: list[int] = []

    def keep(self, cache: Any, token_ids: Sequence[int]) -> None:
        """Keep a cache that `generate` has filled with all of some tokens but the last."""
        self.clear()
        if isinstance(cache, Cache):
            self.cache, self.token_ids = cache, list(token_ids[:-1])

    def clear(self) -> None:
        """Let go of the cache."""
        self.cache, self.token_ids = None, []

    def cut_for(self, prompt: Sequence[int]) -> Cache | None:
        """Return the cache with what a prompt begins with, less than all of it; None for nothing.

        Templates may write the messages before the last anew, without what was thought, say. Then
        they are read again from there on, and so is what was computed behind recalled passages:
        the next message has passages of its own.
        """
        if self.cache is None:
            return None
        count = min(num_shared(prompt, self.token_ids), len(prompt) - 1)
        state = state_in(self.cache)
        if state is not None:
            count = min(count, int(state.rows.at.min()))
        if not self._cut_to(count):
            self.clear()
            return None
        forget_passages(self.cache)
        return self.cache

    def _cut_to(self, count: int) -> bool:
        """Keep the first tokens only; tell whether that is possible, and any is left."""
        num_removed = len(self.token_ids) - count
        if self.cache is None or not count:
            return False
        if num_removed:
            if any(type(layer) not in _CUT for layer in getattr(self.cache, "layers", [None])):
                return False
            try:
                self.cache.crop(-num_removed)
            except RuntimeError:  # a window has left tokens behind
                return False
        self.token_ids = self.token_ids[:count]
        return True
