"""Which mode a forward is in: by the settings, a `recalling` block, or what its cache holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from transformers import PreTrainedTokenizerBase

from emt.config import MemoryConfig
from emt.errors import ConfigError, MemoryUseError
from emt.model.attached import AttachedModel
from emt.modes.passage.by_routing import ByRouting
from emt.modes.passage.locate import by_prompt, locate
from emt.modes.passage.mode import PassageMode
from emt.modes.passage.rows import PlacedRows
from emt.modes.passage.sources import Cached, Fixed
from emt.modes.passage.state import PassageState
from emt.modes.token.mode import TokenMode
from emt.passage import Passage, Recalled
from emt.profiles.choice import ProfileChoice
from emt.turn import Mode, Turn
from memory_backends import MemoryBackend


class Modes:
    """The modes of one memory's model.

    Args:
        model: the model.
        tokenizer: of the model, if known.

    Attributes:
        profiles: which head profile the model has.
        routing: finds the passages of prompts.
    """

    def __init__(self, model: AttachedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self._model = model
        self._reads_words = tokenizer is not None
        self.profiles = ProfileChoice(model)
        self.routing = ByRouting(model, tokenizer, self.profiles)
        self._token = TokenMode(model, self.profiles)
        self._passage = PassageMode(model, self.routing)
        self._cached = PassageMode(model, Cached())
        self._cached_and_token = PassageMode(model, Cached(), self._token)
        self._block: PassageMode | None = None

    def name(self, config: MemoryConfig, backend: MemoryBackend) -> Literal["token", "passage"]:
        """Return the mode of the settings; "auto" is passage mode if heads or words find passages.

        Raises:
            ConfigError: the settings name a head profile that cannot be used, or token mode over a
                store that keeps no rows.
        """
        name = self._name(config, backend)
        if name == "token" and not backend.keeps_rows:
            raise ConfigError(
                "mode 'token' reads single rows, and a store of row_codec 'text' keeps none. Use "
                "mode 'passage', which needs a tokenizer or a head profile, or index the documents "
                "with another row_codec."
            )
        return name

    def _name(self, config: MemoryConfig, backend: MemoryBackend) -> Literal["token", "passage"]:
        if config.mode != "auto":
            return config.mode
        by_words = self._reads_words and config.routing != "heads"
        if by_words or self.profiles.find(config, backend) is not None:
            return "passage"
        return "token"

    def of_settings(self, config: MemoryConfig, backend: MemoryBackend) -> Mode:
        """Return the mode of the settings."""
        return self._passage if self.name(config, backend) == "passage" else self._token

    def keep(self, config: MemoryConfig, backend: MemoryBackend) -> None:
        """Keep in a memory's store what its next process would have to compute anew."""
        if self.name(config, backend) == "passage":
            self.routing.keep(config, backend)

    def of_turn(self, turn: Turn) -> Mode | None:
        """Return the mode of a forward; None for the plain model."""
        if not turn.config.enabled:
            return None
        if self._block is not None:  # whatever the settings say
            return self._block
        if not any(turn.num_searchable):
            return None
        return self.of_settings(turn.config, turn.backend)

    def of_cache(self, mode: Mode | None, state: PassageState) -> Mode:
        """Return the mode of a forward that goes on with a cache filled with passages.

        Args:
            mode: of the forward if its cache were empty; None leaves single memories alone.
            state: the passages.
        """
        if isinstance(mode, PassageMode):
            return mode
        return self._cached_and_token if state.retrieves and mode is not None else self._cached

    @contextmanager
    def recalling(
        self,
        backend: MemoryBackend,
        passages: Sequence[Passage] | Sequence[Sequence[Passage]],
        *,
        at: int | Sequence[int],
        sinks: bool | None,
        retrieve: bool,
    ) -> Iterator[Fixed]:
        """Recall passages in the forwards of a `with` block; see `Memory.recalling`.

        Raises:
            As `Memory.recalling`.
        """
        if self._block is not None:
            raise MemoryUseError(
                "passages are being recalled already. Close that recalling() block first, or give "
                "all passages to one."
            )
        prompts, places = by_prompt(passages, at)
        placements = locate(backend, prompts, places, sinks=sinks)
        state = None
        if any(placement.ids for placement in placements):
            rows = PlacedRows.read(self._model, backend, placements)
            recalled = [[Recalled(passage) for passage in prompt] for prompt in prompts]
            state = PassageState(rows, recalled, retrieves=retrieve)
        source = Fixed(state)
        self._block = PassageMode(self._model, source, self._token if retrieve else None)
        try:
            yield source
        finally:
            self._block = None
