"""`ShardedStore`: one catalogue over rows that are in several stores."""

from __future__ import annotations

import contextlib
import logging
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import numpy as np

from memory_backends.backend import MemoryBackend
from memory_backends.catalog import Catalog, schema
from memory_backends.catalog.database import FILE_NAME as CATALOG_FILE_NAME
from memory_backends.catalog.records import NewDocument
from memory_backends.errors import DocumentError, StoreError
from memory_backends.layout import Int64Array, MemoryLayout, Metadata
from memory_backends.rows.append_files import sync_path
from memory_backends.rows.base import RowStorage
from memory_backends.rows.query_samples import QuerySamples
from memory_backends.scope import Scope
from memory_backends.sharded.batch import ShardedBatch
from memory_backends.sharded.options import ShardedOptions, ShardSettings
from memory_backends.sharded.placements import (
    Placement,
    Placements,
    ShardRecord,
    location_of,
    shard_of,
)
from memory_backends.sharded.rows import ShardedRows, ShardedSamples
from memory_backends.sharded.shards import FINGERPRINT, Shards
from memory_backends.store import Store
from memory_backends.store.derived import copy_derived, remove_derived
from memory_backends.store.directory import SHARDS_FILE_NAME, SHARDS_PARTIAL
from memory_backends.store.store import DocumentBatch

_logger = logging.getLogger(__name__)
_IS_OLDER = (
    "shard %d of '%s' is an older copy of the one that was written to: %d documents that it does "
    "not have are removed. Index them again."
)
_DOCUMENTS_AT_ONCE = 256  # adopted in one transaction


class Adopted(NamedTuple):
    """How many documents a memory has taken over from its shards, and given up with them."""

    new: int
    removed: int


