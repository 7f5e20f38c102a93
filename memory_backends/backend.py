"""One memory: add, search, fetch, remove, save, open, len.

A backend holds one row a token: at every layer, `num_key_value_heads` keys and values. A row has
the same id in every layer and head, ids are never used again, and removing rows moves no other. The
`Store` keeps rows and documents; a `Searcher`, chosen by `memory_type`, finds rows.

Any number of threads may search one backend at a time, but not while it writes. Any number of
processes may have a store open while one of them writes: the others find what was there when they
opened it, until they `refresh`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, get_args

import torch

from memory_backends.catalog import Catalog
from memory_backends.errors import MemoryMismatchError, StoreError, reported
from memory_backends.layout import (
    Document,
    Heads,
    Int64Array,
    LayerLayout,
    MemoryLayout,
    Metadata,
    Rows,
)
from memory_backends.registry import SHARDED, make_options, searcher_class
from memory_backends.rows.codecs import CODEC_NAMES, TEXT
from memory_backends.scope import Scope
from memory_backends.search.checks import check_heads, check_ids, check_search, checked_layer
from memory_backends.search.scores import Retrieval, Search, SearchResult
from memory_backends.search.searchable import SearchableRows, Sinks
from memory_backends.search.searcher import Searcher
from memory_backends.store import Store
from memory_backends.store.batch import written
from memory_backends.store.derived import read_derived, remove_derived, write_derived
from memory_backends.store.directory import check_directory, check_free, is_sharded
from memory_backends.store.store import DocumentBatch

_ROWS_PER_COMMIT = 8192

LayerParts = dict[int, tuple[torch.Tensor, torch.Tensor]]  # layer -> keys and values


class MemoryBackend:
    """Rows of one memory, with their documents. See the module docstring for the contract.

    Args:
        layout: the shape of the rows. A store that is opened must have the same shape; rows of
            another dtype are converted, which a log record says.
        memory_type: how rows are searched: "manual", "vector_db", or a name that was given to
            `register_searcher`. A sharded store is opened as such whatever is given here, which is
            how its shards are searched then.
        path: the store's directory. It is opened if it exists; else the first `add` creates it.
            None for a memory that is not kept.
        identity: what the model that writes these rows looks like, as plain JSON types; a store
            that another model wrote is refused.
        sinks: which rows a search may find: "all", or all with only "one" set of attention sinks,
            those of the first document that has some.
        row_codec: how a new store keeps rows: "exact", "float16", "bfloat16", "int8", "int5.5",
            "int4", or "text" for none: such a store has the keys of the heads that `index_heads`
            chose before its first write, and searches these alone. A store that is opened keeps the
            codec it has. Rows that are not in files are exact, and so are those of a store with
            fewer than 512, too few to learn from for a codec that quantises.
        **options: of the searcher: see `ManualOptions` and `FaissOptions`.

    Attributes:
        path: where the memory is kept, maybe for as long as this object; None if it is not.
        searcher: finds the rows.
        num_changes: how often the rows that a search may find have changed, as far as this object
            knows.
        is_closed: whether it has let go of its files.
        row_source: gives `fetch_layers` the rows that a store of codec "text" does not have.

    Raises:
        MemoryMismatchError: the store at `path` has another layout or identity; there is no such
            memory type, option, codec or device.
        IndexFactoryError: an index that FAISS rejects.
        StoreError: `path` is not a directory with a store, or a file in it is missing or truncated.
            Every method that writes raises it, too, if the disk is full or cannot be written, or
            if another process or thread is writing; then the memory is as it was before.
    """

    def __init__(
        self,
        layout: MemoryLayout,
        memory_type: str = "manual",
        *,
        path: Path | str | None = None,
        identity: Mapping[str, Any] | None = None,
        sinks: Sinks = "all",
        row_codec: str = "exact",
        **options: Any,
    ) -> None:
        if path is not None and memory_type != SHARDED and is_sharded(Path(path)):
            options = {"shard_type": memory_type, "shard_options": options}
            memory_type = SHARDED
        kind = searcher_class(memory_type)
        search_options = make_options(memory_type, options)
        if sinks not in get_args(Sinks):
            raise MemoryMismatchError(f"sinks must be 'all' or 'one'; got {sinks!r}.")
        if row_codec not in CODEC_NAMES:
            raise MemoryMismatchError(f"row_codec must be one of {CODEC_NAMES}; got {row_codec!r}.")
        self.layout = layout
        self.memory_type = memory_type
        self.sinks: Sinks = sinks
        self.num_changes = 0
        self.is_closed = False
        self.row_source: Callable[[MemoryBackend, torch.Tensor], LayerParts] | None = None
        self._heads: Mapping[int, Sequence[int]] | None = None
        self._is_temporary = path is None and kind.keeps_files
        if self._is_temporary:
            path = Path(tempfile.mkdtemp(prefix="emt-")) / "store"
            weakref.finalize(self, shutil.rmtree, path.parent, ignore_errors=True)
        self.path = None if path is None else Path(path)
        # Through JSON once, so that what is compared later is what a store gives back.
        identity = json.loads(json.dumps(dict(identity or {})))
        self._store: Store = kind.open_store(layout, self.path, identity, row_codec, search_options)
        with contextlib.ExitStack() as on_error:
            on_error.callback(self._store.close)
            self._rows = SearchableRows(self._store, sinks)
            self._search_options = search_options
            self.searcher: Searcher = kind(self._rows, search_options)
            self._wait_to_be_coded = self._store.rows_wait_to_be_coded
            on_error.pop_all()

    @classmethod
    def open(cls, path: Path | str, memory_type: str = "manual", **options: Any) -> Self:
        """Open an existing store with the layout it has; every kind of searcher opens every store.

        Raises:
            StoreError: there is no store at `path`, or it is damaged.
        """
        directory = check_directory(Path(path))
        with contextlib.closing(Catalog.open(directory)) as catalog:
            layout = catalog.layout
            options.setdefault("identity", catalog.identity)
        return cls(layout, memory_type, path=directory, **options)

    def close(self) -> None:
        """Let go of files; the object is of no use afterwards."""
        self.is_closed = True
        self.searcher.close()
        self._store.close()

    @property
    def catalog(self) -> Catalog:
        """The memory's documents and settings."""
        return self._store.catalog

    @property
    def store(self) -> Store:
        """The parts that the memory consists of."""
        return self._store

    @property
    def keeps_rows(self) -> bool:
        """Whether keys and values are kept, or only text, tokens and the searched heads' keys."""
        return self.path is None or self.catalog.row_codec != TEXT

    @property
    def missing_shards(self) -> tuple[int, ...]:
        """The shards of a sharded store that are not there, and whose rows nothing finds."""
        return self._store.missing_shards

    def readable(self, scope: Scope | None) -> Scope:
        """Return the rows of a scope, or of all rows, that are in no missing shard."""
        return Scope.of_rows(self._store.searchable_rows("all", scope))

    @property
    def is_read_only(self) -> bool:
        """Whether there is a store, and this process has no permission to write to it."""
        return self._store.is_read_only

    # -- searching ------------------------------------------------------------------------------

    def search(
        self,
        layer_idx: int,
        queries: torch.Tensor,
        k: int,
        *,
        heads: Heads = None,
        scope: Scope | None = None,
    ) -> SearchResult:
        """Find the rows with the highest cosine similarity to each query, for each KV head.

        The searcher finds a few more rows than asked for. Where float32 cannot tell the order of
        two of them, or the index keeps its vectors coarsely, they are ranked by their exact cosine,
        computed from the stored rows in float64, equal ones by id. So exact searchers agree to the
        last id, unless more rows than the spare ones are exactly equal; scores of half-precision
        indexes are good to 1e-3.

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
        chosen = self._checked(layer_idx, queries, k, heads)
        return self.searcher.search(layer_idx, queries, k, chosen, scope)

    def search_many(self, searches: Sequence[Search]) -> list[SearchResult]:
        """Do several searches at once, as `search` does each: one message a shard, if there are."""
        checked = []
        for each in searches:
            heads = self._checked(each.layer_idx, each.queries, each.k, each.heads)
            checked.append(each._replace(heads=heads))
        return self.searcher.search_many(checked)

    def retrieve(
        self,
        layer_idx: int,
        queries: torch.Tensor,
        k: int,
        *,
        heads: Heads = None,
        scope: Scope | None = None,
    ) -> Retrieval:
        """Search, and fetch the rows; arguments and errors as for `search` and `fetch`."""
        self._check_keeps_rows()
        chosen = self._checked(layer_idx, queries, k, heads)
        return self.searcher.retrieve(layer_idx, queries, k, chosen, scope)

    def nearest(
        self,
        layer_idx: int,
        queries: torch.Tensor,
        k: int,
        *,
        heads: Heads = None,
        scope: Scope | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the keys and values that `retrieve` does, in any order and without scores.

        Arguments and errors as for `search`.

        Returns:
            Keys (Hkv, N, k, head_dim) and values (Hkv, N, k, value_head_dim), of `heads` if they
            are given; None if there are fewer than k rows for some query.
        """
        self._check_keeps_rows()
        chosen = self._checked(layer_idx, queries, k, heads)
        return self.searcher.nearest(layer_idx, queries, k, chosen, scope)

    def fetch(self, layer_idx: int, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values of rows, one set of ids for each KV head.

        Args:
            layer_idx: the model's layer.
            ids: (Hkv, ...) int64; an id of -1 gives some finite numbers, for the caller to mask.

        Returns:
            Keys (Hkv, ..., head_dim) and values (Hkv, ..., value_head_dim), in the layout's dtype.

        Raises:
            MemoryMismatchError: an id that was never given out, or a wrong shape.
            StoreError: the store keeps no rows.
        """
        self._check_keeps_rows()
        layer = checked_layer(self.layout, layer_idx)
        check_ids(layer, ids, self._store.rows.num_rows)
        rows = self.searcher.gather(layer_idx, ids)
        return rows[..., : layer.head_dim], rows[..., layer.head_dim :]

    def fetch_layers(self, ids: torch.Tensor) -> LayerParts:
        """Return the keys and values of rows at every layer, with one message a shard.

        Args:
            ids: (...) int64, the same for all KV heads; -1 as for `fetch`.

        Returns:
            Layer -> keys (Hkv, ..., head_dim) and values (Hkv, ..., value_head_dim).

        Raises:
            MemoryMismatchError: an id that was never given out.
            StoreError: the store keeps no rows, and there is no `row_source`.
        """
        check_ids(LayerLayout(1, 1, 1), ids[None], self._store.rows.num_rows)
        if not self.keeps_rows and self.row_source is not None:
            return self.row_source(self, ids)
        self._check_keeps_rows()
        parts = {}
        for layer_idx, rows in self.searcher.gather_layers(ids).items():
            head_dim = self.layout.layers[layer_idx].head_dim
            parts[layer_idx] = rows[..., :head_dim], rows[..., head_dim:]
        return parts

    def sampled_queries(self, layer_idx: int) -> torch.Tensor:
        """Return the kept sample of the stored tokens' queries.

        Returns:
            (Hkv, s, G, head_dim) float32 on the CPU, as the model compares them with keys; the
            G = H / Hkv query heads of a group share a KV head. (Hkv, 0, 1, head_dim) if none are
            kept.

        Raises:
            MemoryMismatchError: a layer that is not the layout's.
            StoreError: samples are damaged.
        """
        checked_layer(self.layout, layer_idx)
        return self._store.samples.grouped(layer_idx)

    def __len__(self) -> int:
        """Rows that a search may find."""
        return len(self._rows)

    def num_searchable(self, scope: Scope | None = None) -> int:
        """Return how many rows a search of a scope may find."""
        return self._rows.count(scope)

    def choose_rows(self, ids: Int64Array) -> None:
        """Let searches find these rows and no others from now on, whatever the catalogue says.

        It is for a shard, whose rows that can be found are those of a memory with other shards.

        Args:
            ids: (n,) int64, ascending.
        """
        self._rows.choose(ids)
        self._rows_changed()

    # -- writing --------------------------------------------------------------------------------

    def add(self, document: Document, rows: Iterable[Rows], *, replace: bool = False) -> range:
        """Store a document and its rows, all or nothing.

        Whatever is raised, by `rows` too, the memory is as it was before.

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
        rows when the iterator has ended, or is closed. It raises what `add` raises, and whatever
        `documents` raises; the documents complete before the one that failed are committed, and
        yielded before the error is raised.

        Args:
            documents: each with its rows, as for `add`.
            replace: as for `add`; a later document also takes the place of an earlier one.
            rows_per_commit: commit as soon as so many rows wait.

        Yields:
            Name and row ids of each document, after it was committed.
        """
        with self.batch(replace=replace) as batch:
            for added in written(batch, documents, rows_per_commit):
                yield from added

    @contextlib.contextmanager
    def batch(self, *, replace: bool = False) -> Iterator[DocumentBatch]:
        """Lock the memory for a `with` block, and yield a batch, which may be committed many times.

        Searches of this object find the new rows when the block has ended. The batch raises what
        `add` raises.
        """
        with self._writing():
            num_rows = self.catalog.num_rows
            try:
                yield self._store.batch(replace=replace)
            finally:
                if self.catalog.num_rows != num_rows:
                    self._changed()

    def remove(self, ids: Iterable[int]) -> None:
        """Remove single rows; no other row changes its id.

        Raises:
            MemoryMismatchError: an id that was never given out.
        """
        with self._writing():
            self._store.remove_rows(ids)
            self._changed()

    def remove_document(self, name: str) -> int:
        """Remove a document and its rows; return how many rows it had.

        Raises:
            DocumentError: there is no document of that name.
        """
        with self._writing():
            removed = self._store.remove_document(name)
            self._changed()
        return removed

    def set_metadata(self, name: str, metadata: Metadata) -> None:
        """Give a document metadata, in place of what it has; also while documents are added.

        Raises:
            DocumentError: there is no document of that name, or this is no metadata.
        """
        self._store.set_metadata(name, metadata)

    def clear(self) -> None:
        """Remove everything. Ids are not used again."""
        with self._writing():
            self._store.remove_all()
            self._changed()

    def set_setting(self, key: str, value: Any) -> None:
        """Keep a setting of the caller's, plain JSON types, by a key the store does not use."""
        with self._writing():
            self.catalog.set_setting(key, value)

    def write_derived(self, name: str, parts: Sequence[bytes | memoryview]) -> None:
        """Keep what the caller derives from rows in a file of the store; in RAM it is not kept."""
        with self._writing():
            if self.catalog.path is not None:
                with reported(self.path):
                    write_derived(self.catalog.path.parent, name, parts)

    def read_derived(self, name: str) -> memoryview | None:
        """Return what `write_derived` has kept; None if there is nothing, or it is damaged."""
        path = self.catalog.path
        return None if path is None else read_derived(path.parent, name)

    # -- keeping --------------------------------------------------------------------------------

    def save(self, path: Path | str | None = None) -> None:
        """Write the memory to a store directory that every backend opens, with its index files.

        A copy can be written of a store that cannot.

        Args:
            path: a directory that does not exist or is empty; None for the memory's own path.

        Raises:
            StoreError: the memory has no path and none is given, or there is something at `path`.
        """
        if path is None and (self.path is None or self._is_temporary):
            raise StoreError(
                "this memory has no path. Give save() one, or set `path` in the config."
            )
        own = None if self.path is None else self.path.resolve()
        if path is not None and Path(path).resolve() != own:
            self._save_copy(check_free(Path(path)))
        elif self.searcher.keeps_files and not (self.is_read_only and self.searcher.has_written):
            with self._writing():
                self._changed()  # another process may have written
                self.searcher.write_files()
        elif self.catalog.path is None:
            with self._writing():  # makes the store, which has nothing in it yet
                pass

    def refresh(self) -> None:
        """See what other processes have committed by now: new documents, and removed ones.

        Raises:
            StoreReplacedError: the store was removed, or another one has taken its place. What was
                read before can still be searched.
            StoreError: the store is damaged, or a thread is writing to this memory.
        """
        self._store.check_idle()
        self._refresh()

    def compact(self) -> int:
        """Give the space of removed documents back to the disk. No row changes its id.

        Returns:
            Bytes given back, as the file system counts them: 0 for a memory in RAM, and on file
            systems without sparse files, whose files keep their size.
        """
        if self.catalog.path is None:
            return 0
        with self._writing(), reported(self.path):
            return self._store.compact()

    # -- index files ----------------------------------------------------------------------------

    def index_heads(self, heads: Mapping[int, Sequence[int]] | None) -> None:
        """Choose which heads the next `save` writes index files for, if the searcher has files.

        A store that is not made yet keeps their keys more finely, if it has the codec "int5.5".

        Args:
            heads: layer -> KV heads; None for all that the options name.

        Raises:
            MemoryMismatchError: the layout has no such layer or head, or a store of codec "text"
                keeps no keys of one.
        """
        if not self.keeps_rows and self.catalog.path is not None:
            self._check_kept(heads)
        self.searcher.index_heads(heads)
        self._heads = heads
        self._store.choose_fine_heads(heads or {})

    def rebuild(self) -> None:
        """Make index files anew from the rows, if the searcher has files."""
        with self._writing():
            self._changed()
            if self.catalog.path is not None:
                with reported(self.path):
                    remove_derived(self.catalog.path.parent)
            self.searcher.rebuild_files()

    @property
    def lacks_files(self) -> bool:
        """Whether the store has index files, but not of all heads that are to have them."""
        return self.searcher.lacks_files

    @property
    def searches_exactly(self) -> bool:
        """Whether every query is compared with every row, which needs no index to be built."""
        return self.searcher.searches_exactly

    # -- plumbing -------------------------------------------------------------------------------

    def _checked(self, layer_idx: int, queries: torch.Tensor, k: int, heads: Heads) -> Heads:
        """Return the heads of a search; refuse what `search` refuses."""
        layer = checked_layer(self.layout, layer_idx)
        chosen = None if heads is None else check_heads(layer, layer_idx, heads)
        check_search(layer, queries, k, chosen)
        if not self.keeps_rows:
            self._check_kept(None if chosen is None else {layer_idx: chosen})
        return chosen

    def _check_keeps_rows(self) -> None:
        if not self.keeps_rows:
            raise StoreError(
                f"the store at '{self.path}' keeps text and no rows (row_codec 'text'), so nothing "
                "can read single memories of it. Recall passages (mode 'passage'), which the model "
                "reads again, or index the documents with another row_codec."
            )

    def _check_kept(self, heads: Mapping[int, Sequence[int]] | None) -> None:
        """Refuse heads of which a store without rows keeps no keys."""
        kept = self.catalog.fine_heads
        if heads is not None and all(
            set(of_layer) <= set(kept.get(layer_idx, ())) for layer_idx, of_layer in heads.items()
        ):
            return
        asked = "all" if heads is None else _plain(heads)
        raise MemoryMismatchError(
            f"a store without rows (row_codec 'text') searches the KV heads {_plain(kept)}, whose "
            f"keys it keeps; got {asked}. Use the head profile that it was made with, or index the "
            "documents again."
        )

    def _refresh(self) -> None:
        changed = self._store.open_if_made()
        with self.catalog.snapshot():
            changed = self._store.refresh() or changed
            if changed:
                self._rows.read()
        if changed:  # what takes long must not keep a writer waiting
            self._rows_changed()

    def _changed(self) -> None:
        self._rows.read()
        self._rows_changed()

    def _rows_changed(self) -> None:
        self._rows.scopes.clear()
        self.num_changes += 1
        were_coded = self._wait_to_be_coded and not self._store.rows_wait_to_be_coded
        self._wait_to_be_coded = self._store.rows_wait_to_be_coded
        if were_coded:  # what the searcher has read is not what is stored now
            self.searcher.close()
            self.searcher = type(self.searcher)(self._rows, self._search_options)
            if self._heads is not None:
                self.searcher.index_heads(self._heads)
        else:
            self.searcher.rows_changed()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Let one thread of one process write, to a store that is there and up to date."""
        before = self.catalog
        with self._store.writing():
            self._refresh()
            if self.catalog is not before:  # the store was made just now, maybe by someone else
                self._changed()
            try:
                yield
            except KeyboardInterrupt:  # only the catalogue knows whether that was after a commit
                self._store.refresh()
                self._store.show_committed(anew=True)
                self._changed()
                raise

    @contextlib.contextmanager
    def _unchanging(self) -> Iterator[None]:
        """Let no thread and no process change the store in a `with` block."""
        is_replaced = self._store.is_replaced  # then nobody else has its files
        if not (self.is_read_only or is_replaced):
            with self._writing():
                yield
            return
        self._store.check_idle()
        with self.catalog.snapshot():  # no writer's commit can pass it
            if not is_replaced:
                self._refresh()
            yield

    def _save_copy(self, directory: Path) -> None:
        with self._unchanging(), reported(directory):
            self._store.copy_to(directory)
        if self.searcher.keeps_files:
            options = self.searcher.options_of_copy()
            names = [field.name for field in dataclasses.fields(options)]
            given = {name: getattr(options, name) for name in names}
            given |= {"path": directory, "sinks": self.sinks}
            copy = MemoryBackend(self.layout, self.memory_type, **given)
            with contextlib.closing(copy):
                copy.save()


def _plain(heads: Mapping[int, Sequence[int]]) -> dict[int, list[int]]:
    return {layer_idx: list(of_layer) for layer_idx, of_layer in heads.items()}
