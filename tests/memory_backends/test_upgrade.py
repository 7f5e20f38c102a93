"""A store of format version 1 is brought to this version, whole or not at all."""

from __future__ import annotations

import json
import re
import sqlite3
import zlib
from pathlib import Path

import numpy as np
import pytest

from memory_backends import MemoryBackend, StoreError, verify
from memory_backends.rows.storage import interleave
from memory_backends.testing.checks import assert_fetches, assert_finds
from memory_backends.testing.rows import IDENTITY, LAYOUT, make_rows

VERSION_1 = """
CREATE TABLE settings (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE documents (
    name TEXT PRIMARY KEY,
    first_row INTEGER NOT NULL,
    num_rows INTEGER NOT NULL,
    num_tokens INTEGER NOT NULL,
    token_ids BLOB NOT NULL,
    row_tokens BLOB NOT NULL,
    sinks BLOB NOT NULL,
    offsets BLOB,
    text TEXT
);
CREATE UNIQUE INDEX documents_by_row ON documents (first_row);
CREATE TABLE removed (first_row INTEGER PRIMARY KEY, stop_row INTEGER NOT NULL);
CREATE TABLE checksums (
    layer INTEGER NOT NULL,
    first_row INTEGER NOT NULL,
    num_rows INTEGER NOT NULL,
    crc32 INTEGER NOT NULL,
    PRIMARY KEY (layer, first_row)
) WITHOUT ROWID;
"""
RUNS = [make_rows(10, seed=1, sinks=[0]), make_rows(7, seed=2), make_rows(4, seed=3)]
LEFT = [*range(5), *range(6, 10), *range(17, 21)]


def ints(*values: int) -> bytes:
    return np.array(values, dtype="<i4").tobytes()


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """What emt 0.1 wrote: 'a' with text, 'gone' (removed), 'b'; row 5 is removed, too."""
    path = tmp_path / "old"
    (path / "rows").mkdir(parents=True)
    connection = sqlite3.connect(path / "catalog.sqlite")
    connection.executescript(VERSION_1)
    settings = {
        "format_version": 1,
        "layout": LAYOUT.to_json(),
        "identity": IDENTITY,
        "num_rows": 21,
        "model": "some/model",
    }
    connection.executemany(
        "INSERT INTO settings VALUES (?, ?)", [(k, json.dumps(v)) for k, v in settings.items()]
    )
    spans = ints(*(end for token in range(10) for end in (token, token + 1)))
    documents = [
        ("a", 0, 10, 10, ints(*range(10)), ints(*range(10)), ints(0), spans, "ten letter"),
        ("b", 17, 4, 4, ints(9, 8, 7, 6), ints(*range(4)), b"", None, None),
    ]
    connection.executemany(f"INSERT INTO documents VALUES ({', '.join('?' * 9)})", documents)
    connection.executemany("INSERT INTO removed VALUES (?, ?)", [(10, 17), (5, 6)])
    for layer_idx in (0, 3):
        first = 0
        with (path / "rows" / f"layer-{layer_idx:03d}.bin").open("wb") as file:
            for run in RUNS:
                data = interleave(run, layer_idx).numpy().tobytes()
                file.write(data)
                checksum = (layer_idx, first, len(run), zlib.crc32(data))
                connection.execute("INSERT INTO checksums VALUES (?, ?, ?, ?)", checksum)
                first += len(run)
    connection.commit()
    connection.close()
    return path


def test_an_old_store_is_not_opened_but_upgraded(store: Path) -> None:
    for kind in ("manual", "vector_db"):
        with pytest.raises(
            StoreError, match=f"version 1; .* Run `emt upgrade {re.escape(str(store))}`"
        ):
            MemoryBackend.open(store, kind)
    with pytest.raises(StoreError, match="Run `emt upgrade"):
        verify(store)
    before = {file.name: file.read_bytes() for file in (store / "rows").iterdir()}
    assert upgrade(store)
    assert not upgrade(store)
    assert {file.name: file.read_bytes() for file in (store / "rows").iterdir()} == before
    assert verify(store) == []
    for kind in ("manual", "vector_db"):
        backend = MemoryBackend.open(store, kind)
        assert_finds(backend, RUNS, LEFT)
        assert_fetches(backend, RUNS)
        document = backend.catalog.document("a")
        assert (document.text, document.sink_rows.tolist()) == ("ten letter", [0])
        assert document.offsets is not None
        assert document.offsets[9].tolist() == [9, 10]
        assert backend.catalog.document("b").token_ids.tolist() == [9, 8, 7, 6]
        assert backend.catalog.setting("model") == "some/model"
        assert backend.catalog.identity == IDENTITY
        assert backend.sampled_queries(0).shape == (2, 0, 1, 8)
        backend.close()


def test_an_upgraded_store_can_index_a_few_heads(store: Path) -> None:
    upgrade(store)
    backend = MemoryBackend.open(store, "vector_db", indexed_heads={0: [1]})
    backend.save()
    names = {file.name for file in (store / "index" / "000001").iterdir()}
    assert names == {"layer-000-head-001.faiss", "ids.bin"}
    assert verify(store) == []
    assert_finds(MemoryBackend.open(store, "vector_db"), RUNS, LEFT)


def test_an_upgrade_that_fails_leaves_the_old_version(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (store / "catalog.sqlite").read_bytes()

    def fail(*_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr("memory_backends.migration.to_record", fail)
        with pytest.raises(StoreError, match="disk is full"):
            upgrade(store)
    assert (store / "catalog.sqlite").read_bytes() == before
    assert upgrade(store)
    assert verify(store) == []


def test_damaged_rows_get_no_new_checksums(store: Path) -> None:
    file = store / "rows" / "layer-003.bin"
    data = bytearray(file.read_bytes())
    data[12 * 40] ^= 1
    file.write_bytes(data)
    message = r"layer-003.bin' is damaged: the checksum of rows 10 to 16 does not match"
    with pytest.raises(StoreError, match=message):
        upgrade(store)
    file.write_bytes(data[:100])
    with pytest.raises(StoreError, match="is truncated to 100 bytes; expected at least 840"):
        upgrade(store)


def test_a_damaged_catalogue_is_not_upgraded(store: Path) -> None:
    with sqlite3.connect(store / "catalog.sqlite") as connection:
        connection.execute(
            "UPDATE documents SET num_rows = 3, row_tokens = x'00ff' WHERE name = 'b'"
        )
    connection.close()
    with pytest.raises(StoreError, match="cannot be used"):
        upgrade(store)
    with sqlite3.connect(store / "catalog.sqlite") as connection:
        connection.execute("UPDATE documents SET row_tokens = x'ff000000' WHERE name = 'b'")
    connection.close()
    with pytest.raises(StoreError, match="record of document 'b' is damaged: an index is out of"):
        upgrade(store)


def test_other_versions_are_refused(store: Path, tmp_path: Path) -> None:
    with sqlite3.connect(store / "catalog.sqlite") as connection:
        connection.execute("UPDATE settings SET value = '7' WHERE key = 'format_version'")
    connection.close()
    with pytest.raises(StoreError, match="has format version 7; this emt reads version 2"):
        upgrade(store)
    with pytest.raises(StoreError, match="found none"):
        upgrade(tmp_path / "nowhere")
