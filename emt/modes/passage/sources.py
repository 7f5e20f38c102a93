"""Where the passages of a forward come from: the caller, its cache, or the prompt itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from emt.calls import GenerateOptions
from emt.config import MemoryConfig
from emt.model.forward import Forward
from emt.modes.passage.state import PassageState, state_of
from emt.turn import Turn
from memory_backends import MemoryBackend


class PassageSource:
    """Says which passages a forward has; `ByRouting` (by_routing.py) finds them by the prompt."""

    def check(self, turn: Turn, options: GenerateOptions) -> None:
        """Refuse a `generate()` call for whose prompts no passages can be found.

        Raises:
            ConfigError: naming the option.
        """

    def passages_of(self, turn: Turn, forward: Forward) -> PassageState | None:
        """Return the passages of a forward's prompts; None for the model as it is."""
        raise NotImplementedError

    def heads_to_index(
        self, config: MemoryConfig, backend: MemoryBackend
    ) -> Mapping[int, Sequence[int]] | None:
        """Return the KV heads that are searched, by layer; None for all of the reading layers."""
        return None


class Fixed(PassageSource):
    """The passages of a `recalling` block, whatever is asked.

    Attributes:
        state: the passages and their rows; None for those that a cache has already.
    """

    def __init__(self, state: PassageState | None) -> None:
        self.state = state

    def passages_of(self, turn: Turn, forward: Forward) -> PassageState | None:
        """Return the block's passages."""
        return state_of(forward) if self.state is None else self.state


class Cached(PassageSource):
    """The passages that a cache was filled with, whatever the mode is by now."""

    def passages_of(self, turn: Turn, forward: Forward) -> PassageState | None:
        """Return the cache's passages."""
        return state_of(forward)
