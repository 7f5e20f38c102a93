"""The parts of a memory, in a directory or in RAM: catalogue, rows and query samples.

A store is made by its first write; until then the memory is in RAM. Everything that is read by
several calls (row count, removals, mapped files) is read within one snapshot of the catalogue,
whose lock no writer's commit can pass; so no compaction can come between.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from memory_backends.catalog import Catalog
from memory_backends.catalog.database import FILE_NAME as CATALOG_FILE_NAME
from memory_backends.errors import StoreLockedError, StoreReplacedError, reported
from memory_backends.layout import Document, Int64Array, MemoryLayout, Metadata, Rows
from memory_backends.rows import files as row_files
from memory_backends.rows import query_samples as queries
from memory_backends.rows.append_files import sync_path
from memory_backends.rows.base import RowStorage
from memory_backends.rows.coding import CODECS_WITH_FINE_HEADS, RowCoding
from memory_backends.rows.files import RowFiles
from memory_backends.rows.query_samples import QuerySamples
from memory_backends.rows.tensors import RowTensors
from memory_backends.scope import Scope
from memory_backends.store.directory import check_directory, has_no_store
from memory_backends.store.identity import check_identity, check_layout
from memory_backends.store.lock import LOCK_FILE_NAME, write_lock

_logger = logging.getLogger(__name__)
_CONVERTS = (
    "the memory at '%s' was written in %s: its rows are converted to %s as they are read, and new "
    "ones are kept in the memory's dtype."
)
_IS_WRITING = "this memory is being written to already. Let that end first."


class DocumentBatch(Protocol):
    """Documents that are committed together. `num_rows` are the rows that wait to be committed."""

    num_rows: int

    def append(
        self,
        document: Document,
        runs: Iterable[Rows],
        samples: Mapping[int, torch.Tensor] | None = None,
    ) -> None:
        """Put a document and its rows after those before it, all or nothing.

        With it come query samples of another store, layer -> (s, H, head_dim) float16, if any.
        """

    def commit(self) -> list[tuple[str, range]]:
        """Commit the documents, and empty the batch; return names and row ids."""


class Store(ABC):
    """The parts of one memory, and the right to write to them.

    What changes the memory, the abstract methods, is called while the store is `writing`.

    Args:
        layout: the shape of the rows. A store that is opened must have the same. If its rows have
            another dtype, they are converted when they are read and written.
        path: the store's directory; None for a memory in RAM.
        identity: what the model looks like, as plain JSON types.
        device: where rows live that are not in files.
        row_codec: how a new store has its rows; one that is opened keeps its own.

    Raises:
        MemoryMismatchError: the store has another layout or identity, or there is no such codec.
        StoreError: there is something else at `path`, or the store is damaged.
    """

    def __init__(
        self,
        layout: MemoryLayout,
        path: Path | None,
        identity: Mapping[str, Any],
        device: torch.device,
        row_codec: str,
    ) -> None:
        self.layout = layout
        self.path = path
        self._identity = identity
        self._device = device
        self._row_codec = row_codec
        self._thread_writes = threading.Lock()
        self._is_older_copy = False
        self.catalog = self._open_catalog()
        try:
            self.rows, self.samples = self._open_files()
        except BaseException:
            self.catalog.close()
            raise

    # -- changing -------------------------------------------------------------------------------

    @abstractmethod
    def batch(self, *, replace: bool) -> DocumentBatch:
        """Return an empty batch; with `replace`, its documents take the place of namesakes."""

    @abstractmethod
    def remove_document(self, name: str) -> int:
        """Remove a document; return how many rows it had. A DocumentError if there is none."""

    @abstractmethod
    def remove_rows(self, ids: Iterable[int]) -> None:
        """Remove single rows; a MemoryMismatchError if one never was."""

    @abstractmethod
    def remove_all(self) -> None:
        """Remove every document and row."""

    @abstractmethod
    def set_metadata(self, name: str, metadata: Metadata) -> None:
        """Give a document metadata, in place of what it has; a DocumentError if there is none."""

    @abstractmethod
    def compact(self) -> int:
        """Make holes of the rows that no document has; return the bytes given back."""

    @abstractmethod
    def copy_to(self, directory: Path) -> None:
        """Write a copy of the memory to an empty directory, without index files."""

    # -- what is there --------------------------------------------------------------------------

    def searchable_rows(self, sinks: str, scope: Scope | None = None) -> Int64Array:
        """Return the ids that a search may find; see `CatalogReader.searchable_rows`."""
        return self.catalog.searchable_rows(sinks, scope)

    @property
    def missing_shards(self) -> tuple[int, ...]:
        """The shards of a sharded store that are not there; see `ShardedStore`."""
        return ()

    @property
    def is_read_only(self) -> bool:
        """Whether there is a store, and this process has no permission to write to it."""
        if self.path is None or self.catalog.path is None:
            return False
        parts = (self.path, self.catalog.path, self.path / LOCK_FILE_NAME)
        return any(not os.access(part, os.W_OK) and part.exists() for part in parts)

    @property
    def rows_wait_to_be_coded(self) -> bool:
        """Whether rows are kept exactly until there are enough for the codec to learn from."""
        return isinstance(self.rows, RowFiles) and not self.rows.is_learned

    @property
    def is_replaced(self) -> bool:
        """Whether the store was removed, or another one has taken its place."""
        return self._is_older_copy or not self.catalog.is_in_place

    def choose_fine_heads(self, heads: Mapping[int, Sequence[int]]) -> None:
        """Keep the keys of heads that are searched more finely, in a store that is not yet made."""
        if self.catalog.path is None and self._row_codec in CODECS_WITH_FINE_HEADS:
            self.catalog.choose_fine_heads(heads)

    def check_in_place(self) -> None:
        """Raise a StoreReplacedError if the store is not at its path any more."""
        if not self.is_replaced:
            return
        if self.path is None or has_no_store(self.path):
            raise StoreReplacedError(
                f"the store at '{self.path}' was removed since it was opened. Put it back, or open "
                "another one; save() with a new path writes a copy of what was there."
            )
        raise StoreReplacedError(
            f"the store at '{self.path}' was replaced by another one since it was opened. Open it "
            "again (`Memory.refresh` does it)."
        )

    def check_idle(self) -> None:
        """Raise a StoreLockedError if a thread is writing."""
        if self._thread_writes.locked():
            raise StoreLockedError(_IS_WRITING)

    def open_if_made(self) -> bool:
        """Open the store if there was none, and another process has made one since."""
        if self.path is None or self.catalog.path is not None or has_no_store(self.path):
            return False
        self._use(self._open_catalog())
        return True

    def refresh(self) -> bool:
        """See what is committed by now; tell whether anything may have changed.

        Raises:
            StoreReplacedError: the store was removed, or another one has taken its place.
        """
        self.check_in_place()
        with self.catalog.snapshot():
            num_rows = self.catalog.num_rows
            if not self.catalog.refresh():
                return False
            if self.catalog.num_rows < num_rows:  # ids are not used again: an older copy
                self._is_older_copy = True
                self.check_in_place()
            self.show_committed(anew=True)
        return True

    def show_committed(self, *, anew: bool = False) -> None:
        """Show the rows and samples that the catalogue has, and forget others."""
        self.rows.show(self.catalog.num_rows, anew=anew)
        self.samples.show(self.catalog.query_samples())

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Let one thread of one process write, to a store that is there; refuse others."""
        if not self._thread_writes.acquire(blocking=False):
            raise StoreLockedError(_IS_WRITING)
        with contextlib.ExitStack() as locks:
            locks.callback(self._thread_writes.release)
            if self.path is not None:
                with reported(self.path):
                    locks.enter_context(_locked(self.path))
                    if self.catalog.path is None:
                        locks.push(self._make_store(self.path))
            yield

    def close(self) -> None:
        """Let go of files; the object is of no use afterwards."""
        self.rows.close()
        self.samples.close()
        self.catalog.close()

    def _open_catalog(self) -> Catalog:
        if self.path is None or has_no_store(self.path):
            # Until the first write.
            return Catalog.in_memory(self.layout, self._identity, self._row_codec)
        catalog = Catalog.open(check_directory(self.path))
        with contextlib.ExitStack() as on_error:
            on_error.callback(catalog.close)
            check_identity(catalog, self._identity)
            check_layout(catalog, self.layout)
            on_error.pop_all()
        if catalog.layout.dtype != self.layout.dtype:
            _logger.warning(_CONVERTS, self.path, catalog.layout.dtype, self.layout.dtype)
        return catalog

    def _open_files(self) -> tuple[RowStorage, QuerySamples]:
        with self.catalog.snapshot():
            self.catalog.refresh()
            sampled = self.catalog.query_samples()
            if self.path is None or self.catalog.path is None:
                tensors = RowTensors(self.layout, self._device)
                return tensors, QuerySamples(self.layout, None, sampled)
            catalog = self.catalog
            coding = RowCoding(
                catalog.layout,
                catalog.row_codec,
                catalog.codec_state,
                catalog.has_codec_states,
                self.layout.dtype,
                catalog.fine_heads,
            )
            files = RowFiles(self.layout, self.path, catalog.num_rows, coding, self._spans)
            samples = QuerySamples(self.layout, self.path, sampled)
            self.check_in_place()  # else the files may be those of another store
            return files, samples

    def _spans(self) -> Iterator[tuple[str, int, int]]:
        """Yield (document, first, stop) of the rows of all documents, ascending."""
        for span in self.catalog.record_spans():
            yield span.name, span.first, span.stop

    def _make_store(self, path: Path) -> Callable[..., None]:
        """Make the store of the first write; return how to take it away if that write fails."""
        is_ours = not (path / CATALOG_FILE_NAME).exists()  # or another process was first
        if is_ours:
            self.catalog.copy_to(path, {})
            sync_path(path)
            sync_path(path.parent)
        self._use(self._open_catalog())

        def after(error: type[BaseException] | None, *_: object) -> None:
            if error is not None and is_ours and not self.catalog.num_rows:
                self._use(self.catalog.copy_in_memory())
                (path / CATALOG_FILE_NAME).unlink()  # first: without it, it is not a store
                for folder in (row_files.FOLDER, queries.FOLDER, "index"):
                    shutil.rmtree(path / folder, ignore_errors=True)

        return after

    def _use(self, catalog: Catalog) -> None:
        self.catalog.close()
        self.rows.close()
        self.samples.close()
        self.catalog = catalog
        self.rows, self.samples = self._open_files()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the write lock of the store at `path`; take a directory that it made away if unused."""
    is_new = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    with write_lock(path):
        try:
            yield
        finally:
            if is_new and has_no_store(path):  # the first write failed
                shutil.rmtree(path, ignore_errors=True)
