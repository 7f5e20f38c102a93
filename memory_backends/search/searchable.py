"""What a searcher sees of a memory: the stored rows, and which of them a search may find."""

from __future__ import annotations

from typing import Literal

import torch
import numpy as np

from memory_backends.layout import Int64Array
from memory_backends.rows.base import RowStorage
from memory_backends.scope import Scope
from memory_backends.search.scope_cache import ScopeCache
from memory_backends.store import Store

Sinks = Literal["all", "one"]

_SCOPED_KEY_BYTES = 2**28  # kept of scopes' keys


class SearchableRows:
    """The rows of a store that a search may find.

    Attributes:
        store: documents, rows and query samples.
        layout: the shape of the rows.
        ids: (n,) int64, ascending, the rows that a search without a scope may find: all, or with
            sinks "one" all but the attention sinks of later documents than the first with some.
        scopes: what is kept of the scopes that were searched last.
    """

    def __init__(self, store: Store, sinks: Sinks) -> None:
        self.store = store
        self.layout = store.layout
        self.scopes = ScopeCache(_SCOPED_KEY_BYTES)
        self._sinks = sinks
        self._chosen: Int64Array | None = None
        self.read()

    def read(self) -> None:
        """Read anew which rows may be found."""
        chosen = self._chosen
        self.ids: Int64Array = self.store.searchable_rows(self._sinks) if chosen is None else chosen

    def choose(self, ids: Int64Array) -> None:
        """Let searches find these rows, ascending, from now on, whatever the store says.

        Of a scope, all rows are found then: whoever chooses knows which of its rows may be.
        """
        self.ids = self._chosen = ids

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def stored(self) -> RowStorage:
        """All rows of the store, removed ones included."""
        return self.store.rows

    def ids_in(self, scope: Scope) -> Int64Array:
        """Return the ids that a search of a scope may find, ascending, (n,) int64."""

        def read() -> Int64Array:
            if self._chosen is not None:
                return np.flatnonzero(scope.mask(self.stored.num_rows))
            if self._sinks == "one":  # of another document than those of the whole memory
                return self.store.searchable_rows(self._sinks, scope)
            return scope.among(self.ids)

        return self.scopes.rows(scope, read)

    def count(self, scope: Scope | None) -> int:
        """Return how many rows a search may find."""
        return len(self.ids) if scope is None else len(self.ids_in(scope))


def unit_length(keys: torch.Tensor) -> torch.Tensor:
    """Return keys (..., head_dim) of any dtype as float32 of unit length."""
    return torch.nn.functional.normalize(keys.float(), dim=-1)
