"""The contract of a memory backend: add, search, fetch, remove, save, open, len.

A backend holds one row a token: at every layer, `num_key_value_heads` keys and values. A row has
the same id in every layer and head, ids are never used again, and removing rows moves no other.
`search` finds rows, one (layer, KV head) at a time; `fetch` gives their keys and values. Backends
differ in how they search and in where rows live, and in nothing else.

Any number of threads may search one backend at a time, but not while it writes. Any number of
processes may have a store open while one of them writes: the others find what was there when they
opened it, until they `refresh`. Where a memory is kept, and who may write to it, is `store.py`'s.
"""

from __future__ import annotations

import contextlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch

from memory_backends.batch import written
from memory_backends.catalog import Catalog
from memory_backends.codecs import CODEC_NAMES
from memory_backends.compaction import compact
from memory_backends.errors import MemoryMismatchError, StoreError, reported
from memory_backends.exact import best_rows
from memory_backends.layout import Document, Int64Array, LayerLayout, MemoryLayout, Rows
from memory_backends.rows import RowStorage
from memory_backends.scope import Scope
from memory_backends.scope_cache import ScopeCache
from memory_backends.scores import Precision as Precision
from memory_backends.scores import Retrieval, ranked, tied_queries
from memory_backends.scores import SearchResult as SearchResult
from memory_backends.store import Store
from memory_backends.validation import (
    check_directory,
    check_free,
    check_heads,
    check_ids,
    check_search,
)

Sinks = Literal["all", "one"]

_ROWS_PER_COMMIT = 8192
_SPARE_CANDIDATES = 4  # near neighbours of the k-th, among which rounding may have chosen wrongly
_SCOPED_KEY_BYTES = 2**28  # kept of scopes' keys
_ROWS_AT_ONCE = 8192  # read of a scope whose keys are not kept


