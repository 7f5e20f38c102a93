"""Damage of every kind is named, or does no harm."""

from __future__ import annotations

import json
import shutil
import sqlite3
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import numpy as np
import pytest

from memory_backends import (
    Damage,
    Document,
    DocumentError,
    EMTError,
    MemoryBackend,
    Rows,
    StoreError,
    verify,
)
from memory_backends.catalog.records import record_crc32
from memory_backends.testing.rows import IDENTITY, LAYERS, LAYOUT, make_queries, make_rows
from tests.memory_backends.test_queries import with_queries


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 27 rows: 'a', 'gone' (removed), 'b'; row 3 is removed, too."""
    path = tmp_path_factory.mktemp("original") / "store"
    backend = MemoryBackend(LAYOUT, "vector_db", path=path, identity=IDENTITY)
    for at, (name, num_rows) in enumerate((("a", 10), ("gone", 8), ("b", 9))):
        spans = np.array([[i, i + 1] for i in range(num_rows)], dtype=np.int32)
        tokens = np.arange(num_rows, dtype=np.int32)
        metadata = None if name == "b" else {"number": at, "language": "en"}
        document = Document(name, tokens, f"text of {name}"[:num_rows], spans, metadata)
        backend.add(document, [with_queries(make_rows(num_rows, seed=at, sinks=[0]), at)])
    backend.remove_document("gone")
    backend.remove([3])
    backend.save()
    backend.close()
    (path / "write.lock").unlink(missing_ok=True)
    return path


@pytest.fixture
def store(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "store"))


def answers(path: Path) -> list[Any]:
    """Return everything that a store answers, as plain Python types."""
    result: list[Any] = []
    for kind in ("manual", "vector_db"):
        backend = MemoryBackend.open(path, kind, sinks="one")
        try:
            result += [len(backend), dict(backend.catalog.identity), backend.layout.to_json()]
            result.append(backend.catalog.document_sizes())
            result.append(backend.catalog.document_of_rows(range(27)))
            for name in ("a", "b"):
                document = backend.catalog.document(name)
                assert document.offsets is not None
                result += [document.metadata, backend.catalog.scope(where={"number": 0}).spans]
                result += [name, document.text, document.token_ids.tolist(), document.first_row]
                result += [document.row_tokens.tolist(), document.sink_rows.tolist()]
                result += [document.offsets.tolist(), backend.catalog.content_hash(name)]
            for layer_idx, layer in LAYERS.items():
                ids = torch.tensor([*range(10), *range(18, 27)])
                rows = backend.fetch(layer_idx, ids.expand(layer.num_key_value_heads, -1))
                result += [part.numpy().tobytes() for part in rows]
                nearest = backend.search(layer_idx, make_queries(layer_idx, 3), 30)
                result += [nearest.ids.tolist(), nearest.scores.tolist()]
                result.append(backend.sampled_queries(layer_idx).tolist())
        finally:
            backend.close()
    return result


def files_of(path: Path) -> list[Path]:
    """Return the files that `verify` must know everything about."""
    return sorted(
        file
        for folder in (path, path / "rows", path / "queries")
        for file in folder.iterdir()
        if file.is_file()
    )


def test_a_good_store_has_no_damage(store: Path) -> None:
    assert [str(file.relative_to(store)) for file in files_of(store)] == [
        "catalog.sqlite",
        "queries/layer-000.bin",
        "queries/layer-003.bin",
        "rows/layer-000.bin",
        "rows/layer-003.bin",
    ]
    assert verify(store) == []
    for file in (store / "rows").iterdir():  # what a killed writer leaves does no harm
        with file.open("ab") as tail:
            tail.write(b"\xff" * 1000)
    (store / "rows" / "layer-000.bin.partial").touch()
    assert verify(store) == []


def test_every_truncation_is_found_when_opening(store: Path) -> None:
    for file in files_of(store):
        clean = file.read_bytes()
        for length in (0, 1, len(clean) // 2, len(clean) - 1):
            file.write_bytes(clean[:length])
            with pytest.raises(EMTError):
                answers(store)
            damage = verify(store)
            assert str(file.relative_to(store)) in {each.file for each in damage}
        file.unlink()
        with pytest.raises(StoreError, match=file.name):
            MemoryBackend.open(store)
        file.write_bytes(clean)


@pytest.mark.parametrize(
    ("file", "at", "reason"),
    [
        ("rows/layer-003.bin", 0, "document 'a': the checksum does not match"),
        ("rows/layer-000.bin", 26 * 128 + 127, "document 'b': the checksum does not match"),
        ("queries/layer-000.bin", 1, "samples 0 to 0: the checksum does not match"),
    ],
)
def test_the_damaged_part_is_named(store: Path, file: str, at: int, reason: str) -> None:
    data = bytearray((store / file).read_bytes())
    data[at] ^= 1
    (store / file).write_bytes(data)
    assert verify(store) == [Damage(file, reason)]


def test_rows_of_a_removed_document_are_nobodys(store: Path) -> None:
    file = store / "rows" / "layer-000.bin"
    data = bytearray(file.read_bytes())
    data[10 * 128 : 18 * 128] = bytes(8 * 128)
    file.write_bytes(data)
    assert verify(store) == []


def changed(statement: str, *parameters: Any) -> Callable[[Path], None]:
    def change(store: Path) -> None:
        with sqlite3.connect(store / "catalog.sqlite") as connection:
            connection.execute(statement, parameters)
        connection.close()

    return change


def with_files(files: dict[str, Any], generation: str = "000001") -> Callable[[Path], None]:
    text = json.dumps({"files": files, "generation": generation}, sort_keys=True)
    return changed(
        "UPDATE settings SET value = ?, crc32 = ? WHERE key = 'index'",
        text,
        record_crc32(("index", text)),
    )


CATALOG, IDS = "catalog.sqlite", "index/000001/ids.bin"


@pytest.mark.parametrize(
    ("change", "file", "reason"),
    [
        (changed("DELETE FROM removed WHERE first_row = 10"), CATALOG, "[(0, 10), (18, 27)]"),
        (
            changed("INSERT INTO removed VALUES (20, 40, ?)", record_crc32((20, 40))),
            CATALOG,
            "those that are: [(0, 40)]",
        ),
        (changed("UPDATE documents SET text = 'x' WHERE name = 'b'"), CATALOG, "document 'b'"),
        (changed("UPDATE settings SET crc32 = 5 WHERE key = 'index'"), CATALOG, "setting 'index'"),
        (
            changed("DELETE FROM query_samples WHERE layer = 3 AND first_sample = 0"),
            CATALOG,
            "sample 0 of layer 3 has no checksum",
        ),
        (changed("CREATE TABLE more (x)"), CATALOG, "tables of format version 1"),
        (
            lambda store: (store / "rows" / "layer-001.bin").touch(),
            "rows/layer-001.bin",
            "is not part of the store",
        ),
        (with_files({"ids.bin": {"size": 1, "crc32": 0}}), IDS, "has 144 bytes; expected 1"),
        (with_files({"ids.bin": {"size": 144, "crc32": 0}}), IDS, "checksum does not match"),
        (
            with_files({"gone.faiss": {"size": 1, "crc32": 0}}),
            "index/000001/gone.faiss",
            "cannot be read: No such file",
        ),
        (with_files({"../../out": {"size": 1, "crc32": 0}}), CATALOG, "got '../../out'"),
        (with_files({}, "../000001"), CATALOG, "got '../000001'"),
        (with_files({"ids.bin": 5}), CATALOG, "'index' is damaged: it describes no files"),
    ],
)
def test_what_does_not_fit_together_is_named(
    store: Path, change: Callable[[Path], None], file: str, reason: str
) -> None:
    change(store)
    assert any(each.file == file and reason in each.reason for each in verify(store))


def test_checksums_of_index_files_are_compared(store: Path) -> None:
    ids = (store / "index" / "000001" / "ids.bin").read_bytes()
    with_files({"ids.bin": {"size": len(ids), "crc32": zlib.crc32(ids)}})(store)
    assert verify(store) == []


def test_a_store_of_another_version_is_not_called_damaged(store: Path, tmp_path: Path) -> None:
    changed("UPDATE settings SET value = '2' WHERE key = 'format_version'")(store)
    with pytest.raises(StoreError, match="has format version 2; this emt reads version 1"):
        verify(store)
    with pytest.raises(StoreError, match="found none"):
        verify(tmp_path / "nowhere")


def test_a_copy_of_damaged_rows_is_refused(store: Path, tmp_path: Path) -> None:
    data = bytearray((store / "rows" / "layer-003.bin").read_bytes())
    data[-1] ^= 1
    (store / "rows" / "layer-003.bin").write_bytes(data)
    backend = MemoryBackend.open(store)
    with pytest.raises(StoreError, match=r"the rows of document 'b' in '.*' are damaged"):
        backend.save(tmp_path / "copy")
    assert not list((tmp_path / "copy").iterdir())


def test_a_copy_has_no_damage_and_no_removed_documents(store: Path, tmp_path: Path) -> None:
    MemoryBackend.open(store).save(tmp_path / "copy")
    assert verify(tmp_path / "copy") == []
    assert answers(tmp_path / "copy") == answers(store)
    rows = (tmp_path / "copy" / "rows" / "layer-000.bin").read_bytes()
    assert rows[10 * 128 : 18 * 128] == bytes(8 * 128)
    assert (store / "rows" / "layer-000.bin").stat().st_size == len(rows)


def test_a_memory_from_ram_is_saved_with_checksums(tmp_path: Path) -> None:
    def runs() -> Iterator[Rows]:
        yield with_queries(make_rows(5, seed=1), 1)
        yield with_queries(make_rows(5, seed=2, first=5), 2)

    backend = MemoryBackend(LAYOUT)
    for name in "ab":
        backend.add(Document(name, np.arange(10, dtype=np.int32)), runs())
    backend.remove_document("a")
    backend.save(tmp_path / "copy")
    assert verify(tmp_path / "copy") == []
    data = bytearray((tmp_path / "copy" / "rows" / "layer-000.bin").read_bytes())
    data[-1] ^= 1
    (tmp_path / "copy" / "rows" / "layer-000.bin").write_bytes(data)
    reason = "document 'b': the checksum does not match"
    assert verify(tmp_path / "copy") == [Damage("rows/layer-000.bin", reason)]
    with pytest.raises(DocumentError, match="no document 'a'"):
        MemoryBackend.open(tmp_path / "copy").catalog.document("a")
