"""Checking a store's catalogue: SQLite's own check, every record, and how records fit together."""

from __future__ import annotations

from collections.abc import Iterator

from memory_backends.catalog import Catalog, schema
from memory_backends.catalog.database import as_store_error
from memory_backends.catalog.metadata import read_metadata
from memory_backends.catalog.records import COLUMNS, RecordSpan, from_record, unpack_crc32
from memory_backends.errors import EMTError, StoreError
from memory_backends.rows.coding import RowCoding
from memory_backends.scope import joined


class CatalogCheck:
    """One reading of a catalogue, within a snapshot; `reasons` say what is wrong.

    `spans` are those of the documents whose records are in order, ascending.
    """

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._connection = catalog.connection
        self.spans: list[RecordSpan] = []
        self.reasons: list[str] = []
        for check in (self._database, self._documents, self._rows, self._metadata, self._states):
            try:
                with as_store_error(catalog.path):
                    self.reasons.extend(check())
            except EMTError as error:
                self.reasons.append(str(error))

    def _database(self) -> Iterator[str]:
        for (message,) in self._connection.execute("PRAGMA integrity_check"):
            if message != "ok":
                yield f"SQLite's integrity check says: {message}"
        schema.check_schema(self._connection)
        for (key,) in self._connection.execute("SELECT key FROM settings").fetchall():
            schema.read_setting(self._connection, str(key))

    def _documents(self) -> Iterator[str]:
        num_layers = len(self._catalog.layout.layers)
        query = f"SELECT {COLUMNS}, crc32 FROM documents ORDER BY first_row"
        for record in self._connection.execute(query):
            try:
                document = from_record(record, self._catalog.num_rows)
            except StoreError as error:
                yield str(error)
                continue
            row_crc32 = unpack_crc32(record[-2])
            if len(row_crc32) != num_layers:
                yield f"document '{document.name}' lacks checksums of its rows"
                continue
            first, stop = document.first_row, document.first_row + len(document.row_tokens)
            if self.spans and first < self.spans[-1].stop:
                yield f"document '{document.name}' has rows of another, too"
            self.spans.append(RecordSpan(document.name, first, stop, row_crc32))

    def _rows(self) -> Iterator[str]:
        num_rows = self._catalog.num_rows
        spans = [(span.first, span.stop) for span in self.spans]
        spans += schema.read_removed(self._connection)
        covered = joined(sorted(spans))
        if covered != ([(0, num_rows)] if num_rows else []):
            yield (
                f"each of the rows 0 to {num_rows - 1} must be a document's or removed; those "
                f"that are: {covered[:5]}"
            )

    def _metadata(self) -> Iterator[str]:
        firsts = {first for (first,) in self._connection.execute("SELECT first_row FROM documents")}
        for first, _ in read_metadata(self._connection):
            if first not in firsts:
                yield f"there is metadata at row {first}, where no document is"

    def _states(self) -> Iterator[str]:
        catalog = self._catalog
        coding = RowCoding(
            catalog.layout,
            catalog.row_codec,
            catalog.codec_state,
            fine_heads=catalog.fine_heads,
        )
        for layer_idx in catalog.layout.layers:
            try:
                coding.records(layer_idx)
            except StoreError as error:
                yield f"layer {layer_idx}: {error}"
        stored = {layer for (layer,) in self._connection.execute("SELECT layer FROM codec_states")}
        surplus = sorted(stored - set(coding.layers_with_state))
        if surplus:
            yield f"codec '{catalog.row_codec}' has states of no layer: {surplus[:5]}"
