"""Settings, documents and removed rows in SQLite."""

from __future__ import annotations

import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from memory_backends import DocumentError, MemoryMismatchError, StoreError
from memory_backends.catalog import Catalog
from tests.memory_backends.reference import IDENTITY, LAYOUT, make_document


def new_catalog(directory: Path) -> Catalog:
    Catalog.in_memory(LAYOUT, IDENTITY).copy_to(directory, {})
    return Catalog.open(directory)


@pytest.fixture(params=["in memory", "on disk"])
def catalog(request: pytest.FixtureRequest, tmp_path: Path) -> Catalog:
    if request.param == "in memory":
        return Catalog.in_memory(LAYOUT, IDENTITY)
    return new_catalog(tmp_path)


def publish(catalog: Catalog, name: str, num_rows: int, sinks: tuple[int, ...] = ()) -> range:
    return catalog.publish(
        make_document(name, num_rows),
        np.arange(num_rows, dtype=np.int32),
        np.array(sinks, dtype=np.int32),
        {},
    )


def test_a_new_catalogue_has_nothing(catalog: Catalog) -> None:
    assert catalog.num_rows == 0
    assert catalog.document_names() == []
    assert catalog.searchable_rows("all").tolist() == []
    assert catalog.searchable_rows("one").tolist() == []
    assert catalog.document_of_rows([0, 1]) == {}
    assert (catalog.layout, catalog.identity) == (LAYOUT, IDENTITY)


def test_documents_own_their_rows(catalog: Catalog) -> None:
    assert [publish(catalog, name, n) for name, n in (("z", 3), ("a", 1), ("m", 2))] == [
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
    publish(catalog, "a", 3)
    with pytest.raises(DocumentError, match="document 'a' is already in the memory"):
        publish(catalog, "a", 4)
    assert (catalog.num_rows, catalog.document_sizes()) == (3, [("a", 3, 3)])
    for refuse in (catalog.document, catalog.remove_document):
        with pytest.raises(DocumentError, match="no document 'b' in this memory"):
            refuse("b")


def test_removed_spans_may_overlap(catalog: Catalog) -> None:
    publish(catalog, "a", 6)
    publish(catalog, "b", 6)
    catalog.remove_rows([6, 1, 7, 2, 11])
    assert catalog.searchable_rows("all").tolist() == [0, 3, 4, 5, 8, 9, 10]
    catalog.remove_rows([6])  # a span within one there
    assert catalog.searchable_rows("all").tolist() == [0, 3, 4, 5, 8, 9, 10]
    catalog.remove_document("b")
    assert catalog.searchable_rows("all").tolist() == [0, 3, 4, 5]
    catalog.remove_all()
    assert catalog.searchable_rows("all").tolist() == []
    assert publish(catalog, "a", 2) == range(12, 14)
    assert catalog.searchable_rows("all").tolist() == [12, 13]


def test_the_first_sinks_still_there_are_the_ones(catalog: Catalog) -> None:
    publish(catalog, "none", 2)
    publish(catalog, "a", 3, sinks=(0, 2))
    publish(catalog, "b", 3, sinks=(1,))
    assert catalog.searchable_rows("one").tolist() == [0, 1, 2, 3, 4, 5, 7]
    assert catalog.searchable_rows("all").tolist() == list(range(8))
    catalog.remove_document("a")
    assert catalog.searchable_rows("one").tolist() == [0, 1, 5, 6, 7]


def test_settings_keep_json(catalog: Catalog) -> None:
    value = {"b": [1, 2.5, None, "é"], "a": True}
    catalog.set_setting("index", {"old": 1})
    catalog.set_setting("index", value)
    assert catalog.setting("index") == value
    assert catalog.setting("nothing") is None


def test_only_fields_of_both_sides_are_compared(catalog: Catalog) -> None:
    catalog.check_identity({})
    catalog.check_identity({"layers": 4, "tokenizer": "mine"})
    with pytest.raises(MemoryMismatchError) as caught:
        catalog.check_identity({"layers": 5, "architecture": None, "tokenizer": "mine"})
    assert (
        "architecture: the memory has 'tiny', this model None; "
        "layers: the memory has 4, this model 5. Load"
    ) in str(caught.value)


def test_threads_share_a_catalogue(catalog: Catalog) -> None:
    with ThreadPoolExecutor(4) as pool:
        ids = list(pool.map(lambda n: publish(catalog, f"doc {n}", n), range(1, 21)))
    assert sorted(row for rows in ids for row in rows) == list(range(210))
    assert all(len(catalog.document(f"doc {n}").row_tokens) == n for n in range(1, 21))


def test_a_transaction_that_fails_is_rolled_back(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(catalog, "a", 3)

    def fail(*_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr("memory_backends.catalog._put_setting", fail)
        with pytest.raises(StoreError, match="cannot be used: database or disk is full"):
            catalog.publish(
                make_document("a", 9),
                np.arange(9, dtype=np.int32),
                np.array([], dtype=np.int32),
                {0: 1},
                replace=True,
            )
    assert catalog.document_sizes() == [("a", 3, 3)]
    assert catalog.searchable_rows("all").tolist() == [0, 1, 2]


def test_a_copy_leaves_out_the_index_and_gets_checksums(catalog: Catalog, tmp_path: Path) -> None:
    in_memory = catalog.path is None
    catalog.publish(
        make_document("a", 3),
        np.arange(3, dtype=np.int32),
        np.array([0], dtype=np.int32),
        {} if in_memory else {0: 11, 3: 12},
    )
    catalog.set_setting("index", {"generation": "000001"})
    (tmp_path / "copy").mkdir()
    catalog.copy_to(tmp_path / "copy", {0: 2**32 - 1, 3: 5})
    copy = Catalog.open(tmp_path / "copy")
    assert copy.setting("index") is None
    assert catalog.setting("index") == {"generation": "000001"}
    assert copy.document("a").sink_rows.tolist() == [0]
    assert [file.name for file in (tmp_path / "copy").iterdir()] == ["catalog.sqlite"]
    with sqlite3.connect(tmp_path / "copy" / "catalog.sqlite") as connection:
        found = connection.execute("SELECT * FROM checksums ORDER BY layer").fetchall()
    connection.close()
    kept = [(0, 0, 3, 11), (3, 0, 3, 12)]
    assert found == ([(0, 0, 3, 2**32 - 1), (3, 0, 3, 5)] if in_memory else kept)


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        (
            "UPDATE settings SET value = '2' WHERE key = 'format_version'",
            "has format version 2; this emt reads version 1",
        ),
        (
            "DELETE FROM settings WHERE key = 'format_version'",
            "has format version None; this emt reads version 1",
        ),
        ("DELETE FROM settings WHERE key = 'layout'", "is damaged: not a memory layout: None"),
        (
            """UPDATE settings SET value = '{"dtype": "float32", "layers": {"0": [1, 0, 4]}}'
            WHERE key = 'layout'""",
            r"is damaged: not a memory layout: .*impossible layer shapes \{0: \(1, 0, 4\)\}",
        ),
        ("UPDATE settings SET value = '{' WHERE key = 'layout'", "cannot be used: Expecting"),
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


def test_a_directory_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"gone/catalog\.sqlite' cannot be used: unable to open"):
        Catalog.in_memory(LAYOUT, IDENTITY).copy_to(tmp_path / "gone", {})
