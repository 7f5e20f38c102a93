"""The catalogue's tables, and how one record at a time is written to them.

Every table but `query_samples`, which has checksums for its content, ends in the crc32 of its
other columns. The statements below are compared, letter by letter, with those of a store.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping
from typing import Any

from memory_backends.catalog.database import FORMAT_VERSION
from memory_backends.catalog.records import damaged, record_crc32
from memory_backends.errors import StoreError

SCHEMA = (
    """CREATE TABLE settings (
    key TEXT PRIMARY KEY,
    value TEXT NOT NULL,          -- JSON
    crc32 INTEGER NOT NULL
) WITHOUT ROWID""",
    """CREATE TABLE documents (
    name TEXT PRIMARY KEY,
    first_row INTEGER NOT NULL,
    num_rows INTEGER NOT NULL,
    num_tokens INTEGER NOT NULL,
    token_ids BLOB NOT NULL,      -- int32 (num_tokens,)
    row_tokens BLOB NOT NULL,     -- int32 (num_rows,): each row's index into token_ids
    sinks BLOB NOT NULL,          -- int32: which of the document's rows are attention sinks
    offsets BLOB,                 -- int32 (num_tokens, 2): characters of text
    text TEXT,
    content_hash TEXT NOT NULL,   -- sha256 of text, or of token_ids without one
    row_crc32 BLOB NOT NULL,      -- uint32 a layer, ascending: of the rows' records
    crc32 INTEGER NOT NULL
)""",
    "CREATE UNIQUE INDEX documents_by_row ON documents (first_row)",
    """CREATE TABLE removed (
    first_row INTEGER PRIMARY KEY,
    stop_row INTEGER NOT NULL,
    crc32 INTEGER NOT NULL
)""",
    """CREATE TABLE query_samples (    -- what one document added to one layer's samples
    layer INTEGER NOT NULL,
    first_sample INTEGER NOT NULL,
    num_samples INTEGER NOT NULL,
    crc32 INTEGER NOT NULL,       -- of the samples
    PRIMARY KEY (layer, first_sample)
) WITHOUT ROWID""",
    """CREATE TABLE codec_states (      -- what the codec learned of one layer's first rows
    layer INTEGER PRIMARY KEY,
    state BLOB NOT NULL,          -- as the codec has it
    crc32 INTEGER NOT NULL
)""",
    """CREATE TABLE metadata (
    first_row INTEGER PRIMARY KEY,  -- of the document
    value TEXT NOT NULL,          -- JSON object
    crc32 INTEGER NOT NULL
)""",
)


def check_schema(connection: sqlite3.Connection) -> None:
    """Raise a StoreError for a database with other tables, or with views or triggers."""
    query = "SELECT sql FROM sqlite_master WHERE sql IS NOT NULL"
    if sorted(str(sql) for (sql,) in connection.execute(query)) != sorted(SCHEMA):
        raise StoreError(
            f"expected the tables of format version {FORMAT_VERSION} in the catalogue; got other "
            "ones. The store is damaged, or another program wrote to it."
        )


def read_setting(connection: sqlite3.Connection, key: str) -> Any:
    """Return a setting as plain JSON types, or None; raise a StoreError if it is damaged."""
    query = "SELECT value, crc32 FROM settings WHERE key = ?"
    record = connection.execute(query, (key,)).fetchone()
    if record is None:
        return None
    value, crc32 = record
    if record_crc32((key, value)) != crc32:
        raise damaged(f"the setting '{key}'")
    return json.loads(value)


def write_setting(connection: sqlite3.Connection, key: str, value: Any) -> None:
    """Store a setting (plain JSON types)."""
    text = json.dumps(value, sort_keys=True)
    connection.execute(
        "INSERT INTO settings VALUES (?, ?, ?) ON CONFLICT (key) "
        "DO UPDATE SET value = excluded.value, crc32 = excluded.crc32",
        (key, text, record_crc32((key, text))),
    )


def read_codec_state(connection: sqlite3.Connection, layer_idx: int) -> bytes | None:
    """Return what the codec learned of a layer; None if it has learned nothing of any."""
    query = "SELECT state, crc32 FROM codec_states WHERE layer = ?"
    record = connection.execute(query, (layer_idx,)).fetchone()
    part = f"what the codec learned of layer {layer_idx}"
    if record is None:
        if has_codec_states(connection):
            raise damaged(part, "it is missing")
        return None
    state, crc32 = record
    if not isinstance(state, bytes) or record_crc32((layer_idx, state)) != crc32:
        raise damaged(part)
    return state


def has_codec_states(connection: sqlite3.Connection) -> bool:
    """Tell whether the codec has learned something."""
    return connection.execute("SELECT 1 FROM codec_states LIMIT 1").fetchone() is not None


def write_codec_states(connection: sqlite3.Connection, states: Mapping[int, bytes]) -> None:
    """Store what the codec learned of layers that have no state yet."""
    for layer_idx, state in states.items():
        record = (layer_idx, state, record_crc32((layer_idx, state)))
        connection.execute("INSERT INTO codec_states VALUES (?, ?, ?)", record)


def write_removed(connection: sqlite3.Connection, first: int, stop: int) -> None:
    """Mark the rows `first` to `stop - 1` as removed; a longer span from `first` on is kept."""
    if stop > first:
        connection.execute(
            "INSERT INTO removed VALUES (?, ?, ?) ON CONFLICT (first_row) DO UPDATE "
            "SET stop_row = excluded.stop_row, crc32 = excluded.crc32 "
            "WHERE excluded.stop_row > removed.stop_row",
            (first, stop, record_crc32((first, stop))),
        )


def read_removed(connection: sqlite3.Connection) -> Iterator[tuple[int, int]]:
    """Yield the removed spans, (first, stop), ascending; they may overlap."""
    query = "SELECT first_row, stop_row, crc32 FROM removed ORDER BY first_row"
    for first, stop, crc32 in connection.execute(query):
        if record_crc32((first, stop)) != crc32 or not 0 <= first < stop:
            raise damaged(f"the record of removed rows {first!r:.40}")
        yield first, stop
