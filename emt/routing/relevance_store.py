"""`RelevanceStore`: the relevance of a memory, measured once and kept in its store."""

from __future__ import annotations

import threading
from typing import NamedTuple

from emt.routing.head_profile import HeadProfile
from emt.routing.head_search import HeadSearch
from emt.routing.relevance import Relevance
from memory_backends import MemoryBackend

RELEVANCE = "relevance"  # a store's setting
_MAX_NEW = 0.5  # rows written since, as a share of those measured: with more, it is measured again
_MAX_LOST = 1 / 3  # and likewise with fewer rows by more than this share


class _Measured(NamedTuple):
    """A relevance, and the memory and profile that it was measured with.

    Attributes:
        num_rows: how many rows could be searched.
        num_written: rows that there had ever been, removed ones included.
        relevance: the result; None if the probes had too little evidence.
    """

    backend: MemoryBackend
    profile: HeadProfile
    num_rows: int
    num_written: int
    relevance: Relevance | None

    def is_valid(self, backend: MemoryBackend, profile: HeadProfile) -> bool:
        """Tell whether most rows of the memory are still those that were searched."""
        if self.backend is not backend or self.profile is not profile:
            return False
        num_new = backend.catalog.num_rows - self.num_written
        if not 0 <= num_new <= _MAX_NEW * self.num_rows:
            return False
        return backend.num_searchable() >= (1 - _MAX_LOST) * self.num_rows


class RelevanceStore:
    """The relevance that was measured in this process, or before in a store."""

    def __init__(self) -> None:
        self._last: _Measured | None = None
        self._lock = threading.Lock()

    def of(self, heads: HeadSearch, backend: MemoryBackend) -> Relevance | None:
        """Return the relevance of a memory; measured, by routing 32 prompts, if it was not yet."""
        return self._measured(heads, backend).relevance

    def keep(self, heads: HeadSearch, backend: MemoryBackend) -> None:
        """Keep the relevance of a memory in its store, for all who open it.

        Raises:
            StoreError: the store cannot be written.
        """
        measured = self._measured(heads, backend)
        if measured.relevance is None:
            return
        about = {"profile": heads.profile.fingerprint, "written": measured.num_written}
        value = {**measured.relevance.to_json(), **about}
        if backend.catalog.setting(RELEVANCE) != value:
            backend.set_setting(RELEVANCE, value)

    def _measured(self, heads: HeadSearch, backend: MemoryBackend) -> _Measured:
        profile = heads.profile
        with self._lock:
            measured = self._last
            if measured is None or not measured.is_valid(backend, profile):
                measured = _stored(backend, profile)
            if measured is None or not measured.is_valid(backend, profile):
                num_rows, num_written = backend.num_searchable(), backend.catalog.num_rows
                relevance = heads.measure_relevance(backend)
                measured = _Measured(backend, profile, num_rows, num_written, relevance)
            self._last = measured
            return measured


def _stored(backend: MemoryBackend, profile: HeadProfile) -> _Measured | None:
    """Return what the store keeps, if it was measured with this profile."""
    value = backend.catalog.setting(RELEVANCE)
    if not isinstance(value, dict) or value.get("profile") != profile.fingerprint:
        return None
    try:
        relevance, num_written = Relevance.from_json(value), int(value["written"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return None  # of another version: it is measured again
    return _Measured(backend, profile, relevance.num_rows, num_written, relevance)
