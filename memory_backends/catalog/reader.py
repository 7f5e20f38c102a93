"""Reading a catalogue: its settings, documents and rows, as of one snapshot.

A reader sees the documents that there were when it last called `refresh`, less those removed since.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sqlite3
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from memory_backends.catalog import schema
from memory_backends.catalog.database import as_store_error, file_id
from memory_backends.catalog.documents import keep_one_set_of_sinks, read_sinks
from memory_backends.catalog.metadata import Where, check_where, matches, read_metadata
from memory_backends.catalog.records import COLUMNS, RecordSpan, from_record, unpack_crc32
from memory_backends.errors import DocumentError, MemoryMismatchError, StoreError
from memory_backends.layout import Int64Array, MemoryLayout, Metadata, StoredDocument
from memory_backends.rows.coding import fine_heads_of, record_bytes
from memory_backends.rows.query_samples import SampledLayer
from memory_backends.scope import Scope

_MAX_ROWS = 2**48
_SPAN = "first_row, first_row + num_rows"


class CatalogReader:
    """The half of a `Catalog` that changes nothing. Safe to share between threads.

    Attributes:
        connection: the database, closed with this object; use it within a `snapshot`.
        path: the database file; None if it is in RAM.
        layout: the shape of the rows.
        identity: what the model that writes the rows looks like, as plain JSON types.
        row_codec: how rows become records; see `codecs.row_codec`.
        fine_heads: layer -> KV heads whose keys are kept more finely than the codec does.
        bytes_per_row: of one token's records in all layers.
        num_rows: rows committed when last refreshed, removed ones included: the next gets this id.

    Raises:
        MemoryMismatchError: the settings have no valid layout, identity, codec or fine heads.
        StoreError: the database is damaged. Every method raises it if a record that it reads is.
    """

    def __init__(self, connection: sqlite3.Connection, path: Path | None) -> None:
        self.connection = connection
        self._lock = threading.RLock()
        self.path = path
        self._absolute_path = None if path is None else path.absolute()
        self._file_id = None if path is None else file_id(path)
        weakref.finalize(self, connection.close)
        self.layout = MemoryLayout.from_json(self.setting("layout"))
        self.identity: Mapping[str, Any] = self.setting("identity")
        if not isinstance(self.identity, dict):
            raise MemoryMismatchError(f"not an identity: {self.identity!r:.200}")
        self.read_coding()
        self._version = -1
        self.num_rows = 0
        self.refresh()

    def read_coding(self) -> None:
        """Read how rows become records."""
        self.row_codec = str(self.setting("row_codec"))
        self.fine_heads = fine_heads_of(self.layout, self.row_codec, self.setting("fine_heads"))
        sizes = record_bytes(self.layout, self.row_codec, self.fine_heads)
        self.bytes_per_row = sum(sizes.values())

    @property
    def is_in_place(self) -> bool:
        """Whether the file that was opened still has its name, and no other one."""
        path = self._absolute_path
        return path is None or (self._file_id is not None and file_id(path) == self._file_id)

    def close(self) -> None:
        """Close the database; the object is of no use afterwards."""
        self.connection.close()

    def refresh(self) -> bool:
        """See what is committed by now; return whether another process has changed something."""
        with self.snapshot():
            (version,) = self.connection.execute("PRAGMA data_version").fetchone()
            num_rows = schema.read_setting(self.connection, "num_rows")
            if type(num_rows) is not int or not 0 <= num_rows < _MAX_ROWS:
                raise StoreError(
                    f"the catalogue '{self.path}' is damaged: it has {num_rows!r} rows."
                )
            changed = (version, num_rows) != (self._version, self.num_rows)
            self._version, self.num_rows = version, num_rows
        return changed

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[None]:
        """Read one state of the database, whatever other processes write meanwhile."""
        with self._lock, as_store_error(self.path):
            if self.connection.in_transaction:
                yield
                return
            try:  # Ctrl-C may come right after the beginning, too
                self.connection.execute("BEGIN")
                yield
            finally:
                self.connection.rollback()

    def setting(self, key: str) -> Any:
        """Return a setting as plain JSON types, or None."""
        with self._lock, as_store_error(self.path):
            return schema.read_setting(self.connection, key)

    def document_names(self) -> list[str]:
        """Return the names of all documents, in the order they were written."""
        return [name for name, _, _ in self.document_sizes()]

    def has_document(self, name: str) -> bool:
        """Tell whether a document of that name is in the memory."""
        return bool(self._visible("1", "AND name = ?", name))

    def content_hash(self, name: str) -> str | None:
        """Return the `content_hash` of the document of that name, or None if there is none."""
        records = self._visible("content_hash", "AND name = ?", name)
        return str(records[0][0]) if records else None

    def content_hashes(self) -> dict[str, str]:
        """Return the `content_hash` of every document."""
        return dict(self._visible("name, content_hash", ""))

    def document(self, name: str) -> StoredDocument:
        """Read one document with its text, token ids, offsets and metadata.

        Raises:
            DocumentError: there is none of that name, or no more.
        """
        with self.snapshot():
            records = self._visible(f"{COLUMNS}, crc32", "AND name = ?", name)
            if not records:
                raise no_document(name)
            document = from_record(records[0], self.num_rows)
            return dataclasses.replace(document, metadata=self._metadata_at(document.first_row))

    def lengths(self, name: str) -> tuple[int, int | None]:
        """Return a document's tokens, and the characters of its text, None if it has only ids.

        Raises:
            DocumentError: there is none of that name.
        """
        records = self._visible("num_tokens, text", "AND name = ?", name)
        if not records:
            raise no_document(name)
        ((num_tokens, text),) = records
        return int(num_tokens), None if text is None else len(text)

    def metadata(self, name: str) -> Metadata:
        """Return a document's metadata, {} if it has none; a DocumentError if there is no such."""
        with self.snapshot():
            return self._metadata_at(self._span(name)[0])

    def all_metadata(self) -> dict[str, Metadata]:
        """Return document -> metadata, of those that have some."""
        with self.snapshot():
            names = {first: str(name) for first, name in self._visible("first_row, name", "")}
            found = dict(read_metadata(self.connection))
        return {names[first]: found[first] for first in found if first in names}

    def scope(
        self,
        documents: Iterable[str] | None = None,
        where: Where | None = None,
        *,
        missing_ok: bool = False,
    ) -> Scope:
        """Return the rows of documents, for searches of these alone.

        Args:
            documents: their names; None for all.
            where: of these, the ones whose metadata has, for every key, the value, or one of the
                values; None for all.
            missing_ok: leave out names that are unknown, instead of refusing them.

        Raises:
            DocumentError: a name is unknown, or `where` is not a filter.
        """
        wanted = None if where is None else check_where(where)
        with self.snapshot():
            if documents is None:
                spans = self._visible(_SPAN, "")
            else:
                names = dict.fromkeys(documents)
                if missing_ok:
                    names = {name: None for name in names if self.has_document(name)}
                spans = [self._span(name) for name in names]
            if wanted:
                metadata = dict(read_metadata(self.connection))
                spans = [span for span in spans if matches(metadata.get(span[0], {}), wanted)]
        return Scope.of((int(first), int(stop)) for first, stop in spans)

    def document_sizes(self) -> list[tuple[str, int, int]]:
        """Return (name, tokens, rows) of every document, in the order they were written."""
        records = self._visible("name, num_tokens, num_rows", "ORDER BY first_row")
        with as_store_error(self.path):
            return [(str(name), int(tokens), int(rows)) for name, tokens, rows in records]

    def first_rows(self) -> Int64Array:
        """Return the first row of every document, in the order of their names, (d,) int64."""
        records = self._visible("first_row", "ORDER BY first_row")
        return np.array([first for (first,) in records], dtype=np.int64)

    def document_of_rows(self, ids: Iterable[int]) -> dict[int, str]:
        """Return the name of the document that owns each row; rows without one are left out."""
        owners: dict[int, str] = {}
        name, first, stop = "", 0, 0
        with self.snapshot():
            for row in sorted({int(row) for row in ids}):
                if row >= stop:  # else in the span of the row before
                    order = "AND first_row <= ? ORDER BY first_row DESC LIMIT 1"
                    records = self._visible(f"name, {_SPAN}", order, row)
                    if not records:
                        continue
                    ((name, first, stop),) = records
                if first <= row < stop:
                    owners[row] = str(name)
        return owners

    def row_crc32(self, name: str) -> tuple[int, ...]:
        """Return the checksums of a document's records, layers ascending; () if there is none."""
        records = self._visible("row_crc32", "AND name = ?", name)
        return unpack_crc32(records[0][0]) if records else ()

    def record_spans(self) -> Iterator[RecordSpan]:
        """Yield where each document's rows are, ascending, with the checksums of their records."""
        for name, first, rows, crc32 in self._visible(
            "name, first_row, num_rows, row_crc32", "ORDER BY first_row"
        ):
            with as_store_error(self.path):
                yield RecordSpan(str(name), first, first + rows, unpack_crc32(crc32))

    def query_samples(self) -> dict[int, SampledLayer]:
        """Return layer -> its query heads and samples, of the layers that have some."""
        setting = self.setting("query_samples") or {}
        sampled = {int(layer_idx): SampledLayer(*numbers) for layer_idx, numbers in setting.items()}
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
        """Return what the codec learned of a layer; None if it has learned nothing yet."""
        with self.snapshot():
            return schema.read_codec_state(self.connection, layer_idx)

    def has_codec_states(self) -> bool:
        """Tell whether the codec has learned something."""
        with self.snapshot():
            return schema.has_codec_states(self.connection)

    def searchable_rows(self, sinks: str, scope: Scope | None = None) -> Int64Array:
        """Return the ids that a search may find, ascending, of a scope or of all rows.

        Sinks "all" are every row; "one" leaves out the attention sinks of all documents but the
        first that still has some, so that the memory has exactly one set of them.
        """
        with self.snapshot():
            searchable = np.ones(self.num_rows, dtype=bool)
            for first, stop in schema.read_removed(self.connection):
                searchable[first:stop] = False
            if scope is not None:
                searchable &= scope.mask(self.num_rows)
            if sinks == "one":
                keep_one_set_of_sinks(self.connection, searchable)
        return np.flatnonzero(searchable)

    def sink_rows(self) -> Int64Array:
        """Return the ids of all documents' attention sinks, ascending."""
        with self.snapshot():
            ids = read_sinks(self.connection, self.num_rows)
            return np.concatenate([np.empty(0, dtype=np.int64), *ids])

    def _span(self, name: str) -> tuple[Any, ...]:
        """Return the first row of a document, and the row after its last."""
        records = self._visible(_SPAN, "AND name = ?", name)
        if not records:
            raise no_document(name)
        return records[0]

    def _metadata_at(self, first_row: int) -> Metadata:
        return dict(read_metadata(self.connection, first_row)).get(first_row, {})

    def _visible(self, columns: str, rest: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """Read documents among those that there were when last refreshed."""
        query = f"SELECT {columns} FROM documents WHERE first_row < ? {rest}"
        with self._lock, as_store_error(self.path):
            try:
                return self.connection.execute(query, (self.num_rows, *parameters)).fetchall()
            except UnicodeEncodeError:  # no document has a name that is no UTF-8
                return []


def no_document(name: str) -> DocumentError:
    """Return the error of a name that is not there."""
    return DocumentError(f"no document '{name}' in this memory. `emt list` lists the documents.")
