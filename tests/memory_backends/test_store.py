"""Opening, copying and locking a store, and what is refused as none."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import Any

import torch
import filelock
import pytest

from memory_backends import (
    LayerLayout,
    MemoryBackend,
    MemoryLayout,
    MemoryMismatchError,
    StoreError,
    verify,
)
from memory_backends.testing.checks import assert_fetches, assert_finds
from memory_backends.testing.rows import IDENTITY, LAYOUT, make_document, make_rows

RUNS = [make_rows(10, seed=1, sinks=[0]), make_rows(7, seed=2, sinks=[0])]
FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture(params=["exact", "int8"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A store of 17 rows of two documents."""
    path = tmp_path / "store"
    backend = MemoryBackend(LAYOUT, path=path, identity=IDENTITY, row_codec=request.param)
    for name, rows in zip("ab", RUNS, strict=True):
        backend.add(make_document(name, len(rows)), [rows])
    backend.close()
    return path


def files_of(store: Path) -> dict[str, bytes]:
    """Return the bytes of all files of a store, its lock and SQLite's own journal apart."""
    return {
        str(file.relative_to(store)): file.read_bytes()
        for file in store.rglob("*")
        if file.is_file() and file.name not in ("write.lock", "catalog.sqlite-journal")
    }


def test_a_second_writer_is_refused(store: Path) -> None:
    backend = MemoryBackend.open(store)
    with filelock.FileLock(store / "write.lock"):
        for write in (
            lambda: backend.add(make_document("c", 10), [RUNS[0]]),
            lambda: backend.remove([1]),
            lambda: backend.remove_document("a"),
            backend.clear,
        ):
            with pytest.raises(StoreError, match=re.escape(f"is writing to '{store}'")):
                write()
        assert_finds(backend, RUNS, range(17))
    backend.remove([1])
    assert len(backend) == 16


def test_a_disk_that_is_full_when_synced_leaves_the_store_as_it_was(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, before = MemoryBackend.open(store), files_of(store)

    def fail(*_: Any, **__: Any) -> Any:
        raise FULL

    with monkeypatch.context() as patch:
        patch.setattr("memory_backends.rows.append_files.os.fsync", fail)
        with pytest.raises(StoreError, match=f"{re.escape(str(store))}.*No space left on device"):
            backend.add(make_document("c", 10), [RUNS[0]])
    assert files_of(store) == before
    assert_finds(backend, RUNS, range(17))
    assert backend.add(make_document("c", 10), [RUNS[0]]) == range(17, 27)
    assert_fetches(MemoryBackend.open(store), [*RUNS, RUNS[0]])
    assert verify(store) == []


def test_what_a_killed_writer_left_is_overwritten(store: Path) -> None:
    for file in (store / "rows").iterdir():
        with file.open("ab") as tail:
            tail.write(b"\xff" * 1000)
    backend = MemoryBackend.open(store)
    assert_finds(backend, RUNS, range(17))
    more = make_rows(4, seed=5)
    backend.add(make_document("c", 4), [more])
    assert_fetches(MemoryBackend.open(store), [*RUNS, more])


def test_what_was_killed_before_it_was_a_store_is_none(tmp_path: Path) -> None:
    (tmp_path / "write.lock").touch()
    (tmp_path / "catalog.sqlite.partial").write_bytes(b"SQLite")
    MemoryBackend(LAYOUT, path=tmp_path).add(make_document("a", 10), [RUNS[0]])
    assert_finds(MemoryBackend.open(tmp_path), RUNS, range(10))


# -- copies -------------------------------------------------------------------------------------


def test_a_memory_in_ram_has_no_path_to_be_saved_to() -> None:
    with pytest.raises(StoreError, match="this memory has no path"):
        MemoryBackend(LAYOUT).save()


def test_a_copy_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("hello")
    with pytest.raises(StoreError, match=re.escape(f"'{tmp_path}'; it is not empty")):
        MemoryBackend(LAYOUT).save(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_copy_that_fails_can_be_made_again(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, copy = MemoryBackend.open(store), tmp_path / "copy"

    def fail(_: int) -> None:
        raise FULL

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(StoreError, match=f"'{re.escape(str(copy))}' cannot be written"):
            backend.save(copy)
    backend.save(copy)
    assert_finds(MemoryBackend.open(copy), RUNS, range(17))


# -- what is refused ----------------------------------------------------------------------------


def test_another_models_store_is_refused(store: Path) -> None:
    with pytest.raises(MemoryMismatchError, match=f"'{store}'.* 'tiny', this model 'huge'"):
        MemoryBackend(LAYOUT, path=store, identity={"architecture": "huge"})
    same = MemoryBackend(LAYOUT, path=store, identity={"layers": 4, "tokenizer": "only here"})
    assert_finds(same, RUNS, range(17))


def test_another_layouts_store_is_refused(store: Path) -> None:
    layout = MemoryLayout({0: LayerLayout(2, 8, 8)}, torch.float16)
    with pytest.raises(MemoryMismatchError, match=r"float32.*3.* this model has .*float16"):
        MemoryBackend(layout, path=store)


@pytest.mark.parametrize("memory_type", ["manual", "vector_db"])
def test_a_path_without_a_store_is_refused(memory_type: str, tmp_path: Path) -> None:
    file, folder, nowhere = tmp_path / "file", tmp_path / "folder", tmp_path / "nowhere"
    file.write_text("hello")
    folder.mkdir()
    (folder / "thesis.tex").write_text("hello")
    for path, message in ((file, f"'{file}'; it is a file"), (folder, f"'{folder}'; found none")):
        with pytest.raises(StoreError, match=re.escape(message)):
            MemoryBackend(LAYOUT, memory_type, path=path)
        with pytest.raises(StoreError, match=re.escape(message)):
            MemoryBackend.open(path, memory_type)
    with pytest.raises(StoreError, match="found none"):
        MemoryBackend.open(nowhere, memory_type)
    assert not nowhere.exists()
    assert (folder / "thesis.tex").read_text() == "hello"


@pytest.mark.parametrize(
    ("damage", "message"),
    [(b"", "no such table"), (b"not a database at all" * 100, "file is not a database")],
)
def test_a_damaged_catalogue_is_found(store: Path, damage: bytes, message: str) -> None:
    (store / "catalog.sqlite").write_bytes(damage)
    with pytest.raises(StoreError, match=f"{re.escape(str(store))}.*{message}"):
        MemoryBackend.open(store)
