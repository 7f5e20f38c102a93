"""Metadata of documents: kept with them, found by filters, checked like every record."""

from __future__ import annotations

import math
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memory_backends import (
    Document,
    DocumentError,
    MemoryBackend,
    StoreError,
    verify,
)
from memory_backends.catalog import Catalog
from memory_backends.testing.rows import LAYOUT, make_rows

KNOWN = {
    "a": {"year": 1999, "language": "en", "draft": False},
    "b": {"year": 2001, "language": "de", "price": 1.5},
    "c": None,
    "d": {"year": 2001, "language": "en", "draft": True},
}
SIZE = 4
SPANS = {name: (at * SIZE, (at + 1) * SIZE) for at, name in enumerate(KNOWN)}


def add(backend: MemoryBackend, name: str, metadata: Any, **options: Any) -> None:
    document = Document(name, np.arange(SIZE, dtype=np.int32), metadata=metadata)
    backend.add(document, [make_rows(SIZE, seed=1)], **options)


@pytest.fixture
def backend(tmp_path: Path) -> MemoryBackend:
    backend = MemoryBackend(LAYOUT, path=tmp_path / "store")
    for name, metadata in KNOWN.items():
        add(backend, name, metadata)
    return backend


def names_in(catalog: Catalog, **options: Any) -> list[str]:
    ids = catalog.scope(**options).mask(catalog.num_rows).nonzero()[0]
    owners = catalog.document_of_rows(ids)
    assert len(owners) == len(ids) == SIZE * len(set(owners.values()))
    return sorted(set(owners.values()))


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ({"year": 2001}, "bd"),
        ({"year": 2001.0}, "bd"),
        ({"year": 2001, "language": "en"}, "d"),
        ({"year": [1999, 2001], "language": "en"}, "ad"),
        ({"language": ("de", "fr")}, "b"),
        ({"draft": True}, "d"),
        ({"draft": 1}, ""),
        ({"draft": 0}, ""),
        ({"draft": [True, False]}, "ad"),
        ({"price": 1.5}, "b"),
        ({"year": "2001"}, ""),
        ({"year": []}, ""),
        ({"unknown": 1}, ""),
        ({}, "abcd"),
        (None, "abcd"),
    ],
)
def test_filters(backend: MemoryBackend, where: Any, expected: str) -> None:
    assert names_in(backend.catalog, where=where) == list(expected)
    # With names, both must hold.
    both = names_in(backend.catalog, documents=["d", "b", "c"], where=where)
    assert both == sorted(set(expected) & set("bcd"))


def test_scopes_of_names(backend: MemoryBackend) -> None:
    catalog = backend.catalog
    assert catalog.scope(["d", "a", "d"]).spans == (SPANS["a"], SPANS["d"])
    assert catalog.scope([]).spans == ()
    with pytest.raises(DocumentError, match="no document 'z' in this memory"):
        catalog.scope(["a", "z"])
    assert catalog.scope(["a", "z"], missing_ok=True).spans == (SPANS["a"],)


def test_metadata_is_the_documents(backend: MemoryBackend, tmp_path: Path) -> None:
    for catalog in (backend.catalog, Catalog.open(tmp_path / "store")):
        for name, metadata in KNOWN.items():
            assert catalog.metadata(name) == (metadata or {})
            assert catalog.document(name).metadata == (metadata or {})
            assert type(catalog.metadata("a")["draft"]) is bool
    with pytest.raises(DocumentError, match="no document 'z'"):
        backend.catalog.metadata("z")


def test_replaced_removed_and_cleared_documents_lose_it(
    backend: MemoryBackend, tmp_path: Path
) -> None:
    add(backend, "a", {"year": 2020}, replace=True)
    add(backend, "b", None, replace=True)
    assert backend.catalog.metadata("a") == {"year": 2020}
    assert backend.catalog.metadata("b") == {}
    assert names_in(backend.catalog, where={"year": [1999, 2001, 2020]}) == ["a", "d"]
    backend.remove_document("d")
    add(backend, "d", None)
    assert names_in(backend.catalog, where={"language": "en"}) == []
    assert verify(tmp_path / "store") == []
    backend.clear()
    add(backend, "a", None)
    assert backend.catalog.metadata("a") == {}


