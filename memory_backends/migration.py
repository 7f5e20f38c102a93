"""Bringing a store of an older format version to this one.

Version 1 had one checksum for each write and layer; version 2 has one for each document and layer,
checksums of the records of the catalogue, a hash of each document's content, and query samples
(which an upgraded store lacks: they were never kept). Rows stay where they are. The rows are
compared with their old checksums first, so damage is not given new ones. All changes are made by
one transaction: a crash leaves the old version.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import zlib
from pathlib import Path

import numpy as np

from memory_backends import schema
from memory_backends.database import (
    FILE_NAME,
    FORMAT_VERSION,
    as_store_error,
    check_version,
    connect,
    stored_version,
    transaction,
)
from memory_backends.errors import MemoryMismatchError, StoreError, reported
from memory_backends.layout import Document, MemoryLayout
from memory_backends.lock import write_lock
from memory_backends.records import NewDocument, from_record, to_record
from memory_backends.row_files import RowFiles
from memory_backends.validation import check_directory

_ROWS_AT_ONCE = 4096


def upgrade(path: Path | str) -> bool:
    """Bring a store to the format version of this emt.

    Returns:
        False if it has that version already.

    Raises:
        StoreError: there is no store, it is damaged, a newer emt wrote it, another process is
            writing to it, or the disk is full; the store is as it was.
    """
    directory = check_directory(Path(path))
    with contextlib.closing(connect(directory)) as connection:
        file = directory / FILE_NAME
        with as_store_error(file):
            if stored_version(connection) == FORMAT_VERSION:
                return False
            if stored_version(connection) != 1:
                check_version(connection, directory)
        with reported(directory), write_lock(directory), as_store_error(file):
            with transaction(connection):
                if stored_version(connection) == 1:  # no other process was faster
                    _from_version_1(connection, directory)
            connection.execute("VACUUM")
    return True


def _from_version_1(connection: sqlite3.Connection, directory: Path) -> None:
    settings = dict(connection.execute("SELECT key, value FROM settings").fetchall())
    try:
        layout = MemoryLayout.from_json(json.loads(settings["layout"]))
        num_rows = int(settings["num_rows"])
    except (KeyError, MemoryMismatchError) as error:
        raise StoreError(f"'{directory / FILE_NAME}' is damaged: {error}") from error
    with contextlib.closing(RowFiles(layout, directory, num_rows)) as files:
        for layer_idx, first, count, crc32 in connection.execute(
            "SELECT layer, first_row, num_rows, crc32 FROM checksums"
        ):
            if layer_idx not in layout.layers or not 0 <= first <= first + count <= num_rows:
                raise StoreError(f"'{directory / FILE_NAME}' is damaged: checksum of row {first}.")
            if _crc32(files, layer_idx, first, first + count) != crc32:
                raise StoreError(
                    f"'{files.files[layer_idx].path}' is damaged: the checksum of rows {first} to "
                    f"{first + count - 1} does not match. Restore it, or index the documents again."
                )
        connection.execute("DROP INDEX documents_by_row")
        for table in ("settings", "documents", "removed"):
            connection.execute(f"ALTER TABLE {table} RENAME TO old_{table}")
        connection.execute("DROP TABLE checksums")
        schema.create_tables(connection)
        for key, value in settings.items():
            schema.write_setting(connection, key, json.loads(value))
        schema.write_setting(connection, "format_version", FORMAT_VERSION)
        schema.write_setting(connection, "row_codec", "exact")
        for first, stop in connection.execute("SELECT first_row, stop_row FROM old_removed"):
            schema.write_removed(connection, first, stop)
        _convert_documents(connection, files)
    for table in ("settings", "documents", "removed"):
        connection.execute(f"DROP TABLE old_{table}")


def _convert_documents(connection: sqlite3.Connection, files: RowFiles) -> None:
    marks = ", ".join("?" * 12)
    for name, first, token_ids, row_tokens, sinks, offsets, text in connection.execute(
        "SELECT name, first_row, token_ids, row_tokens, sinks, offsets, text FROM old_documents"
    ):
        tokens, places, sink_rows, spans = (
            np.frombuffer(column or b"", dtype="<i4")
            for column in (token_ids, row_tokens, sinks, offsets)
        )
        stop = first + len(places)
        row_crc32 = {
            layer_idx: _crc32(files, layer_idx, first, stop) for layer_idx in files.files.layers
        }
        document = Document(name, tokens, text, None if offsets is None else spans.reshape(-1, 2))
        new = NewDocument(document, places, sink_rows, {}, row_crc32)
        record = to_record(new, first)
        from_record(record, files.num_rows)  # raises if it was damaged before
        connection.execute(f"INSERT INTO documents VALUES ({marks})", record)


def _crc32(files: RowFiles, layer_idx: int, first: int, stop: int) -> int:
    crc32 = 0
    for start in range(first, stop, _ROWS_AT_ONCE):
        part = files.records(layer_idx, start, min(start + _ROWS_AT_ONCE, stop))
        crc32 = zlib.crc32(part.numpy().data.cast("B"), crc32)
    return crc32
