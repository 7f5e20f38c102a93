"""`KnownRelevance`: what decides whether prompts are about a memory, measured once and kept."""

from __future__ import annotations

import threading
from typing import NamedTuple

from emt.routing.head_profile import HeadProfile
from emt.routing.relevance import Relevance
from emt.routing.router import Router
from memory_backends import MemoryBackend

RELEVANCE = "relevance"  # a store's setting
_NEW = 0.5  # rows written since, as a share of those measured: with more, it is measured again
_LOST = 1 / 3  # and likewise with fewer rows by more than this share


class _Measured(NamedTuple):
    """What prompts about nothing in particular find, and in which memory.

    Attributes:
        backend: of the memory.
        profile: whose heads searched.
        num_rows: that a search could find.
        written: rows that there had ever been, removed ones included.
        relevance: what was found; None for too little.
    """

    backend: MemoryBackend
    profile: HeadProfile
    num_rows: int
    written: int
    relevance: Relevance | None

    def holds(self, backend: MemoryBackend, profile: HeadProfile) -> bool:
        """Tell whether it is still true: most rows are those that were searched."""
        new = backend.catalog.num_rows - self.written
        is_near = 0 <= new <= _NEW * self.num_rows
        is_near = is_near and backend.num_searchable() >= (1 - _LOST) * self.num_rows
        return self.backend is backend and self.profile is profile and is_near


def _stored(backend: MemoryBackend, profile: HeadProfile) -> _Measured | None:
    """Return what a store knows, if it was measured with this profile."""
    value = backend.catalog.setting(RELEVANCE)
    if not isinstance(value, dict) or value.get("profile") != profile.fingerprint:
        return None
    try:
        found, written = Relevance.from_json(value), int(value["written"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return None  # of another version: it is measured again
    return _Measured(backend, profile, found.num_rows, written, found)


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
        return self._measured(router, backend).relevance

    def keep(self, router: Router, backend: MemoryBackend) -> None:
        """Keep it in the store, for all who open it.

        Raises:
            StoreError: the store cannot be written.
        """
        known = self._measured(router, backend)
        if known.relevance is not None:
            about = {"profile": router.profile.fingerprint, "written": known.written}
            value = {**known.relevance.to_json(), **about}
            if backend.catalog.setting(RELEVANCE) != value:
                backend.set_setting(RELEVANCE, value)

    def _measured(self, router: Router, backend: MemoryBackend) -> _Measured:
        profile = router.profile
        with self._lock:
            known = self._known
            if known is None or not known.holds(backend, profile):
                known = _stored(backend, profile)
            if known is None or not known.holds(backend, profile):
                rows, written = backend.num_searchable(), backend.catalog.num_rows
                known = _Measured(backend, profile, rows, written, router.relevance(backend))
            self._known = known
            return known
