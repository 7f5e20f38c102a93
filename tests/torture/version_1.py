"""Write a store as the first version of emt did, so that there are some to upgrade."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tests.torture.made_up import IDENTITY, LAYOUT
from tests.torture.promises import made_up

_SCHEMA = """
CREATE TABLE settings (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE documents (
    name TEXT PRIMARY KEY,
    first_row INTEGER NOT NULL,
    num_rows INTEGER NOT NULL,
    num_tokens INTEGER NOT NULL,
    token_ids BLOB NOT NULL,      -- int32 (num_tokens,)
    row_tokens BLOB NOT NULL,     -- int32 (num_rows,): each row's index into token_ids
    sinks BLOB NOT NULL,          -- int32: which of the document's rows are attention sinks
    offsets BLOB,                 -- int32 (num_tokens, 2): characters of text
    text TEXT
);
CREATE UNIQUE INDEX documents_by_row ON documents (first_row);
CREATE TABLE removed (first_row INTEGER PRIMARY KEY, stop_row INTEGER NOT NULL);
CREATE TABLE checksums (         -- crc32 of what one write appended to one layer's file
    layer INTEGER NOT NULL,
    first_row INTEGER NOT NULL,
    num_rows INTEGER NOT NULL,
    crc32 INTEGER NOT NULL,
    PRIMARY KEY (layer, first_row)
) WITHOUT ROWID;
"""


def write_version_1(path: Path, versions: Mapping[str, int]) -> Path:
    """Write made-up documents to a new store, without an index; return its path."""
    (path / "rows").mkdir(parents=True)
    first = 0
    with contextlib.closing(sqlite3.connect(path / "catalog.sqlite")) as catalog, catalog:
        catalog.executescript(_SCHEMA)
        for name, version in versions.items():
            content = made_up(name, version)
            num_rows = len(content.row_tokens)
            blobs = (content.token_ids, content.row_tokens, content.sinks, content.offsets)
            catalog.execute(
                "INSERT INTO documents VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    *(name, first, num_rows, len(content.token_ids)),
                    *(np.array(values, dtype="<i4").tobytes() for values in blobs),
                    content.text,
                ),
            )
            for idx, rows in content.rows.items():
                data = np.ascontiguousarray(rows.transpose(1, 0, 2)).tobytes()  # (n, Hkv, D + Dv)
                with (path / "rows" / f"layer-{idx:03d}.bin").open("ab") as file:
                    file.write(data)
                record = (idx, first, num_rows, zlib.crc32(data))
                catalog.execute("INSERT INTO checksums VALUES (?, ?, ?, ?)", record)
            first += num_rows
        settings = {
            "format_version": 1,
            "layout": LAYOUT.to_json(),
            "identity": IDENTITY,
            "num_rows": first,
        }
        catalog.executemany(
            "INSERT INTO settings VALUES (?, ?)",
            [(key, json.dumps(value, sort_keys=True)) for key, value in settings.items()],
        )
    return path


def version_of(path: Path) -> int:
    """Return the format version of a store, whichever it is."""
    with contextlib.closing(sqlite3.connect(path / "catalog.sqlite")) as catalog:
        query = "SELECT value FROM settings WHERE key = 'format_version'"
        return int(catalog.execute(query).fetchone()[0])
