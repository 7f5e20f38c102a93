"""A cache of the scopes that were searched last, so that a decode step has their keys ready."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from memory_backends.layout import Int64Array
from memory_backends.scope import Scope

Place = tuple[int, tuple[int, ...] | None]  # layer, and KV heads if not all of them

_MAX_SCOPES = 256
_ROWS_AT_ONCE = 8192  # read of a scope whose keys are not kept


@dataclass
class _Kept:
    """What is kept of one scope: its searchable rows, and of some layers their unit keys."""

    rows: Int64Array
    keys: dict[Place, torch.Tensor] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        return sum(keys.nbytes for keys in self.keys.values())


class ScopeCache:
    """Searchable rows and unit keys of the scopes used last. Safe to share between threads.

    The keys of all scopes may take `num_bytes`.
    """

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._kept: OrderedDict[Scope, _Kept] = OrderedDict()  # used last comes last
        self._lock = threading.Lock()

    def clear(self) -> None:
        """Forget everything: the memory's rows are others now."""
        with self._lock:
            self._kept.clear()

    def rows(self, scope: Scope, read: Callable[[], Int64Array]) -> Int64Array:
        """Return a scope's searchable rows, those of `read` if none are kept."""
        with self._lock:
            kept = self._kept.get(scope)
            if kept is not None:
                self._kept.move_to_end(scope)
                return kept.rows
        rows = read()
        with self._lock:
            self._kept.setdefault(scope, _Kept(rows))
            while len(self._kept) > _MAX_SCOPES:
                self._kept.popitem(last=False)
        return rows

    def keys(self, scope: Scope, place: Place, read: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return unit keys of a scope whose rows are kept; those of `read` if keys are not.

        Scopes that were not used for longest make room. A scope that does not fit keeps the layers
        that do: what every decode step needs again must not drive out itself.
        """
        with self._lock:
            kept = self._kept.get(scope)
            if kept is not None and place in kept.keys:
                return kept.keys[place]
        keys = read()
        with self._lock:
            kept = self._kept.get(scope)
            if kept is not None and self._make_room(scope, keys.nbytes):
                kept.keys[place] = keys
        return keys

    def key_blocks(
        self,
        scope: Scope,
        place: Place,
        rows: Int64Array,
        num_bytes: int,
        read: Callable[[Int64Array], torch.Tensor],
    ) -> Iterable[torch.Tensor]:
        """Return unit keys of a scope's rows, in order; in blocks if they are too many to keep.

        The scope's searchable `rows`, (n,), are kept, and their keys take `num_bytes`.
        """
        if num_bytes <= self.num_bytes:
            return [self.keys(scope, place, lambda: read(rows))]
        starts = range(0, len(rows), _ROWS_AT_ONCE)
        return (read(rows[start : start + _ROWS_AT_ONCE]) for start in starts)

    def _make_room(self, scope: Scope, num_bytes: int) -> bool:
        used = sum(kept.num_bytes for kept in self._kept.values())
        own = self._kept[scope].num_bytes
        if own + num_bytes > self.num_bytes:
            return False
        for other, kept in self._kept.items():
            if used + num_bytes <= self.num_bytes:
                break
            if other != scope:
                used -= kept.num_bytes
                kept.keys.clear()
        return True