class ShardedStore(Store):
    """A catalogue of all documents, and the shards that have their rows.

    Whatever is changed is changed in the shard first. `adopt` brings the catalogue up to date; it
    is called before each change, so that it also ends a change that was interrupted.

    Args:
        layout: as for `Store`, and so are path, identity and row_codec.
        path: the store's directory.
        identity: of the model.
        row_codec: of the shards of a new store.
        options: how many shards a new store has, and how shards are opened.

    Attributes:
        adopted: what the last `writing` has found in the shards.
    """

    def __init__(
        self,
        layout: MemoryLayout,
        path: Path | None,
        identity: Mapping[str, Any],
        row_codec: str,
        options: ShardedOptions,
    ) -> None:
        if path is None:
            raise StoreError("a memory with shards needs a path. Give it one.")
        self._options = options
        self.adopted = Adopted(0, 0)
        self._has_adopted = False
        self._changed_shards: set[int] = set()
        self._locks = contextlib.ExitStack()
        super().__init__(layout, path, identity, torch.device("cpu"), row_codec)

    # -- the shards -----------------------------------------------------------------------------

    @property
    def sharded_rows(self) -> ShardedRows | None:
        """The rows; None as long as there is no store."""
        return self.rows if isinstance(self.rows, ShardedRows) else None

    @property
    def shards(self) -> Shards:
        """The shards of a store that is there."""
        assert isinstance(self.rows, ShardedRows)
        return self.rows.shards

    @property
    def num_shards(self) -> int:
        """How many shards there are, or will be."""
        rows = self.sharded_rows
        return self._options.num_shards if rows is None else len(rows.shards)

    def shard_of(self, name: str) -> int:
        """Return the shard that a document of this name belongs to."""
        return shard_of(name, self.num_shards)

    def shard_path(self, number: int) -> Path:
        """Return where a shard is."""
        return self.shards.location(number)

    @property
    def missing_shards(self) -> tuple[int, ...]:
        """The shards that are not there."""
        rows = self.sharded_rows
        return () if rows is None else tuple(sorted(rows.shards.missing))

    def searchable_rows(self, sinks: str, scope: Scope | None = None) -> Int64Array:
        """Return the ids that a search may find: none of missing shards."""
        ids = super().searchable_rows(sinks, scope)
        rows, missing = self.sharded_rows, self.missing_shards
        return ids if rows is None or not missing else ids[~rows.placements.is_in(ids, missing)]

    # -- adopting -------------------------------------------------------------------------------

    def adopt(self) -> Adopted:
        """Make the catalogue say what the shards have; return what has changed.

        The store must be `writing`. Documents that the shards have anew get new rows, in the order
        of shards and of their rows there; those that a shard has no more are removed.

        Raises:
            ShardMissingError: a shard is not there.
            StoreError: a shard has a document that does not belong to it.
        """
        rows = self.sharded_rows
        if rows is None:
            return Adopted(0, 0)
        super().refresh()
        num_new = num_removed = 0
        changed = []
        for number in range(self.num_shards):
            shard = self.shards.local(number)
            if number in self._changed_shards:
                shard.refresh()
                changed.append((number, shard))
            elif shard.store.refresh():
                changed.append((number, shard))
        own_rows = self._rows_in_shards() if changed else []
        metadata = self.catalog.all_metadata() if changed else {}
        for number, shard in changed:
            new, gone = self._compared(number, shard, own_rows[number])
            for names in _batched(new):
                self._take_over([(number, name) for name in names])
            if max(own_rows[number].values(), default=-1) >= shard.catalog.num_rows:
                _logger.warning(_IS_OLDER, number, self.path, len(gone))
            for name in gone:
                self.catalog.remove_document(name)
            self._adopt_changes(number, shard, metadata, set(new))
            self._changed_shards.discard(number)
            num_new, num_removed = num_new + len(new), num_removed + len(gone)
        self._has_adopted |= bool(num_new or num_removed)
        return Adopted(num_new, num_removed)

    def _rows_in_shards(self) -> list[dict[str, int]]:
        """Return for each shard the memory's documents in it, with their first rows there."""
        spans = list(self.catalog.record_spans())
        firsts = np.array([span.first for span in spans], dtype=np.int64)
        located = cast(ShardedRows, self.rows).placements.locate(firsts)
        own_rows: list[dict[str, int]] = [{} for _ in range(self.num_shards)]
        for span, number, row in zip(spans, *located, strict=True):
            if number >= 0:  # else its placement is lost, and what its shard has is adopted anew
                own_rows[number][span.name] = int(row)
        return own_rows

    def _compared(
        self, number: int, shard: MemoryBackend, own: Mapping[str, int]
    ) -> tuple[list[str], list[str]]:
        """Return documents that only the shard has, by row, and those that only the memory has."""
        there = {span.name: span.first for span in shard.catalog.record_spans()}
        for name in there:
            if self.shard_of(name) != number:
                raise StoreError(
                    f"document '{name}' is in shard {number} of '{self.path}'; it belongs to shard "
                    f"{self.shard_of(name)}. Remove it with `emt remove` from '{shard.path}', and "
                    "index it into the sharded store."
                )
        new = [name for name, first in there.items() if own.get(name) != first]
        return new, [name for name in own if name not in there]

    def _adopt_changes(
        self, number: int, shard: MemoryBackend, own: Mapping[str, Metadata], new: set[str]
    ) -> None:
        """Take over metadata and single removed rows of documents that the memory had already."""
        metadata = shard.catalog.all_metadata()
        for name in shard.catalog.document_names():
            if name not in new and metadata.get(name, {}) != own.get(name, {}):
                self.catalog.set_metadata(name, metadata.get(name, {}))
        placements = cast(ShardedRows, self.rows).placements
        with shard.catalog.snapshot():
            spans = list(schema.read_removed(shard.catalog.connection))
        gone = [placements.rows_of(number, np.arange(*span, dtype=np.int64)) for span in spans]
        rows = np.concatenate([np.empty(0, dtype=np.int64), *gone])
        if len(rows):
            rows = np.intersect1d(rows[rows >= 0], self.catalog.searchable_rows("all"))
        if len(rows):
            self.catalog.remove_rows(rows.tolist())
            self._has_adopted = True

    def _take_over(self, documents: Sequence[tuple[int, str]]) -> list[range]:
        """Commit documents, (shard, name), that shards have committed; return their row ids."""
        placements = cast(ShardedRows, self.rows).placements
        first, new, placed = self.catalog.num_rows, [], []
        layers = sorted(self.layout.layers)
        for number, name in documents:
            catalog = self.shards.local(number).catalog
            stored, checksums = catalog.document(name), catalog.row_crc32(name)
            row_crc32 = dict(zip(layers, checksums, strict=True))
            new.append(NewDocument(stored, stored.row_tokens, stored.sink_rows, {}, row_crc32))
            placed.append(Placement(first, number, stored.first_row, len(stored.row_tokens)))
            first += len(stored.row_tokens)
        try:
            placements.add(placed)
            return self.catalog.commit(new, replace=True)
        except BaseException:
            self._changed_shards.update(number for number, _ in documents)
            raise
        finally:
            self.catalog.refresh()
            self.show_committed()

    # -- changing -------------------------------------------------------------------------------

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Let one thread of one process write, to a store that is there and has adopted all."""
        with super().writing(), contextlib.ExitStack() as self._locks:
            self.adopted = self.adopt()
            yield

    def batch(self, *, replace: bool) -> ShardedBatch:
        """Return an empty batch."""

        def begin(number: int) -> DocumentBatch:
            shard = self.shards.local(number)
            self._changed_shards.add(number)  # until the catalogue has what this batch writes
            return self._locks.enter_context(shard.batch(replace=replace))

        def adopt(documents: Sequence[tuple[int, str]]) -> list[range]:
            ids = self._take_over(documents)
            self._changed_shards.difference_update(number for number, _ in documents)
            return ids

        return ShardedBatch(self.shard_of, begin, adopt)

    def remove_document(self, name: str) -> int:
        """Remove a document from its shard, then from the memory."""
        if self.catalog.has_document(name):
            number = self.shard_of(name)
            self._changed_shards.add(number)
            with contextlib.suppress(DocumentError):
                self.shards.local(number).remove_document(name)
            removed = self.catalog.remove_document(name)
            self._changed_shards.discard(number)
            return removed
        return self.catalog.remove_document(name)  # says that there is none

    def remove_rows(self, ids: Iterable[int]) -> None:
        """Remove single rows from the memory, and from their shards."""
        wanted = np.unique(np.fromiter((int(row) for row in ids), dtype=np.int64))
        rows, changed = self.sharded_rows, set()
        if rows is not None and len(wanted) and 0 <= wanted[0] <= wanted[-1] < rows.num_rows:
            for number, own in enumerate(rows.placements.by_shard(wanted)):
                if len(own):
                    changed.add(number)
                    self._changed_shards.add(number)
                    self.shards.local(number).remove(own.tolist())
        self.catalog.remove_rows(wanted.tolist())
        self._changed_shards -= changed

    def remove_all(self) -> None:
        """Remove everything from the shards, then from the memory."""
        for number in range(self.num_shards) if self.sharded_rows is not None else ():
            self._changed_shards.add(number)
            self.shards.local(number).clear()
        self.catalog.remove_all()
        self._changed_shards.clear()

    def set_metadata(self, name: str, metadata: Metadata) -> None:
        """Give a document metadata, in its shard and in the memory."""
        number = self.shard_of(name)
        if self.sharded_rows is not None and self.catalog.has_document(name):
            self._changed_shards.add(number)
            self.shards.local(number).set_metadata(name, metadata)
        self.catalog.set_metadata(name, metadata)

    def compact(self) -> int:
        """Compact each shard, and the catalogue; return the bytes given back."""
        assert self.path is not None
        given_back = sum(self.shards.local(number).compact() for number in range(self.num_shards))
        self.catalog.vacuum()
        remove_derived(self.path)
        return given_back

    def copy_to(self, directory: Path) -> None:
        """Write a copy with as many shards, each in the directory."""
        directory.mkdir(parents=True, exist_ok=True)
        rows = self.sharded_rows
        try:
            if rows is None:
                records = self._make_shards(directory)
                Placements.make(directory, records)
            else:
                for number in range(self.num_shards):
                    target = directory / location_of(number)
                    self.shards.local(number).store.copy_to(target)
                rows.placements.copy_to(directory)
                copy_derived(cast(Path, self.path), directory)
            self.catalog.copy_to(directory, {})  # last: it makes a store of it
            if rows is None:
                (directory / SHARDS_PARTIAL).rename(directory / "shards")
            sync_path(directory)
        except BaseException:
            _remove_parts(directory)
            raise

    # -- opening --------------------------------------------------------------------------------

    def refresh(self) -> bool:
        """See what is committed by now; tell whether anything may have changed."""
        changed = super().refresh() or self._has_adopted
        self._has_adopted = False
        missing = self.missing_shards
        if missing and not changed:  # else they were looked for
            with self.catalog.snapshot():
                self.shards.refresh()
        return changed or missing != self.missing_shards

    def show_committed(self, *, anew: bool = False) -> None:
        """Show the rows that the catalogue has, and forget others."""
        self.rows.show(self.catalog.num_rows, anew=anew)

    def _open_files(self) -> tuple[RowStorage, QuerySamples]:
        if self.path is None or self.catalog.path is None:
            return super()._open_files()
        partial, folder = self.path / SHARDS_PARTIAL, self.path / "shards"
        if partial.exists() and not folder.exists():  # the store was made by a killed process
            partial.rename(folder)
        with self.catalog.snapshot(), contextlib.ExitStack() as on_error:
            self.catalog.refresh()
            placements = Placements(self.path)
            on_error.callback(placements.close)
            options = dict(self._options.shard_options)
            if options.get("cache_bytes") is not None:
                options["cache_bytes"] //= len(placements.shards)
            settings = ShardSettings(self.layout, self._identity, self._options.shard_type, options)
            shards = Shards(self.path, placements.shards, settings, self._options)
            on_error.callback(shards.close)
            rows = ShardedRows(self.layout, placements, shards, self.catalog.num_rows)
            self.check_in_place()
            on_error.pop_all()
        self._changed_shards = set(range(len(shards)))
        return rows, cast(QuerySamples, ShardedSamples(shards))

    def _make_store(self, path: Path) -> Callable[..., None]:
        """Make the store of the first write; return how to take it away if that write fails."""
        is_ours = not (path / CATALOG_FILE_NAME).exists()  # or another process was first
        if is_ours:
            Placements.make(path, self._make_shards(path))
            self.catalog.copy_to(path, {})
            (path / SHARDS_PARTIAL).rename(path / "shards")
            sync_path(path)
            sync_path(path.parent)
        self._use(self._open_catalog())

        def after(error: type[BaseException] | None, *_: object) -> None:
            if error is not None and is_ours and not self.catalog.num_rows:
                self._use(self.catalog.copy_in_memory())
                _remove_parts(path)

        return after

    def _make_shards(self, path: Path) -> list[ShardRecord]:
        """Make empty shards in a folder that is yet to be renamed."""
        folder = path / SHARDS_PARTIAL
        shutil.rmtree(folder, ignore_errors=True)
        own, records = uuid.uuid4().hex, []
        for number in range(self._options.num_shards):
            location = location_of(number)
            record = ShardRecord(number, location, f"{own}-{number}")
            directory = folder / Path(location).name
            directory.mkdir(parents=True)
            catalog = Catalog.in_memory(self.layout, self._identity, self.catalog.row_codec)
            with contextlib.closing(catalog):
                if self.catalog.fine_heads:
                    catalog.choose_fine_heads(self.catalog.fine_heads)
                catalog.set_setting(FINGERPRINT, record.fingerprint)
                catalog.copy_to(directory, {})
            records.append(record)
        return records


def _batched(names: Sequence[str]) -> Iterator[Sequence[str]]:
    for first in range(0, len(names), _DOCUMENTS_AT_ONCE):
        yield names[first : first + _DOCUMENTS_AT_ONCE]


def _remove_parts(path: Path) -> None:
    """Delete what a sharded store consists of, its catalogue first: without it, it is no store."""
    (path / CATALOG_FILE_NAME).unlink(missing_ok=True)
    (path / SHARDS_FILE_NAME).unlink(missing_ok=True)
    for folder in ("shards", SHARDS_PARTIAL):
        shutil.rmtree(path / folder, ignore_errors=True)
    remove_derived(path)
