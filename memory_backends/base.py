"""The contract of a memory backend: add, search, fetch, remove, save, open, len.

A backend holds one row a token: at every layer, `num_key_value_heads` keys and values. A row has
the same id in every layer and head, ids are never used again, and removing rows moves no other.
`search` finds rows, one (layer, KV head) at a time; `fetch` gives their keys and values. Backends
differ in how they search and in where rows live, and in nothing else.

Any number of threads may search one backend at a time, but not while it writes. Any number of
processes may have a store open while one of them writes: the others find what was there when they
opened it, until they `refresh`. Where a memory is kept, and who may write to it, is `store.py`'s;
`search`, `fetch` and all else that reads rows is `row_search.py`'s.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from memory_backends.batch import written
from memory_backends.catalog import Catalog
from memory_backends.codecs import CODEC_NAMES
from memory_backends.compaction import compact
from memory_backends.errors import MemoryMismatchError, StoreError, reported
from memory_backends.layout import Document, MemoryLayout, Rows
from memory_backends.row_search import RowSearch
from memory_backends.row_search import Sinks as Sinks
from memory_backends.scores import Precision as Precision
from memory_backends.scores import SearchResult as SearchResult
from memory_backends.store import Store
from memory_backends.validation import check_directory, check_free

_ROWS_PER_COMMIT = 8192


class MemoryBackend(RowSearch):
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
        self.path = None if path is None else Path(path)
        # Through JSON once, so that what is compared later is what a store gives back.
        known = json.loads(json.dumps(dict(identity or {})))
        super().__init__(Store(layout, self.path, known, self._rows_device, row_codec), sinks)
        self.num_changes = 0

    # -- writing --------------------------------------------------------------------------------

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

    # -- keeping --------------------------------------------------------------------------------

    def save(self, path: Path | str | None = None) -> None:
        """Write the memory to a store directory that every backend opens.

        A copy can be written of a store that cannot.

        Args:
            path: a directory that does not exist or is empty; None for the memory's own path.

        Raises:
            StoreError: there is no path, it is taken, or it cannot be written.
        """
        target = self._copy_target(path)
        if target is not None:
            directory = check_free(target)
            with self._unchanging(), reported(directory):
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

    def close(self) -> None:
        """Let go of files; the object is of no use afterwards."""
        self._store.close()

    @property
    def catalog(self) -> Catalog:
        """The memory's documents and settings."""
        return self._store.catalog

    @property
    def is_read_only(self) -> bool:
        """Whether there is a store, and this process has no permission to write to it."""
        return self._store.is_read_only

    # -- for subclasses -------------------------------------------------------------------------

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

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Let one thread of one process write, to a store that is there and known as it is now."""
        before = self._catalog
        with self._store.writing():
            self._refresh()
            if self._catalog is not before:  # the store was made just now, maybe by someone else
                self._changed()
            yield

    @contextlib.contextmanager
    def _unchanging(self) -> Iterator[None]:
        """Let no thread and no process change the store in a `with` block."""
        if not self.is_read_only:
            with self._writing():
                yield
            return
        self._store.check_idle()
        with self._catalog.snapshot():  # no writer's commit can pass it
            self._refresh()
            yield

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
