"""`KnownRelevance`: what decides whether prompts are about a memory, measured once and kept."""

from __future__ import annotations

import threading
from typing import NamedTuple

from emt.routing.profile import HeadProfile
from emt.routing.relevance import Relevance
from emt.routing.router import Router
from memory_backends import MemoryBackend

RELEVANCE = "relevance"  # a store's setting
_NEAR = 1.5  # a memory that has grown or shrunk by more is measured again


class _Measured(NamedTuple):
    """What prompts about nothing in particular find, and in which memory."""

    backend: MemoryBackend
    profile: HeadProfile
    num_rows: int
    relevance: Relevance | None

    def holds(self, backend: MemoryBackend, profile: HeadProfile, num_rows: int) -> bool:
        """Tell whether it is still true."""
        is_near = self.num_rows / _NEAR <= num_rows <= self.num_rows * _NEAR
        return self.backend is backend and self.profile is profile and is_near


def _stored(backend: MemoryBackend, profile: HeadProfile) -> _Measured | None:
    """Return what a store knows, if it was measured with this profile."""
    value = backend.catalog.setting(RELEVANCE)
    if not isinstance(value, dict) or value.get("profile") != profile.fingerprint:
        return None
    try:
        found = Relevance.from_json(value)
    except (KeyError, TypeError, ValueError):
        return None  # of another version: it is measured again
    return _Measured(backend, profile, found.num_rows, found)


class KnownRelevance:
    """What was measured in this process, or before in a store."""

    def __init__(self) -> None:
        self._known: _Measured | None = None
        self._lock = threading.Lock()

    def of(self, router: Router, backend: MemoryBackend) -> Relevance | None:
        """Return what prompts about nothing in particular find; measured if it was not yet.

        Measuring routes 32 prompts, in the whole memory.

        Args:
            router: finds passages.
            backend: where the memories are.
        """
        profile, rows = router.profile, backend.num_searchable()
        with self._lock:
            known = self._known
            if known is None or not known.holds(backend, profile, rows):
                known = _stored(backend, profile)
            if known is None or not known.holds(backend, profile, rows):
                known = _Measured(backend, profile, rows, router.relevance(backend))
            self._known = known
            return known.relevance

    def keep(self, router: Router, backend: MemoryBackend) -> None:
        """Keep it in the store, for all who open it.

        Raises:
            StoreError: the store cannot be written.
        """
        found = self.of(router, backend)
        if found is not None:
            value = {**found.to_json(), "profile": router.profile.fingerprint}
            if backend.catalog.setting(RELEVANCE) != value:
                backend.set_setting(RELEVANCE, value)
