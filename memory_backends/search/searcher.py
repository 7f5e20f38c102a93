"""The contract of a searcher: finding the stored rows nearest to queries.

A searcher is half of a memory backend; the other half is the `Store`, which keeps the rows. A
subclass implements `candidates`. The base class makes results of them: it asks for a few more than
k, ranks again by exact cosine where float32 cannot tell the order, and fetches keys and values.
All other methods have defaults, which a searcher with an index of its own overrides. Arguments have
been checked by `MemoryBackend`. Any number of threads may search at a time, but not during
`rows_changed` or `write_files`.
"""

# ruff: noqa: B027 - hooks that do nothing by default, so that a searcher has those it needs

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from memory_backends.layout import Heads, Int64Array, MemoryLayout
from memory_backends.scope import Scope
from memory_backends.search.exact import best_rows
from memory_backends.search.scores import (
    Precision,
    Retrieval,
    Search,
    SearchResult,
    ranked,
    tied_queries,
)
from memory_backends.search.searchable import SearchableRows, unit_length
from memory_backends.store import SingleStore, Store

_SPARE_CANDIDATES = 4  # near neighbours of the k-th, among which rounding may have chosen wrongly


@dataclass(frozen=True)
class NoOptions:
    """The options of a searcher that has none."""


class Searcher(ABC):
    """Finds the rows nearest to queries.

    Args:
        rows: the rows that may be found.
        options: an instance of `options_class`.

    Attributes:
        options_class: a frozen dataclass, whose fields `MemoryBackend` takes as keyword arguments.
        keeps_files: whether the searcher keeps files in the store's directory. If so, a memory
            without a path gets a temporary directory, and `save` calls `write_files`.
        overfetch: how many candidates are ranked for each row asked for.
        device: where results are; that of `rows_device`.
    """

    options_class: ClassVar[type[Any]] = NoOptions
    keeps_files: ClassVar[bool] = False
    overfetch: int = 1

    def __init__(self, rows: SearchableRows, options: Any) -> None:
        self.rows = rows
        self.layout = rows.layout
        self.options = options
        self.device = self.rows_device(options)

    @classmethod
    def rows_device(cls, options: Any) -> torch.device:
        """Return the device of rows without files; a MemoryMismatchError if there is no such."""
        return torch.device("cpu")

    @classmethod
    def open_store(
        cls,
        layout: MemoryLayout,
        path: Path | None,
        identity: Mapping[str, Any],
        row_codec: str,
        options: Any,
    ) -> Store:
        """Open or begin the store that is searched; arguments and errors as for `Store`."""
        return SingleStore(layout, path, identity, cls.rows_device(options), row_codec)

    # -- finding candidates ---------------------------------------------------------------------

    @abstractmethod
    def candidates(
        self, layer_idx: int, unit_queries: torch.Tensor, k: int, heads: Heads
    ) -> SearchResult:
        """Find the k rows of `self.rows.ids` nearest to each query.

        Args:
            layer_idx: one of the layout's.
            unit_queries: (Hkv, N, head_dim) float32 of unit length, on the queries' device.
            k: at most `len(self.rows)`; may be 0.
            heads: the h KV heads that `unit_queries`, then (h, N, head_dim), are of; None for all.

        Returns:
            Scores and ids, each (h, N, k), best first, the scores as good as `precision` says.
        """

    @property
    def precision(self) -> Precision:
        """How good the scores of `candidates` are."""
        return "exact"

    def candidates_in(
        self, scope: Scope, layer_idx: int, unit_queries: torch.Tensor, k: int, heads: Heads
    ) -> tuple[SearchResult, Precision]:
        """Find the k rows of a scope nearest to each query, and tell how good the scores are.

        The scope has at least k searchable rows; the other arguments are those of `candidates`.
        """
        return self.compare_all(scope, layer_idx, unit_queries, k, heads), "exact"

    # -- results --------------------------------------------------------------------------------

    def search(
        self,
        layer_idx: int,
        queries: torch.Tensor,
        k: int,
        heads: Heads = None,
        scope: Scope | None = None,
    ) -> SearchResult:
        """Find the rows with the highest cosine similarity; see `MemoryBackend.search`."""
        queries = queries.detach().float()
        wanted = max(k * self.overfetch, k + _SPARE_CANDIDATES)
        count = min(wanted, self.rows.count(scope))
        unit = torch.nn.functional.normalize(queries, dim=-1)
        precision = self.precision
        if scope is None:
            scores, ids = self.candidates(layer_idx, unit, count, heads)
        else:
            (scores, ids), precision = self.candidates_in(scope, layer_idx, unit, count, heads)
        if precision == "coarse":
            scores, ids = self._ranked(layer_idx, queries, ids, heads)
        elif precision == "exact" and len(tied := tied_queries(scores, k)):
            best = self._ranked(layer_idx, queries[:, tied], ids[:, tied], heads)
            scores[:, tied], ids[:, tied] = best.scores, best.ids
        scores, ids = scores[..., :k], ids[..., :k]
        if count < k:
            scores = torch.nn.functional.pad(scores, (0, k - count), value=-torch.inf)
            ids = torch.nn.functional.pad(ids, (0, k - count), value=-1)
        return SearchResult(scores, ids)

    def retrieve(
        self,
        layer_idx: int,
        queries: torch.Tensor,
        k: int,
        heads: Heads = None,
        scope: Scope | None = None,
    ) -> Retrieval:
        """Search, and fetch keys and values; see `MemoryBackend.retrieve`."""
        head_dim = self.layout.layers[layer_idx].head_dim
        scores, ids = self.search(layer_idx, queries, k, heads, scope)
        rows = self.gather(layer_idx, ids, heads)
        return Retrieval(scores, ids, rows[..., :head_dim], rows[..., head_dim:])

    def nearest(
        self,
        layer_idx: int,
        queries: torch.Tensor,
        k: int,
        heads: Heads = None,
        scope: Scope | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return keys and values without scores, in any order; see `MemoryBackend.nearest`."""
        hits = self.retrieve(layer_idx, queries, k, heads, scope)
        return None if bool((hits.ids < 0).any()) else (hits.keys, hits.values)

    def search_many(self, searches: Sequence[Search]) -> list[SearchResult]:
        """Do several searches; see `MemoryBackend.search_many`."""
        return [self.search(*each) for each in searches]

    def gather_layers(self, ids: torch.Tensor) -> dict[int, torch.Tensor]:
        """Return rows of all heads at every layer: (...) int64 to layer -> (Hkv, ..., D + Dv)."""
        return {
            layer_idx: self.gather(layer_idx, ids.expand(layer.num_key_value_heads, *ids.shape))
            for layer_idx, layer in self.layout.layers.items()
        }

    def gather(self, layer_idx: int, ids: torch.Tensor, heads: Heads = None) -> torch.Tensor:
        """Return rows by id: (h, ...) int64 to (h, ..., head_dim + value_head_dim); any for -1."""
        return self.rows.stored.gather(layer_idx, ids, heads)

    # -- for subclasses -------------------------------------------------------------------------

    def compare_all(
        self, scope: Scope, layer_idx: int, unit_queries: torch.Tensor, k: int, heads: Heads
    ) -> SearchResult:
        """Compare queries with every row of a scope; arguments as for `candidates_in`."""
        rows = self.rows.ids_in(scope)
        num_bytes = 4 * len(unit_queries) * unit_queries.shape[-1] * len(rows)
        place = (layer_idx, None if heads is None else tuple(heads))
        blocks = self.rows.scopes.key_blocks(
            scope, place, rows, num_bytes, lambda some: self.unit_keys_of(layer_idx, some, heads)
        )
        scores, positions = best_rows(unit_queries.to(self.device), blocks, k)
        return SearchResult(scores, torch.from_numpy(rows).to(positions.device)[positions])

    def unit_keys_of(self, layer_idx: int, rows: Int64Array, heads: Heads) -> torch.Tensor:
        """Return the keys of rows (n,), of unit length, (h, n, head_dim) float32."""
        layer = self.layout.layers[layer_idx]
        num_heads = layer.num_key_value_heads if heads is None else len(heads)
        ids = torch.from_numpy(rows).expand(num_heads, -1)
        return unit_length(self.gather(layer_idx, ids, heads)[..., : layer.head_dim])

    def _ranked(
        self, layer_idx: int, queries: torch.Tensor, ids: torch.Tensor, heads: Heads
    ) -> SearchResult:
        """Rank candidates by exact cosine, equal ones by id."""
        ids = ids.sort(dim=-1).values
        keys = self.gather(layer_idx, ids, heads)[..., : queries.shape[-1]]  # (h, N, c, D)
        return ranked(queries, keys, ids)

    # -- keeping up with the store --------------------------------------------------------------

    def rows_changed(self) -> None:
        """Forget what was derived from `self.rows`: other rows may be found now."""

    def close(self) -> None:
        """Release what the searcher holds apart from the store."""

    @property
    def searches_exactly(self) -> bool:
        """Whether every query is compared with every row, which needs no index to be built."""
        return True

    # -- files of a searcher that keeps some ----------------------------------------------------

    def index_heads(self, heads: Mapping[int, Sequence[int]] | None) -> None:
        """Choose the heads that `write_files` writes files for; see `MemoryBackend.index_heads`."""

    @property
    def lacks_files(self) -> bool:
        """Whether the store has files of this searcher, but not of all heads that it indexes."""
        return False

    @property
    def has_written(self) -> bool:
        """Whether the files in the store are up to date."""
        return True

    def write_files(self) -> None:
        """Bring the files in the store up to date; called while the store is locked for writing.

        Raises:
            StoreError: they cannot be written; those before stay in force.
        """

    def rebuild_files(self) -> None:
        """Do what `write_files` does, from the rows alone."""

    def options_of_copy(self) -> Any:
        """Return the options of the searcher that writes the files of a copy of the store."""
        return self.options