class MemoryBackend(ABC):
    """Rows of one memory, with their documents. See the module docstring for the contract.

    Args:
        layout: the shape of the rows. A store that is opened must have the same.
        path: the store's directory. It is opened if it exists; else the first `add` creates it.
            None for a memory that is not kept.
        identity: what the model that writes these rows looks like, as plain JSON types; a store
            that another model wrote is refused.
        sinks: which rows a search may find: "all", or all with only "one" set of attention sinks,
            those of the first document that has some.
        row_codec: how a new store keeps rows: "exact", "float16", "bfloat16", "int8" or "int4".
            One that is opened keeps the codec it has. Rows that are not in files are exact.

    Attributes:
        num_changes: how often the rows that a search may find have changed, as far as this object
            knows.

    Raises:
        MemoryMismatchError: the store at `path` has another layout or identity, or there is no
            such codec.
        StoreError: `path` is not a directory with a store, or a file in it is missing or truncated.
    """

    _overfetch = 1  # candidates for each row asked for
    _is_temporary = False  # True if `path` is not the user's and goes when the object does

    def __init__(
        self,
        layout: MemoryLayout,
        *,
        path: Path | str | None = None,
        identity: Mapping[str, Any] | None = None,
        sinks: Sinks = "all",
        row_codec: str = "exact",
    ) -> None:
        if sinks not in ("all", "one"):
            raise MemoryMismatchError(f"sinks must be 'all' or 'one'; got {sinks!r}.")
        if row_codec not in CODEC_NAMES:
            raise MemoryMismatchError(f"row_codec must be one of {CODEC_NAMES}; got {row_codec!r}.")
        self.layout = layout
        self.path = None if path is None else Path(path)
        self.sinks: Sinks = sinks
        # Through JSON once, so that what is compared later is what a store gives back.
        known = json.loads(json.dumps(dict(identity or {})))
        self._store = Store(layout, self.path, known, self._rows_device, row_codec)
        self._searchable = self._read_searchable()
        self._scopes = ScopeCache(_SCOPED_KEY_BYTES)
        self.num_changes = 0

    # -- the contract ---------------------------------------------------------------------------

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

    def add(self, document: Document, rows: Iterable[Rows], *, replace: bool = False) -> range:
        """Store a document and its rows, all or nothing.

        Args:
            document: its name must be new, or `replace` True.
            rows: runs of consecutive rows, in order; read one at a time, so a generator that
                encodes as it goes needs memory for one run only.
            replace: remove the document of that name in the same transaction.

        Returns:
            The ids of the rows, consecutive.

        Raises:
            DocumentError: the name is taken, there are no rows, or ids and offsets do not fit.
            MemoryMismatchError: rows of another shape or dtype, or of tokens that the document does
                not have; a key or value that is NaN or infinite, or a key that is zero.
            StoreError: the store cannot be written, or another process or thread is writing to it.

            Whatever is raised, by `rows` too, the memory is as it was before.
        """
        ((_, ids),) = self.add_many([(document, rows)], replace=replace)
        return ids

    def add_many(
        self,
        documents: Iterable[tuple[Document, Iterable[Rows]]],
        *,
        replace: bool = False,
        rows_per_commit: int = _ROWS_PER_COMMIT,
    ) -> Iterator[tuple[str, range]]:
        """Store documents, many short ones with one flush and one transaction.

        Nothing is written before the first step of the iterator, and the memory is locked for
        writing until its end. Each document is all or nothing. Searches of this object find the new
        rows when the iterator has ended, or is closed.

        Args:
            documents: each with its rows, as for `add`.
            replace: as for `add`; a later document also takes the place of an earlier one.
            rows_per_commit: publish as soon as so many rows wait.

        Yields:
            Name and row ids of each document, after it was published.

        Raises:
            As `add`, and whatever `documents` raises. The documents complete before the one that
            failed are published, and yielded before the error is raised.
        """
        published = False
        with self._writing(), contextlib.ExitStack() as at_end:
            at_end.callback(lambda: self._changed() if published else None)
            for added in written(self._store, documents, rows_per_commit, replace=replace):
                published = True
                yield from added

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

    def remove(self, ids: Iterable[int]) -> None:
        """Remove single rows; no other row changes its id.

        Raises:
            MemoryMismatchError: an id that was never given out.
        """
        with self._writing():
            self._catalog.remove_rows(ids)
            self._changed()

    def remove_document(self, name: str) -> int:
        """Remove a document and its rows; return how many rows it had.

        Raises:
            DocumentError: there is none of that name.
        """
        with self._writing():
            removed = self._catalog.remove_document(name)
            self._changed()
        return removed

    def clear(self) -> None:
        """Remove everything. Ids are not used again."""
        with self._writing():
            self._catalog.remove_all()
            self._changed()

    def save(self, path: Path | str | None = None) -> None:
        """Write the memory to a store directory that every backend opens.

        Args:
            path: a directory that does not exist or is empty; None for the memory's own path.

        Raises:
            StoreError: there is no path, it is taken, or it cannot be written.
        """
        target = self._copy_target(path)
        if target is not None:
            directory = check_free(target)
            with self._writing(), reported(directory):  # so that no other process adds meanwhile
                self._store.copy_to(directory)
        elif self._catalog.path is None:
            with self._writing():  # makes the store, which has nothing in it yet
                pass

    def set_setting(self, key: str, value: Any) -> None:
        """Keep a setting of the caller's in the store, beside the memory's own.

        Args:
            key: a name that the store itself does not use.
            value: plain JSON types.

        Raises:
            StoreError: the store cannot be written.
        """
        with self._writing():
            self._catalog.set_setting(key, value)

    def refresh(self) -> None:
        """See what other processes have published by now: new documents, and removed ones.

        Raises:
            StoreError: the store is damaged or gone, or a thread is writing to this memory.
        """
        self._store.check_idle()
        self._refresh()

    def compact(self) -> int:
        """Give the space of removed documents back to the disk. No row changes its id.

        Returns:
            Bytes given back, as the file system counts them: 0 for a memory in RAM, and on file
            systems without sparse files, whose files keep their size.

        Raises:
            StoreError: the disk is full, or another process or thread is writing; the store is as
                good as before.
        """
        if self._catalog.path is None:
            return 0
        with self._writing(), reported(self.path):
            return compact(self._store)

    @classmethod
    def open(cls, path: Path | str, **options: Any) -> Self:
        """Open an existing store with the layout it has.

        Args:
            path: the store's directory.
            **options: further arguments of the class.

        Raises:
            StoreError: there is no store at `path`, or it is damaged.
        """
        directory = check_directory(Path(path))
        with contextlib.closing(Catalog.open(directory)) as catalog:
            layout = catalog.layout
            options.setdefault("identity", catalog.identity)
        return cls(layout, path=directory, **options)

    def __len__(self) -> int:
        """Rows that a search may find."""
        return len(self._searchable_rows())

    def num_searchable(self, scope: Scope | None = None) -> int:
        """Return how many rows a search of a scope may find."""
        return len(self) if scope is None else len(self._rows_in(scope))

    def close(self) -> None:
        """Let go of files; the object is of no use afterwards."""
        self._store.close()

    @property
    def catalog(self) -> Catalog:
        """The memory's documents and settings."""
        return self._store.catalog

    # -- for subclasses -------------------------------------------------------------------------

    @property
    def _catalog(self) -> Catalog:
        return self._store.catalog

    @property
    def _rows(self) -> RowStorage:
        return self._store.rows

    @property
    def _rows_device(self) -> torch.device:
        """Where rows live that are not in files."""
        return torch.device("cpu")

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
        if num_bytes <= self._scopes.num_bytes:
            place = (layer_idx, None if heads is None else tuple(heads))
            blocks: Iterable[torch.Tensor] = [
                self._scopes.keys(scope, place, lambda: self._unit_keys_of(layer_idx, rows, heads))
            ]
        else:
            blocks = (
                self._unit_keys_of(layer_idx, rows[start : start + _ROWS_AT_ONCE], heads)
                for start in range(0, len(rows), _ROWS_AT_ONCE)
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

    def _rows_changed(self) -> None:
        """Forget what was derived from the set of searchable rows, which is another now."""
        self._scopes.clear()
        self.num_changes += 1

    def _refresh(self) -> None:
        changed = self._store.open_if_made()
        with self._catalog.snapshot():
            changed = self._store.refresh() or changed
            if changed:
                self._searchable = self._read_searchable()
        if changed:  # what takes long must not keep a writer waiting
            self._rows_changed()

    def _changed(self) -> None:
        self._searchable = self._read_searchable()
        self._rows_changed()

    def _searchable_rows(self) -> Int64Array:
        """Return the ids that a search may find, ascending."""
        return self._searchable

    def _read_searchable(self) -> Int64Array:
        return self._catalog.searchable_rows(self.sinks)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Let one thread of one process write, to a store that is there and known as it is now."""
        before = self._catalog
        with self._store.writing():
            self._refresh()
            if self._catalog is not before:  # the store was made just now, maybe by someone else
                self._changed()
            yield

    def _layer(self, layer_idx: int) -> LayerLayout:
        if layer_idx not in self.layout.layers:
            raise MemoryMismatchError(
                f"layer must be one of {sorted(self.layout.layers)}; got {layer_idx}."
            )
        return self.layout.layers[layer_idx]

    def _copy_target(self, path: Path | str | None) -> Path | None:
        """Return where `save` puts a copy; None if `path` is where the memory is kept already.

        Raises:
            StoreError: no path, and the memory is not kept.
        """
        if path is None and (self.path is None or self._is_temporary):
            raise StoreError(
                "this memory has no path. Give save() one, or set `path` in the config."
            )
        own = self.path is not None and path is not None and self.path.resolve()
        return None if path is None or Path(path).resolve() == own else Path(path)
