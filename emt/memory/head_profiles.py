"""The head profile of a memory: found, made from its own text, kept in its store."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from emt.config import MemoryConfig
from emt.errors import ConfigError, MemoryUseError
from emt.memory.modes import Modes
from emt.model.attached import AttachedModel
from emt.model.references import alive
from emt.profiles.choice import PROFILE
from emt.profiles.examples import Example
from emt.profiles.ranking import HeadRanking, Ranked
from emt.routing.head_profile import HeadProfile
from memory_backends import MemoryBackend, Rows

_logger = logging.getLogger(__name__)
_MAKES_PROFILE = (
    "this model has no head profile: one is made of the memory's own text and kept in its store, "
    "which takes about as long as reading 30,000 tokens. To avoid it, make one beforehand with "
    "`emt profile` and set profile to its file, or set mode to token."
)


class HeadProfiles:
    """Makes and keeps head profiles; `Memory` documents what its methods raise.

    Args:
        model: the model.
        tokenizer: of the model, if known.
        modes: of the memory, which find a profile.
        read: turns token ids into rows, as `Memory.read`.
    """

    def __init__(
        self,
        model: AttachedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        modes: Modes,
        read: Callable[[list[int]], Iterator[Rows]],
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._modes = modes
        self._read = read

    def is_lacking(self, config: MemoryConfig, backend: MemoryBackend) -> bool:
        """Tell whether heads would find passages if there was a profile."""
        by_heads = config.mode != "token" and config.routing != "words"
        return by_heads and self._modes.profiles.find(config, backend) is None

    def rank(
        self,
        backend: MemoryBackend,
        examples: Sequence[Example] | None,
        *,
        name: str = "",
        source: str = "",
        on_step: Callable[[str], object] | None = None,
        **options: Any,
    ) -> Ranked:
        """Rank the model's heads by examples, or else by the text of a memory's documents."""
        ranking = HeadRanking(self._model, self._tokenizer, self._read)
        if not name:
            model = alive(self._model.model, "rank heads")
            name = Path(str(model.config.name_or_path or model.config.model_type)).name
        if examples is None:
            return ranking.rank_stored_text(backend, name=name, on_step=on_step)
        return ranking.rank(examples, name=name, source=source, on_step=on_step, **options)

    def keep(self, profile: HeadProfile, config: MemoryConfig, backend: MemoryBackend) -> None:
        """Keep a profile in a memory's store."""
        profile.check(self._model.query_heads, self._model.layout)
        backend.set_setting(PROFILE, profile.to_json())
        self._modes.profiles.look_again(config, backend)

    def make_if_lacking(self, config: MemoryConfig, backend: MemoryBackend) -> None:
        """Make a profile from a memory's own text if one is lacking, and can be made and kept."""
        decoder = self._model.decoder()
        if decoder is None or decoder.training or self._tokenizer is None or backend.is_read_only:
            return
        if not self.is_lacking(config, backend):
            return
        steps = itertools.count()

        def log_once(step: str) -> None:
            if not next(steps):  # the text was found to be enough
                _logger.warning(_MAKES_PROFILE)

        with contextlib.suppress(ConfigError, MemoryUseError):  # a prompt says what is missing
            self.keep(self.rank(backend, None, on_step=log_once).profile, config, backend)
