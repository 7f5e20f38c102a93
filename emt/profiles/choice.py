"""Which head profile a memory is read with: the settings' own, its store's, or the one shipped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from emt.config import MemoryConfig
from emt.errors import ConfigError
from emt.routing.head_profile import HeadProfile, shipped_profiles
from memory_backends import MemoryBackend

if TYPE_CHECKING:
    from emt.memory.memory import Memory

PROFILE = "head_profile"  # a store's setting


class _Known(NamedTuple):
    """A head profile, and where it was looked for."""

    backend: MemoryBackend
    path: str | None
    stored: Any
    profile: HeadProfile | None


class ProfileChoice:
    """The head profile of one memory's model.

    Args:
        memory: whose model.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._known: _Known | None = None

    def find(self, config: MemoryConfig, backend: MemoryBackend) -> HeadProfile | None:
        """Return the head profile of the model, or None if there is none.

        Raises:
            ConfigError: the file of a profile is none, or of a model of another shape.
        """
        known = self._known
        if known is None or known.backend is not backend or known.path != config.profile:
            self._known = known = self._looked_up(config, backend)
        return known.profile

    def look_again(self, config: MemoryConfig, backend: MemoryBackend) -> None:
        """Look up again what was found: the store may have another one.

        Raises:
            ConfigError: as `find`.
        """
        if self._known is not None:
            self._known = self._looked_up(config, backend)

    @property
    def in_force(self) -> HeadProfile:
        """The head profile of this thread's calls.

        Raises:
            ConfigError: there is none.
        """
        found = self.find(self._memory.in_force, self._memory.backend)
        if found is None:
            raise ConfigError(
                "the passage mode needs a head profile of this model, and there is none. Make one "
                "of the memory's text with memory.passages.make_profile(), or of questions with "
                "`emt profile --model MODEL --data FILE --output FILE`, and set profile to FILE."
            )
        return found

    def _looked_up(self, config: MemoryConfig, backend: MemoryBackend) -> _Known:
        model = self._memory.attached_model("find a head profile")
        stored, before = backend.catalog.setting(PROFILE), self._known
        if before is not None and before[:3] == (backend, config.profile, stored):
            return before  # the same object: what was made for it stays
        if config.profile is not None:
            found: HeadProfile | None = HeadProfile.read(config.profile)
        elif stored is not None:
            found = HeadProfile.from_json(stored)
        else:
            found = shipped_profiles().get(str(model.identity.get("weights")))
        if found is not None:
            found.check(model.query_heads, model.layout)
        return _Known(backend, config.profile, stored, found)
