"""The catalogue of a memory: settings, documents and removed rows, in one SQLite database.

A row id is the row's position in the order of writing. The catalogue says which ids are published
(`num_rows`), which document owns each, and which are removed. One transaction publishes documents
together with their rows, so a reader sees all of them or nothing. A reader sees the documents that
there were when it last called `refresh`, less those removed since. `Catalog.in_memory` keeps the
same tables in RAM for memories that are never saved.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sqlite3
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from memory_backends import schema
from memory_backends.database import FILE_NAME as FILE_NAME
from memory_backends.database import (
    FORMAT_VERSION,
    as_store_error,
    check_size,
    check_version,
    connect,
    connect_to,
    transaction,
)
from memory_backends.document_table import (
    delete_document,
    insert_document,
    insert_samples,
    keep_one_set_of_sinks,
    read_sinks,
    write_row_checksums,
)
from memory_backends.errors import DocumentError, MemoryMismatchError, StoreError
from memory_backends.layout import Int64Array, MemoryLayout, Metadata, StoredDocument
from memory_backends.metadata import (
    Where,
    check_metadata,
    check_where,
    delete_metadata,
    matches,
    read_metadata,
    write_metadata,
)
from memory_backends.queries import SampledLayer
from memory_backends.records import COLUMNS, NewDocument, RecordSpan, from_record, unpack_crc32
from memory_backends.row_coding import record_bytes
from memory_backends.scope import Scope

_MAX_ROWS = 2**48


class Catalog:
    """Settings, documents and removed rows of one memory. Safe to share between threads.

    Attributes:
        path: the database file; None if it is in RAM.
        layout: the shape of the rows.
        identity: what the model that writes the rows looks like, as plain JSON types.
        row_codec: how rows become records; see `codecs.row_codec`.
        bytes_per_row: of one token's records in all layers.
        num_rows: rows published when last refreshed, removed ones included: the next gets this id.
    """

    def __init__(self, connection: sqlite3.Connection, path: Path | None) -> None:
        self._connection = connection
        self._lock = threading.RLock()
        self.path = path
        weakref.finalize(self, connection.close)
        self.layout = MemoryLayout.from_json(self.setting("layout"))
        self.identity: Mapping[str, Any] = self.setting("identity")
        if not isinstance(self.identity, dict):
            raise MemoryMismatchError(f"not an identity: {self.identity!r:.200}")
        self.row_codec = str(self.setting("row_codec"))
        self.bytes_per_row = sum(record_bytes(self.layout, self.row_codec).values())
        self._version = -1
        self.num_rows = 0
        self.refresh()

    @classmethod
    def in_memory(
        cls, layout: MemoryLayout, identity: Mapping[str, Any], row_codec: str = "exact"
    ) -> Catalog:
        """Make an empty catalogue that lives in RAM.

        Raises:
            MemoryMismatchError: there is no such codec.
        """
        connection = connect_to(":memory:")
        with transaction(connection):
            schema.create_tables(connection)
            for key, value in {
                "format_version": FORMAT_VERSION,
                "layout": layout.to_json(),
                "identity": dict(identity),
                "row_codec": row_codec,
                "num_rows": 0,
            }.items():
                schema.write_setting(connection, key, value)
        return cls(connection, None)

    @classmethod
    def open(cls, directory: Path) -> Catalog:
        """Open the catalogue in `directory`; documents are not read.

        Raises:
            StoreError: there is none, it is not one of ours, it is damaged, an older emt wrote it
                and it needs `upgrade`, or a newer one did.
        """
        path = directory / FILE_NAME
        with contextlib.ExitStack() as on_error:
            connection = connect(directory)
            on_error.callback(connection.close)
            with as_store_error(path):
                check_version(connection, directory)
                check_size(connection, path)
                schema.check_schema(connection)
                try:
                    catalog = cls(connection, path)
                except MemoryMismatchError as error:
                    raise StoreError(f"'{path}' is damaged: {error}") from error
            on_error.pop_all()
        return catalog

    @property
    def connection(self) -> sqlite3.Connection:
        """The database, for those who check or convert it; use it within a `snapshot`."""
        return self._connection

    def close(self) -> None:
        """Close the database; the object is of no use afterwards."""
        self._connection.close()

    def refresh(self) -> bool:
        """See what is published by now; tell whether another process has changed something."""
        with self.snapshot():
            (version,) = self._connection.execute("PRAGMA data_version").fetchone()
            found = schema.read_setting(self._connection, "num_rows")
            if type(found) is not int or not 0 <= found < _MAX_ROWS:
                raise StoreError(f"the catalogue '{self.path}' is damaged: it has {found!r} rows.")
            changed = version != self._version or found != self.num_rows
            self._version, self.num_rows = version, found
        return changed

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[None]:
        """Read one state of the database, whatever other processes write meanwhile."""
        with self._lock, as_store_error(self.path):
            if self._connection.in_transaction:
                yield
                return
            self._connection.execute("BEGIN")
            try:
                yield
            finally:
                self._connection.rollback()

    def copy_to(
        self,
        directory: Path,
        row_crc32: Mapping[str, Mapping[int, int]],
        codec_states: Mapping[int, bytes] | None = None,
    ) -> None:
        """Write the catalogue to another directory, without the settings of an index.

        Args:
            directory: has the rows already; with the catalogue it becomes a store.
            row_crc32: document -> layer -> crc32 of its rows' records in that directory.
            codec_states: layer -> what the codec learned there, if not here before.

        Raises:
            StoreError: the directory cannot be written.
        """
        path = directory / FILE_NAME
        partial = directory / (FILE_NAME + ".partial")
        with as_store_error(path), self._lock:
            partial.unlink(missing_ok=True)
            with contextlib.closing(connect_to(partial)) as target:
                self._connection.backup(target)
                with transaction(target):
                    target.execute("DELETE FROM settings WHERE key = 'index'")
                    for name, checksums in row_crc32.items():
                        write_row_checksums(target, name, checksums)
                    schema.write_codec_states(target, codec_states or {})
            partial.replace(path)

    def copy_in_memory(self) -> Catalog:
        """Return a copy of the catalogue that lives in RAM."""
        connection = connect_to(":memory:")
        with self._lock, as_store_error(self.path):
            self._connection.backup(connection)
        return Catalog(connection, None)

    def check_identity(self, identity: Mapping[str, Any]) -> None:
        """Refuse a model that did not write this memory.

        Fields that only one of the two has, such as a tokenizer, are not compared.

        Raises:
            MemoryMismatchError: naming every field that differs.
        """
        where = "memory" if self.path is None else f"memory at '{self.path.parent}'"
        wrong = [
            f"{key}: the memory has {self.identity[key]!r}, this model {identity[key]!r}"
            for key in sorted(self.identity.keys() & identity.keys())
            if self.identity[key] != identity[key]
        ]
        if wrong:
            raise MemoryMismatchError(
                f"{where} was written by another model; " + "; ".join(wrong) + ". "
                "Load the model that wrote it, or index the documents again with this one."
            )

    # -- settings -------------------------------------------------------------------------------

    def setting(self, key: str) -> Any:
        """Return a setting as plain JSON types, or None.

        Raises:
            StoreError: it is damaged.
        """
        with self._lock, as_store_error(self.path):
            return schema.read_setting(self._connection, key)

    def set_setting(self, key: str, value: Any) -> None:
        """Store a setting (plain JSON types)."""
        with self._transaction():
            schema.write_setting(self._connection, key, value)

    # -- documents ------------------------------------------------------------------------------

    def publish(
        self,
        documents: Sequence[NewDocument],
        *,
        query_heads: Mapping[int, int] | None = None,
        codec_states: Mapping[int, bytes] | None = None,
        replace: bool = False,
    ) -> list[range]:
        """Make documents and their rows visible, in one transaction.

        Args:
            documents: in the order of their rows, which are those after `num_rows`.
            query_heads: layer -> query heads, of the layers that get their first samples.
            codec_states: layer -> what the codec learned from these rows, if they are the first.
            replace: remove the documents of those names first, in the same transaction.

        Returns:
            The ids of each document's rows.

        Raises:
            DocumentError: a name is taken and `replace` is False.
        """
        ids = []
        with self._transaction():
            first = int(schema.read_setting(self._connection, "num_rows"))
            sampled = self.query_samples()
            schema.write_codec_states(self._connection, codec_states or {})
            for new in documents:
                if replace:
                    delete_document(self._connection, new.document.name)
                insert_document(self._connection, new, first)
                insert_samples(self._connection, new.samples, sampled, query_heads or {})
                ids.append(range(first, first + len(new.row_tokens)))
                first = ids[-1].stop
            if any(new.samples for new in documents):
                schema.write_setting(self._connection, "query_samples", sampled)
            schema.write_setting(self._connection, "num_rows", first)
        self.num_rows = first
        return ids

    def document_names(self) -> list[str]:
        """Return the names of all documents, in the order they were written."""
        return [name for name, _, _ in self.document_sizes()]

    def has_document(self, name: str) -> bool:
        """Tell whether a document of that name is in the memory."""
        return bool(self._visible("1", "AND name = ?", name))

    def content_hash(self, name: str) -> str | None:
        """Return the `content_hash` of the document of that name, or None if there is none."""
        found = self._visible("content_hash", "AND name = ?", name)
        return str(found[0][0]) if found else None

    def document(self, name: str) -> StoredDocument:
        """Read one document with its text, token ids, offsets and metadata.

        Raises:
            DocumentError: there is none of that name: never was, or it was removed or replaced by
                another process.
            StoreError: its record is damaged.
        """
        with self.snapshot():
            found = self._visible(f"{COLUMNS}, crc32", "AND name = ?", name)
            if not found:
                raise _no_document(name)
            document = from_record(found[0], self.num_rows)
            known = dict(read_metadata(self._connection, document.first_row))
        return dataclasses.replace(document, metadata=known.get(document.first_row, {}))

    def metadata(self, name: str) -> Metadata:
        """Return what is known of a document; {} if nothing is.

        Raises:
            DocumentError: there is none of that name.
            StoreError: the record is damaged.
        """
        with self.snapshot():
            found = self._visible("first_row", "AND name = ?", name)
            if not found:
                raise _no_document(name)
            (first,) = found[0]
            return dict(read_metadata(self._connection, first)).get(first, {})

    def set_metadata(self, name: str, metadata: Metadata) -> None:
        """Store what is known of a document, in place of what was.

        Raises:
            DocumentError: there is none of that name, or it is no metadata.
        """
        check_metadata(metadata, name)
        with self._transaction():
            found = self._visible("first_row", "AND name = ?", name)
            if not found:
                raise _no_document(name)
            write_metadata(self._connection, found[0][0], metadata)

    def scope(
        self,
        documents: Iterable[str] | None = None,
        where: Where | None = None,
        *,
        known: bool = True,
    ) -> Scope:
        """Return the rows of documents, for searches of these alone.

        Args:
            documents: their names; None for all.
            where: of these, the ones whose metadata has, for every key, the value, or one of the
                values; None for all.
            known: refuse names that are not there, instead of leaving them out.

        Raises:
            DocumentError: a name is unknown, or `where` is not a filter.
            StoreError: a record of metadata is damaged.
        """
        wanted = None if where is None else check_where(where)
        with self.snapshot():
            if documents is None:
                spans = self._visible("first_row, first_row + num_rows", "")
            else:
                spans = []
                for name in dict.fromkeys(documents):
                    columns = "first_row, first_row + num_rows"
                    found = self._visible(columns, "AND name = ?", name)
                    if not found and known:
                        raise _no_document(name)
                    spans += found
            if wanted:
                all_known = dict(read_metadata(self._connection))
                spans = [span for span in spans if matches(all_known.get(span[0], {}), wanted)]
        return Scope.of((int(first), int(stop)) for first, stop in spans)

    def document_sizes(self) -> list[tuple[str, int, int]]:
        """Return (name, tokens, rows) of every document, in the order they were written."""
        found = self._visible("name, num_tokens, num_rows", "ORDER BY first_row")
        with as_store_error(self.path):
            return [(str(name), int(tokens), int(rows)) for name, tokens, rows in found]

    def document_of_rows(self, ids: Iterable[int]) -> dict[int, str]:
        """Return the name of the document that owns each row; rows without one are left out."""
        owners: dict[int, str] = {}
        name, first, stop = "", 0, 0
        with self.snapshot():
            for row in sorted({int(row) for row in ids}):
                if row >= stop:  # else in the span of the row before
                    order = "AND first_row <= ? ORDER BY first_row DESC LIMIT 1"
                    found = self._visible("name, first_row, num_rows", order, row)
                    if not found:
                        continue
                    name, first, stop = found[0][0], found[0][1], found[0][1] + found[0][2]
                if first <= row < stop:
                    owners[row] = str(name)
        return owners

    # -- rows -----------------------------------------------------------------------------------

    def record_spans(self) -> Iterator[RecordSpan]:
        """Yield where each document's rows are, ascending, with the checksums of their records."""
        for name, first, rows, crc32 in self._visible(
            "name, first_row, num_rows, row_crc32", "ORDER BY first_row"
        ):
            with as_store_error(self.path):
                yield RecordSpan(str(name), first, first + rows, unpack_crc32(crc32))

    def query_samples(self) -> dict[int, SampledLayer]:
        """Return layer -> its query heads and samples, of the layers that have some.

        Raises:
            StoreError: it is damaged.
        """
        found = self.setting("query_samples") or {}
        sampled = {int(layer_idx): SampledLayer(*numbers) for layer_idx, numbers in found.items()}
        for layer_idx, (num_heads, num_samples) in sampled.items():
            if layer_idx not in self.layout.layers or not (
                0 < num_heads < 2**16 and 0 < num_samples <= self.num_rows
            ):
                raise StoreError(
                    f"the catalogue '{self.path}' is damaged: layer {layer_idx} has "
                    f"{num_samples} samples of {num_heads} query heads."
                )
        return sampled

    def codec_state(self, layer_idx: int) -> bytes | None:
        """Return what the codec learned of a layer; None if there was no document to learn from.

        Raises:
            StoreError: it is damaged, or missing.
        """
        with self.snapshot():
            return schema.read_codec_state(self._connection, layer_idx)

    def remove_document(self, name: str) -> int:
        """Remove a document; its rows are never found again. Returns how many rows it had.

        Raises:
            DocumentError: there is none of that name.
        """
        with self._transaction():
            removed = delete_document(self._connection, name)
        if removed is None:
            raise _no_document(name)
        return removed

    def remove_rows(self, ids: Iterable[int]) -> None:
        """Remove single rows; other ids keep their rows and their documents.

        Raises:
            MemoryMismatchError: an id was never published.
        """
        wanted = np.unique(np.fromiter(ids, dtype=np.int64))
        outside = wanted[(wanted < 0) | (wanted >= self.num_rows)]
        if len(outside):
            raise MemoryMismatchError(
                f"row ids must be 0 or more and less than {self.num_rows}, the rows written so "
                f"far; got {outside[:5].tolist()}."
            )
        runs = np.split(wanted, np.flatnonzero(np.diff(wanted) != 1) + 1)  # of consecutive ids
        with self._transaction():
            for run in runs:
                if len(run):
                    schema.write_removed(self._connection, int(run[0]), int(run[-1]) + 1)

    def remove_all(self) -> None:
        """Remove every document and row. Ids are not used again."""
        with self._transaction():
            self._connection.execute("DELETE FROM documents")
            delete_metadata(self._connection)
            schema.write_removed(self._connection, 0, self.num_rows)

    def searchable_rows(self, sinks: str, scope: Scope | None = None) -> Int64Array:
        """Return the ids that a search may find, ascending.

        Args:
            sinks: "all" for every row; "one" leaves out the attention sinks of all documents but
                the first that still has some, so that the memory has exactly one set of them.
            scope: leave out all others, as if they were not there; None for all rows.

        Raises:
            StoreError: a record is damaged.
        """
        with self.snapshot():
            searchable = np.ones(self.num_rows, dtype=bool)
            for first, stop in schema.read_removed(self._connection):
                searchable[first:stop] = False
            if scope is not None:
                searchable &= scope.mask(self.num_rows)
            if sinks == "one":
                keep_one_set_of_sinks(self._connection, searchable)
        return np.flatnonzero(searchable)

    def sink_rows(self) -> Int64Array:
        """Return the ids of all documents' attention sinks, ascending.

        Raises:
            StoreError: a record is damaged.
        """
        with self.snapshot():
            found = read_sinks(self._connection, self.num_rows)
            return np.concatenate([np.empty(0, dtype=np.int64), *found])

    def vacuum(self) -> None:
        """Join removed spans that touch, and give the space of what was removed back.

        Raises:
            StoreError: the disk is full; everything is as before.
        """
        with self._transaction():
            spans = list(schema.read_removed(self._connection))
            self._connection.execute("DELETE FROM removed")
            for first, stop in schema.joined(spans):
                schema.write_removed(self._connection, first, stop)
        with self._lock, as_store_error(self.path):
            self._connection.execute("VACUUM")

    # -- plumbing -------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock, as_store_error(self.path), transaction(self._connection):
            yield

    def _visible(self, columns: str, rest: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """Read documents among those that there were when last refreshed."""
        query = f"SELECT {columns} FROM documents WHERE first_row < ? {rest}"
        with self._lock, as_store_error(self.path):
            return self._connection.execute(query, (self.num_rows, *parameters)).fetchall()


def _no_document(name: str) -> DocumentError:
    return DocumentError(f"no document '{name}' in this memory. `emt info` lists the documents.")