def test_metadata_can_be_set(backend: MemoryBackend) -> None:
    backend.catalog.set_metadata("c", {"year": 7})
    backend.catalog.set_metadata("a", {})
    assert names_in(backend.catalog, where={"year": [7, 1999]}) == ["c"]
    with pytest.raises(DocumentError, match="no document 'z'"):
        backend.catalog.set_metadata("z", {})
    with pytest.raises(DocumentError, match="'c' must be text, a finite number"):
        backend.catalog.set_metadata("c", {"year": [7]})  # type: ignore[dict-item]
    assert backend.catalog.metadata("c") == {"year": 7}


def test_a_copy_has_it(backend: MemoryBackend, tmp_path: Path) -> None:
    backend.save(tmp_path / "copy")
    assert verify(tmp_path / "copy") == []
    copy = MemoryBackend.open(tmp_path / "copy")
    assert copy.catalog.metadata("b") == KNOWN["b"]
    copy.compact()
    assert names_in(copy.catalog, where={"language": "en"}) == ["a", "d"]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ([("a", 1)], "must be a mapping of text to text, numbers, True or False; got list"),
        ({"": 1}, "keys of the metadata of document 'x' must be text; got ''"),
        ({1: 1}, "must be text; got 1"),
        ({"\ud800": 1}, "must be text; got"),
        ({"a": None}, "got None for 'a'"),
        ({"a": {"b": 1}}, "Make text of it, or several keys"),
        ({"a": math.nan}, "finite number of at most 64 bits, True or False; got nan"),
        ({"a": 2**63}, "at most 64 bits"),
        ({"a": "\ud800"}, "must be text, a finite"),
    ],
)
def test_what_is_no_metadata_is_refused(
    backend: MemoryBackend, metadata: Any, message: str
) -> None:
    with pytest.raises(DocumentError, match=message):
        add(backend, "x", metadata)
    assert not backend.catalog.has_document("x")


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("year=1", "where must be a mapping .* got 'year=1'"),
        ({"year": None}, "got 'year': None"),
        ({"year": [1, {}]}, "text, numbers, True or False, or a list of them"),
        ({1: 1}, "got 1: 1"),
    ],
)
def test_what_is_no_filter_is_refused(backend: MemoryBackend, where: Any, message: str) -> None:
    with pytest.raises(DocumentError, match=message):
        backend.catalog.scope(where=where)


def _connection(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path / "catalog.sqlite", isolation_level=None)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("UPDATE metadata SET value = '{\"year\": 4}'", "the document at row 0 is damaged"),
        ("UPDATE metadata SET first_row = 1", "the document at row 1 is damaged"),
        ("UPDATE metadata SET crc32 = 5", "its checksum does not match"),
    ],
)
def test_damage_is_found(tmp_path: Path, damage: str, message: str) -> None:
    path = tmp_path / "store"
    backend = MemoryBackend(LAYOUT, path=path)
    add(backend, "a", {"year": 3})
    backend.close()
    with _connection(path) as connection:
        connection.execute(damage)
    assert any(message in damaged.reason for damaged in verify(path))
    opened = MemoryBackend.open(path)
    with pytest.raises(StoreError, match=message):
        opened.catalog.scope(where={"year": 3})
    opened.close()


def test_metadata_of_no_document_is_found(tmp_path: Path) -> None:
    path = tmp_path / "store"
    backend = MemoryBackend(LAYOUT, path=path)
    add(backend, "a", {"year": 3})
    with _connection(path) as connection:
        row = connection.execute("SELECT * FROM metadata").fetchone()
    backend.remove_document("a")
    backend.close()
    with _connection(path) as connection:
        connection.execute("INSERT INTO metadata VALUES (?, ?, ?)", row)
    assert [damage.reason for damage in verify(path)] == [
        "there is metadata at row 0, where no document is"
    ]
