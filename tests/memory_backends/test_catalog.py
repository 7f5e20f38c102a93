"""Settings, documents and removed rows in SQLite."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memory_backends import (
    Document,
    DocumentError,
    MemoryMismatchError,
    StoreError,
    content_hash,
)
from memory_backends.catalog import Catalog
from memory_backends.catalog.records import NewDocument
from memory_backends.catalog.schema import read_removed
from memory_backends.rows.query_samples import SampledLayer, Segment
from memory_backends.store.identity import check_identity
from memory_backends.testing.rows import IDENTITY, LAYOUT, make_document


def new_catalog(directory: Path) -> Catalog:
    Catalog.in_memory(LAYOUT, IDENTITY).copy_to(directory, {})
    return Catalog.open(directory)


@pytest.fixture(params=["in memory", "on disk"])
def catalog(request: pytest.FixtureRequest, tmp_path: Path) -> Catalog:
    if request.param == "in memory":
        return Catalog.in_memory(LAYOUT, IDENTITY)
    return new_catalog(tmp_path)


def new(name: str, num_rows: int, sinks: tuple[int, ...] = (), **more: Any) -> NewDocument:
    return NewDocument(
        make_document(name, num_rows),
        np.arange(num_rows, dtype=np.int32),
        np.array(sinks, dtype=np.int32),
        **{"row_crc32": {}, "samples": {}, **more},
    )


def commit(catalog: Catalog, name: str, num_rows: int, sinks: tuple[int, ...] = ()) -> range:
    (ids,) = catalog.commit([new(name, num_rows, sinks)])
    return ids


def test_a_new_catalogue_has_nothing(catalog: Catalog) -> None:
    assert catalog.num_rows == 0
    assert catalog.document_names() == []
    assert catalog.searchable_rows("all").tolist() == []
    assert catalog.searchable_rows("one").tolist() == []
    assert catalog.document_of_rows([0, 1]) == {}
    assert (catalog.layout, catalog.identity) == (LAYOUT, IDENTITY)


def test_documents_own_their_rows(catalog: Catalog) -> None:
    assert [commit(catalog, name, n) for name, n in (("z", 3), ("a", 1), ("m", 2))] == [
        range(3),
        range(3, 4),
        range(4, 6),
    ]
    assert catalog.document_names() == ["z", "a", "m"]  # as written, not as sorted
    assert catalog.remove_document("a") == 1
    assert catalog.document_of_rows(range(-1, 8)) == {0: "z", 1: "z", 2: "z", 4: "m", 5: "m"}
    assert catalog.searchable_rows("all").tolist() == [0, 1, 2, 4, 5]
    assert not catalog.has_document("a")


def test_a_refused_name_changes_nothing(catalog: Catalog) -> None:
    commit(catalog, "a", 3)
    with pytest.raises(DocumentError, match="document 'a' is already in the memory"):
        commit(catalog, "a", 4)
    assert (catalog.num_rows, catalog.document_sizes()) == (3, [("a", 3, 3)])
    for refuse in (catalog.document, catalog.remove_document):
        with pytest.raises(DocumentError, match="no document 'b' in this memory"):
            refuse("b")


def test_no_document_has_a_name_that_is_no_utf_8(catalog: Catalog) -> None:
    commit(catalog, "a", 3)
    assert not catalog.has_document("a\udce9")
    with pytest.raises(DocumentError, match="no document 'a\udce9' in this memory"):
        catalog.scope(["a", "a\udce9"])


def test_removed_spans_may_overlap(catalog: Catalog) -> None:
    commit(catalog, "a", 6)
    commit(catalog, "b", 6)
    catalog.remove_rows([6, 1, 7, 2, 11])
    assert catalog.searchable_rows("all").tolist() == [0, 3, 4, 5, 8, 9, 10]
    catalog.remove_rows([6])  # a span within one there
    assert catalog.searchable_rows("all").tolist() == [0, 3, 4, 5, 8, 9, 10]
    catalog.remove_document("b")
    assert catalog.searchable_rows("all").tolist() == [0, 3, 4, 5]
    catalog.remove_all()
    assert catalog.searchable_rows("all").tolist() == []
    assert commit(catalog, "a", 2) == range(12, 14)
    assert catalog.searchable_rows("all").tolist() == [12, 13]


def test_settings_keep_json(catalog: Catalog) -> None:
    value = {"b": [1, 2.5, None, "é"], "a": True}
    catalog.set_setting("index", {"old": 1})
    catalog.set_setting("index", value)
    assert catalog.setting("index") == value
    assert catalog.setting("nothing") is None


def test_only_fields_of_both_sides_are_compared(catalog: Catalog) -> None:
    check_identity(catalog, {})
    check_identity(catalog, {"layers": 4, "tokenizer": "mine"})
    with pytest.raises(MemoryMismatchError) as caught:
        check_identity(catalog, {"layers": 5, "architecture": None, "tokenizer": "mine"})
    assert (
        "architecture: the memory has 'tiny', this model None; "
        "layers: the memory has 4, this model 5. Load"
    ) in str(caught.value)


def test_threads_share_a_catalogue(catalog: Catalog) -> None:
    with ThreadPoolExecutor(4) as pool:
        ids = list(pool.map(lambda n: commit(catalog, f"doc {n}", n), range(1, 21)))
    assert sorted(row for rows in ids for row in rows) == list(range(210))
    assert all(len(catalog.document(f"doc {n}").row_tokens) == n for n in range(1, 21))


def test_a_transaction_that_fails_is_rolled_back(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(catalog, "a", 3)

    def fail(*_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr("memory_backends.catalog.schema.write_setting", fail)
        with pytest.raises(StoreError, match="cannot be used: database or disk is full"):
            catalog.commit([new("a", 9, row_crc32={0: 1})], replace=True)
    assert catalog.document_sizes() == [("a", 3, 3)]
    assert catalog.searchable_rows("all").tolist() == [0, 1, 2]


def test_a_copy_leaves_out_the_index_and_gets_checksums(catalog: Catalog, tmp_path: Path) -> None:
    catalog.commit(
        [new("a", 3, (0,), row_crc32={0: 11, 3: 12}), new("b", 2, samples={3: Segment(2, 9)})],
        query_heads={3: 2},
    )
    catalog.set_setting("index", {"generation": "000001"})
    (tmp_path / "copy").mkdir()
    catalog.copy_to(tmp_path / "copy", {"b": {3: 5, 0: 2**32 - 1}})
    copy = Catalog.open(tmp_path / "copy")
    assert copy.setting("index") is None
    assert catalog.setting("index") == {"generation": "000001"}
    assert copy.document("a").sink_rows.tolist() == [0]
    assert copy.document("b").first_row == 3  # its record has a new checksum, which fits
    assert [file.name for file in (tmp_path / "copy").iterdir()] == ["catalog.sqlite"]
    assert [tuple(span) for span in copy.record_spans()] == [
        ("a", 0, 3, (11, 12)),
        ("b", 3, 5, (2**32 - 1, 5)),
    ]
    assert copy.query_samples() == {3: SampledLayer(2, 2)}


def test_a_hash_tells_whether_a_document_changed(catalog: Catalog) -> None:
    text = Document("t", np.array([5, 6], dtype=np.int32), "naïve")
    rows = np.zeros(1, dtype=np.int32)
    catalog.commit([NewDocument(text, rows, rows, {}, {}), new("ids", 2)])
    assert catalog.content_hash("t") == hashlib.sha256("naïve".encode()).hexdigest()
    assert catalog.content_hash("t") == content_hash(text)
    ids = hashlib.sha256(bytes([0, 0, 0, 0, 1, 0, 0, 0])).hexdigest()
    assert catalog.content_hash("ids") == ids
    assert catalog.content_hash("nothing") is None


def test_a_vacuum_joins_removed_spans(catalog: Catalog) -> None:
    for name in "abcd":
        commit(catalog, name, 3)
    for name in "acb":
        catalog.remove_document(name)
    catalog.remove_rows([10])
    catalog.vacuum()
    assert list(read_removed(catalog.connection)) == [(0, 9), (10, 11)]
    assert catalog.searchable_rows("all").tolist() == [9, 11]


@pytest.mark.parametrize(
    ("statement", "use", "message"),
    [
        ("UPDATE documents SET num_rows = 4", lambda catalog: catalog.document("a"), "'a'"),
        (
            "UPDATE removed SET stop_row = 99",
            lambda catalog: catalog.searchable_rows("all"),
            "rows 0",
        ),
        (
            "UPDATE documents SET sinks = x'ff000000'",
            lambda catalog: catalog.searchable_rows("one"),
            "'a'",
        ),
        (
            "UPDATE settings SET value = '1' WHERE key = 'identity'",
            Catalog.document_names,
            "'identity'",
        ),
        (
            "CREATE VIEW removed_rows AS SELECT * FROM removed",
            Catalog.document_names,
            "tables of format version 1 .* The store",
        ),
    ],
)
def test_what_the_disk_changed_is_not_used(
    tmp_path: Path, statement: str, use: Callable[[Catalog], object], message: str
) -> None:
    catalog = new_catalog(tmp_path)
    commit(catalog, "a", 3, sinks=(1,))
    catalog.remove_rows([0])
    catalog.close()
    with sqlite3.connect(tmp_path / "catalog.sqlite") as connection:
        connection.execute(statement)
    connection.close()
    with pytest.raises(StoreError, match=f"{message} is damaged"):
        use(Catalog.open(tmp_path))


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("UPDATE settings SET value = '2' WHERE key = 'format_version'", ".* 2; .* version 1. Use"),
        ("DELETE FROM settings WHERE key = 'format_version'", ".* None; .* version 1"),
        ("DELETE FROM settings WHERE key = 'layout'", "is damaged: not a memory layout: None"),
        ("UPDATE settings SET value = '{' WHERE key = 'format_version'", "cannot be used: Expect"),
        ("DROP TABLE settings", "cannot be used: no such table: settings"),
    ],
)
def test_a_catalogue_that_is_not_ours_is_refused(
    tmp_path: Path, statement: str, message: str
) -> None:
    new_catalog(tmp_path).close()
    with sqlite3.connect(tmp_path / "catalog.sqlite") as connection:
        connection.execute(statement)
    connection.close()
    with pytest.raises(StoreError, match=f"catalog.sqlite' {message}"):
        Catalog.open(tmp_path)


def test_an_impossible_layout_is_refused(tmp_path: Path) -> None:
    catalog = new_catalog(tmp_path)
    for layers in ({"0": [1, 0, 4]}, {"-1": [1, 4, 4]}, {"70000": [1, 4, 4]}):
        catalog.set_setting("layout", {"dtype": "float32", "layers": layers})
        with pytest.raises(StoreError, match=r"is damaged: not a memory layout: .*impossible"):
            Catalog.open(tmp_path)


def test_a_directory_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"gone/catalog\.sqlite' cannot be used: unable to open"):
        Catalog.in_memory(LAYOUT, IDENTITY).copy_to(tmp_path / "gone", {})
