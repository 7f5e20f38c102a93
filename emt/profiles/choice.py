"""Which head profile a memory is routed with.

The settings' comes first, then the one that its store keeps. Else it is one of the model, which the
user's cache has or emt ships: found by a sketch of the weights, so that the same model in another
dtype, quantisation or file format has the same heads.
"""

from __future__ import annotations

import functools
import json
import logging
from importlib import resources
from typing import Any, NamedTuple

from emt.config import MemoryConfig
from emt.errors import ConfigError
from emt.model.attached import AttachedModel
from emt.profiles.cache import cached_profiles
from emt.routing.head_profile import VERSION, HeadProfile
from memory_backends import MemoryBackend
from memory_backends.store.sketch import Sketch

PROFILE = "head_profile"  # a store's setting

# Weights in 3 bits have a correlation of 0.97 with what they were, and those of another model of
# the same shape none. A fine-tuned model passes, and has its base's retrieval heads (arXiv
# 2404.15574, section 3); one that was trained into something else does not.
_SAME_MODEL = 0.9

_logger = logging.getLogger(__name__)
_OF_OLDER_VERSION = (
    "the head profile that the memory keeps was made by an older version of emt, and is not used: "
    "save() or `emt profile` replaces it."
)


class _Choice(NamedTuple):
    backend: MemoryBackend
    path: str | None
    stored: Any
    profile: HeadProfile | None


class ProfileChoice:
    """The head profile of one attached model, chosen once for each backend and file."""

    def __init__(self, model: AttachedModel) -> None:
        self._model = model
        self._last: _Choice | None = None

    def find(self, config: MemoryConfig, backend: MemoryBackend) -> HeadProfile | None:
        """Return the head profile of the model, or None if there is none.

        Raises:
            ConfigError: the file of the profile has none, or it is of a model of another shape.
        """
        last = self._last
        if last is None or last.backend is not backend or last.path != config.profile:
            self._last = last = self._choose(config, backend)
        return last.profile

    def required(self, config: MemoryConfig, backend: MemoryBackend) -> HeadProfile:
        """Return the head profile of the model.

        Raises:
            ConfigError: there is none, or as `find`.
        """
        profile = self.find(config, backend)
        if profile is None:
            raise ConfigError(
                "routing by heads needs a head profile of this model, and there is none. Make one "
                "with memory.make_profile() or `emt profile --model MODEL`, or set routing to "
                "'both', which goes by words alone until there is one."
            )
        return profile

    def look_again(self, config: MemoryConfig, backend: MemoryBackend) -> None:
        """Choose again what was chosen: the store, or the user's cache, may have another now."""
        if self._last is not None:
            self._last = self._choose(config, backend)

    def _choose(self, config: MemoryConfig, backend: MemoryBackend) -> _Choice:
        stored, last = backend.catalog.setting(PROFILE), self._last
        if (
            last is not None
            and last.profile is not None
            and last[:3] == (backend, config.profile, stored)
        ):
            return last  # the same object: what was made for it stays
        if config.profile is not None:
            profile = HeadProfile.read(config.profile)
        elif stored is not None and not _is_older(stored):
            profile = HeadProfile.from_json(stored)
        else:
            return _Choice(backend, config.profile, stored, self._known())
        profile.check(self._model.query_heads, self._model.layout)
        return _Choice(backend, config.profile, stored, profile)

    def _known(self) -> HeadProfile | None:
        """Return the best profile of the user's cache or of emt that the model can use."""
        for profile in known_profiles(self._model.sketch):
            try:
                profile.check(self._model.query_heads, self._model.layout)
            except ConfigError as error:
                _warn_once(f"a head profile is not used: {error}")
            else:
                return profile
        return None


def known_profiles(sketch: Sketch | None) -> list[HeadProfile]:
    """Return the profiles of a model that the user's cache has or emt ships, the best first.

    That is the one whose weights are most alike; of equals the cache's, the newest of these first.
    """
    if sketch is None:
        return []
    profiles = [*cached_profiles(), *shipped_profiles()]
    # To three digits: what differs after them is the rounding of a dtype.
    alike = [
        0.0 if profile.sketch is None else round(sketch.correlation(profile.sketch), 3)
        for profile in profiles
    ]
    order = sorted(range(len(profiles)), key=lambda place: -alike[place])
    return [profiles[place] for place in order if alike[place] >= _SAME_MODEL]


@functools.cache
def shipped_profiles() -> tuple[HeadProfile, ...]:
    """Return the profiles that come with emt."""
    folder = resources.files("emt.profiles") / "shipped"
    files = [file for file in folder.iterdir() if file.name.endswith(".json")]
    texts = [file.read_text(encoding="utf-8") for file in files]
    return tuple(HeadProfile.from_json(json.loads(text)) for text in texts)


@functools.cache
def _warn_once(message: str) -> None:
    _logger.warning(message)


def _is_older(stored: Any) -> bool:
    """Tell whether a store's profile is of an older version, and say so."""
    is_older = isinstance(stored, dict) and stored.get("version") in range(1, VERSION)
    if is_older:
        _warn_once(_OF_OLDER_VERSION)
    return is_older
