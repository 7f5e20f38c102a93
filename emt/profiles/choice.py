"""Which head profile a memory is routed with: the settings', its store's, or one shipped with emt.

Profiles that come with emt are looked up by the fingerprint of the model's weights.
"""

from __future__ import annotations

import functools
import json
from importlib import resources
from typing import Any, NamedTuple

from emt.config import MemoryConfig
from emt.errors import ConfigError
from emt.model.attached import AttachedModel
from emt.routing.head_profile import HeadProfile
from memory_backends import MemoryBackend

PROFILE = "head_profile"  # a store's setting


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
                "of the memory's text with memory.make_profile(), or of questions with "
                "`emt profile --model MODEL --data FILE --output FILE`, and set profile to FILE; "
                "or route by words, with routing: both until there is a profile."
            )
        return profile

    def look_again(self, config: MemoryConfig, backend: MemoryBackend) -> None:
        """Choose again what was chosen: the store may keep another profile now."""
        if self._last is not None:
            self._last = self._choose(config, backend)

    def _choose(self, config: MemoryConfig, backend: MemoryBackend) -> _Choice:
        stored, last = backend.catalog.setting(PROFILE), self._last
        if last is not None and last[:3] == (backend, config.profile, stored):
            return last  # the same object: what was made for it stays
        if config.profile is not None:
            profile: HeadProfile | None = HeadProfile.read(config.profile)
        elif stored is not None:
            profile = HeadProfile.from_json(stored)
        else:
            profile = shipped_profiles().get(str(self._model.identity.get("weights")))
        if profile is not None:
            profile.check(self._model.query_heads, self._model.layout)
        return _Choice(backend, config.profile, stored, profile)


@functools.cache
def shipped_profiles() -> dict[str, HeadProfile]:
    """Return the profiles that come with emt, by the fingerprint of their weights."""
    folder = resources.files("emt.profiles") / "shipped"
    files = [file for file in folder.iterdir() if file.name.endswith(".json")]
    texts = [file.read_text(encoding="utf-8") for file in files]
    profiles = [HeadProfile.from_json(json.loads(text)) for text in texts]
    return {profile.weights: profile for profile in profiles}
