"""How rows are found and read: the half of `MemoryBackend` that changes nothing.

A subclass finds candidates, of all rows or of a scope; here they become what was asked for: checked
arguments, a few candidates more than k, ranked again where their scores cannot tell, and padded.
A scope that a subclass does not search in its own way is compared with row by row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch

from memory_backends.catalog import Catalog
from memory_backends.errors import MemoryMismatchError
from memory_backends.exact import best_rows
from memory_backends.layout import Int64Array, LayerLayout
from memory_backends.rows import RowStorage
from memory_backends.scope import Scope
from memory_backends.scope_cache import ScopeCache
from memory_backends.scores import Precision, Retrieval, SearchResult, ranked, tied_queries
from memory_backends.store import Store
from memory_backends.validation import check_heads, check_ids, check_search

Sinks = Literal["all", "one"]

_SPARE_CANDIDATES = 4  # near neighbours of the k-th, among which rounding may have chosen wrongly
_SCOPED_KEY_BYTES = 2**28  # kept of scopes' keys


class RowSearch(ABC):
    """Search and fetch over the rows of a store; `MemoryBackend` says what may be relied on.

    Args:
        store: the rows.
        sinks: which of them a search may find; see `MemoryBackend`.
    """

    _overfetch = 1  # candidates for each row asked for

    def __init__(self, store: Store, sinks: Sinks) -> None:
        self.layout = store.layout
        self.sinks: Sinks = sinks
        self._store = store
        self._searchable = self._read_searchable()
        self._scopes = ScopeCache(_SCOPED_KEY_BYTES)

    def search(
        self,
        layer_idx: int,
        queries: torch.Tensor,
        k: int,
        *,
        heads: Sequence[int] | None = None,
        scope: Scope | None = None,
    ) -> SearchResult:
        """Find the rows with the highest cosine similarity to each query, for each KV head.

        The backend's own search finds a few more rows than asked for. Where float32 cannot tell
        the order of two of them, or the index keeps its vectors coarsely, they are ranked by their
        exact cosine, computed from the stored rows in float64, equal ones by id. So exact backends
        agree to the last id, unless more rows than the spare ones are exactly equal; scores of
        half-precision indexes are good to 1e-3.

        Args:
            layer_idx: the model's layer.
            queries: (Hkv, N, head_dim), any floating dtype, need not be normalised.
            k: how many rows to return for each query; at most `num_searchable(scope)` are found.
            heads: the KV heads to search, in the order of `queries`, which are then
                (len(heads), N, head_dim); all of them if None. The others cost nothing.
            scope: rows that may be found; others are not looked at. With sinks "one", those of the
                first document in the scope that has some are there. None for all rows.

        Returns:
            Scores and ids, each (Hkv, N, k), or (len(heads), N, k), on the device of the rows.

        Raises:
            MemoryMismatchError: a shape, layer or head that is not the layout's, or k < 1.
        """
        layer = self._layer(layer_idx)
        chosen = None if heads is None else check_heads(layer, layer_idx, heads)
        check_search(layer, queries, k, chosen)
        return self._search(layer_idx, queries.detach().float(), k, chosen, scope)

    def retrieve(
        self, layer_idx: int, queries: torch.Tensor, k: int, *, scope: Scope | None = None
    ) -> Retrieval:
        """Search, and fetch what was found.

        Args:
            layer_idx: as for `search`.
            queries: as for `search`.
            k: as for `search`.
            scope: as for `search`.

        Raises:
            As `search`.
        """
        layer = self._layer(layer_idx)
        scores, ids = self.search(layer_idx, queries, k, scope=scope)
        rows = self._gather(layer_idx, ids)
        return Retrieval(scores, ids, rows[..., : layer.head_dim], rows[..., layer.head_dim :])

    def nearest(
        self, layer_idx: int, queries: torch.Tensor, k: int, *, scope: Scope | None = None
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the keys and values that `retrieve` does, in any order and without scores.

        Args:
            layer_idx: as for `search`.
            queries: as for `search`.
            k: as for `search`.
            scope: as for `search`.

        Returns:
            Keys (Hkv, N, k, head_dim) and values (Hkv, N, k, value_head_dim); None if fewer than k
            rows were found for some query.

        Raises:
            As `search`.
        """
        found = self.retrieve(layer_idx, queries, k, scope=scope)
        return None if bool((found.ids < 0).any()) else (found.keys, found.values)

    def fetch(self, layer_idx: int, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values of rows, one set of ids for each KV head.

        Args:
            layer_idx: the model's layer.
            ids: (Hkv, ...) int64; an id of -1 gives some finite numbers, for the caller to mask.

        Returns:
            Keys (Hkv, ..., head_dim) and values (Hkv, ..., value_head_dim), in the layout's dtype.

        Raises:
            MemoryMismatchError: an id that was never given out, or a wrong shape.
        """
        layer = self._layer(layer_idx)
        check_ids(layer, ids, self._rows.num_rows)
        found = self._gather(layer_idx, ids)
        return found[..., : layer.head_dim], found[..., layer.head_dim :]

    def sampled_queries(self, layer_idx: int) -> torch.Tensor:
        """Return the kept sample of the stored tokens' queries.

        Args:
            layer_idx: the model's layer.

        Returns:
            (Hkv, s, G, head_dim) float32 on the CPU, as the model compares them with keys; the
            G = H / Hkv query heads of a group share a KV head. (Hkv, 0, 1, head_dim) if none are
            kept.

        Raises:
            MemoryMismatchError: a layer that is not the layout's.
            StoreError: samples are damaged.
        """
        self._layer(layer_idx)
        return self._store.sampled_queries(layer_idx)

    def __len__(self) -> int:
        """Rows that a search may find."""
        return len(self._searchable_rows())

    def num_searchable(self, scope: Scope | None = None) -> int:
        """Return how many rows a search of a scope may find."""
        return len(self) if scope is None else len(self._rows_in(scope))

    # -- for subclasses -------------------------------------------------------------------------

    @abstractmethod
    def _candidates(
        self, layer_idx: int, unit_queries: torch.Tensor, k: int, heads: Sequence[int] | None
    ) -> SearchResult:
        """Find the k rows nearest to each query.

        Args:
            layer_idx: one of the layout's.
            unit_queries: (Hkv, N, head_dim) float32 of unit length, on the queries' device.
            k: at most `len(self)`; may be 0.
            heads: the KV heads that `unit_queries` are of; all of them if None.

        Returns:
            As `search`, with scores as good as `_precision` says.
        """

    def _search(
        self,
        layer_idx: int,
        queries: torch.Tensor,
        k: int,
        heads: Sequence[int] | None = None,
        scope: Scope | None = None,
    ) -> SearchResult:
        """Search, with arguments that were checked; queries in float32."""
        spare = max(k * self._overfetch, k + _SPARE_CANDIDATES)
        found = min(spare, self.num_searchable(scope))
        unit = torch.nn.functional.normalize(queries, dim=-1)
        precision = self._precision
        if scope is None:
            scores, ids = self._candidates(layer_idx, unit, found, heads)
        else:
            (scores, ids), precision = self._candidates_in(scope, layer_idx, unit, found, heads)
        if precision == "coarse":
            scores, ids = self._ranked(layer_idx, queries, ids, heads)
        elif precision == "exact" and len(tied := tied_queries(scores, k)):
            best = self._ranked(layer_idx, queries[:, tied], ids[:, tied], heads)
            scores[:, tied], ids[:, tied] = best.scores, best.ids
        scores, ids = scores[..., :k], ids[..., :k]
        if found < k:
            scores = torch.nn.functional.pad(scores, (0, k - found), value=-torch.inf)
            ids = torch.nn.functional.pad(ids, (0, k - found), value=-1)
        return SearchResult(scores, ids)

    def _candidates_in(
        self,
        scope: Scope,
        layer_idx: int,
        unit_queries: torch.Tensor,
        k: int,
        heads: Sequence[int] | None,
    ) -> tuple[SearchResult, Precision]:
        """Find the k rows of a scope nearest to each query; tell how good the scores are.

        Args:
            scope: has at least k searchable rows.
            layer_idx: as for `_candidates`, like all that follow.
        """
        return self._exact_in(scope, layer_idx, unit_queries, k, heads), "exact"

    def _exact_in(
        self,
        scope: Scope,
        layer_idx: int,
        unit_queries: torch.Tensor,
        k: int,
        heads: Sequence[int] | None,
    ) -> SearchResult:
        """Compare queries with every row of a scope, and with no other."""
        rows = self._rows_in(scope)
        num_bytes = 4 * len(unit_queries) * unit_queries.shape[-1] * len(rows)
        place = (layer_idx, None if heads is None else tuple(heads))
        blocks = self._scopes.key_blocks(
            scope, place, rows, num_bytes, lambda some: self._unit_keys_of(layer_idx, some, heads)
        )
        scores, positions = best_rows(unit_queries.to(self._rows_device), blocks, k)
        return SearchResult(scores, torch.from_numpy(rows).to(positions.device)[positions])

    def _unit_keys_of(
        self, layer_idx: int, rows: Int64Array, heads: Sequence[int] | None
    ) -> torch.Tensor:
        """Return the keys of rows, normalised, (h, n, head_dim) float32."""
        layer = self._layer(layer_idx)
        num_heads = layer.num_key_value_heads if heads is None else len(heads)
        ids = torch.from_numpy(rows).expand(num_heads, -1)
        keys = self._gather(layer_idx, ids, heads)[..., : layer.head_dim].float()
        return torch.nn.functional.normalize(keys, dim=-1)

    def _rows_in(self, scope: Scope) -> Int64Array:
        """Return the ids that a search of a scope may find, ascending."""

        def find() -> Int64Array:
            if self.sinks == "one":  # of another document than those of the whole memory
                return self._catalog.searchable_rows(self.sinks, scope)
            return scope.among(self._searchable_rows())

        return self._scopes.rows(scope, find)

    def _ranked(
        self,
        layer_idx: int,
        queries: torch.Tensor,
        ids: torch.Tensor,
        heads: Sequence[int] | None = None,
    ) -> SearchResult:
        """Rank candidates by exact cosine, equal ones by id."""
        ids = ids.sort(dim=-1).values
        keys = self._gather(layer_idx, ids, heads)[..., : queries.shape[-1]]  # (Hkv, N, c, D)
        return ranked(queries, keys, ids)

    @property
    def _precision(self) -> Precision:
        """How good the scores of `_candidates` are."""
        return "exact"

    def _gather(
        self, layer_idx: int, ids: torch.Tensor, heads: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Return rows by id: (h, ...) to (h, ..., head_dim + value_head_dim); any for -1."""
        return self._rows.gather(layer_idx, ids, heads)

    @property
    def _rows_device(self) -> torch.device:
        """Where rows live that are not in files."""
        return torch.device("cpu")

    # -- plumbing -------------------------------------------------------------------------------

    @property
    def _catalog(self) -> Catalog:
        return self._store.catalog

    @property
    def _rows(self) -> RowStorage:
        return self._store.rows

    def _searchable_rows(self) -> Int64Array:
        """Return the ids that a search may find, ascending."""
        return self._searchable

    def _read_searchable(self) -> Int64Array:
        return self._catalog.searchable_rows(self.sinks)

    def _layer(self, layer_idx: int) -> LayerLayout:
        if layer_idx not in self.layout.layers:
            raise MemoryMismatchError(
                f"layer must be one of {sorted(self.layout.layers)}; got {layer_idx}."
            )
        return self.layout.layers[layer_idx]
