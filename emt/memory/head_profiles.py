"""The head profile of a memory: found, made if there is none, kept for its model and its store."""

from __future__ import annotations

import contextlib
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
from emt.profiles.cache import cache_profile
from emt.profiles.choice import PROFILE, shipped_profiles
from emt.profiles.examples import Example
from emt.profiles.ranking import HeadRanking, Ranked
from emt.routing.head_profile import HeadProfile
from memory_backends import MemoryBackend, Rows

_logger = logging.getLogger(__name__)
_MAKES_PROFILE = (
    "this model has no head profile: one is made, and kept for all its memories, which takes about "
    "as long as reading 6,000 tokens. To avoid it, make one beforehand with `emt profile`, or set "
    "mode to token and heads to all."
)

_WITHOUT_HEADS = (
    "no head profile can be made of this model, so this store, which keeps no rows (row_codec "
    "'text'), will always find passages by words alone."
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
        """Tell whether heads would be searched if there was a profile, and there is none."""
        return self._recalls(config) and self._modes.profiles.find(config, backend) is None

    def rank(
        self,
        examples: Sequence[Example] | None,
        *,
        name: str = "",
        source: str = "",
        on_tokens: Callable[[int, int], object] | None = None,
        **options: Any,
    ) -> Ranked:
        """Rank the model's heads by examples, or else by those that come with emt."""
        ranking = HeadRanking(self._model, self._tokenizer, self._read)
        if not name:
            model = alive(self._model.model, "rank heads")
            name = Path(str(model.config.name_or_path or model.config.model_type)).name
        if examples is None:
            return ranking.rank_built_in(name=name, on_tokens=on_tokens)
        return ranking.rank(examples, name=name, source=source, on_tokens=on_tokens, **options)

    def keep(self, profile: HeadProfile, config: MemoryConfig, backend: MemoryBackend) -> None:
        """Keep a profile in a memory's store."""
        profile.check(self._model.query_heads, self._model.layout)
        if not backend.keeps_rows:  # refused if it keeps the keys of other heads
            backend.index_heads(profile.key_value_heads(self._model.query_heads, backend.layout))
        if backend.keeps_rows or backend.catalog.path is not None:
            backend.set_setting(PROFILE, profile.to_json())
        else:  # to set it in a store would make the store, whose heads are not chosen yet
            backend.catalog.set_setting(PROFILE, profile.to_json())
        self._modes.profiles.look_again(config, backend)

    def keep_made(self, profile: HeadProfile, config: MemoryConfig, backend: MemoryBackend) -> None:
        """Keep a profile for all memories of the model, and in a memory's store."""
        if cache_profile(profile) is None or not backend.is_read_only:
            self.keep(profile, config, backend)
        self._modes.profiles.look_again(config, backend)

    def prepare(
        self,
        config: MemoryConfig,
        backend: MemoryBackend,
        on_tokens: Callable[[int, int], object] | None = None,
    ) -> None:
        """Before indexes are made: make a profile if one is lacking, and copy it into the store.

        The indexes are of its heads, wherever the store is opened. One that comes with emt is there
        already, and one that the settings name is the user's to carry.
        """
        if backend.is_read_only or not self._recalls(config):
            return
        if self._modes.profiles.find(config, backend) is None:
            made = self._made(on_tokens)
            if made is not None:
                self.keep_made(made, config, backend)
        profile = self._modes.profiles.find(config, backend)
        if profile is None or config.profile is not None or profile in shipped_profiles():
            return
        if backend.catalog.setting(PROFILE) != profile.to_json():
            self.keep(profile, config, backend)

    def before_first_write(
        self,
        config: MemoryConfig,
        backend: MemoryBackend,
        on_tokens: Callable[[int, int], object] | None = None,
    ) -> None:
        """Let a store that will keep no rows have a profile before it is made.

        It keeps the keys of the profile's heads alone, whichever the model has later.
        """
        if backend.keeps_rows or backend.catalog.path is not None or not self._recalls(config):
            return
        profile = self._modes.profiles.find(config, backend) or self._made(on_tokens)
        if profile is None:
            _logger.warning(_WITHOUT_HEADS)
        elif config.profile is None:
            if profile not in shipped_profiles():
                cache_profile(profile)
            self.keep(profile, config, backend)

    def _made(self, on_tokens: Callable[[int, int], object] | None) -> HeadProfile | None:
        """Make a profile of the model, if that is possible; keep it nowhere."""
        decoder = self._model.decoder()
        if decoder is None or decoder.training or self._tokenizer is None:
            return None

        def count(num_read: int, total: int) -> None:
            if not num_read:  # ranking begins, so nothing is missing
                _logger.warning(_MAKES_PROFILE)
            if on_tokens is not None:
                on_tokens(num_read, total)

        with contextlib.suppress(ConfigError, MemoryUseError):  # it goes without
            return self.rank(None, on_tokens=count).profile
        return None

    def _recalls(self, config: MemoryConfig) -> bool:
        """Tell whether a profile's heads find passages or read memories, if there is one."""
        if config.mode == "token":
            return config.heads == "profile"
        return "heads" in config.voices
