"""Disks that are full or cannot be written: the error says so, and the store is as it was."""

from __future__ import annotations

import errno
import os
import re
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import filelock
import pytest

from memory_backends import MemoryBackend, Rows, StoreError, verify
from memory_backends.catalog import catalog
from memory_backends.catalog.database import transaction
from memory_backends.store import Store
from memory_backends.store.copying import copy_store
from memory_backends.testing.checks import assert_fetches, assert_finds
from memory_backends.testing.rows import LAYOUT, make_document, make_queries, make_rows
from tests.memory_backends.test_queries import with_queries
from tests.read_only import forbid_writing

RUNS = [with_queries(make_rows(n, seed=n), n) for n in (70, 60, 80)]
MORE = [with_queries(make_rows(n, seed=n), n) for n in (300, 100)]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    backend = MemoryBackend(LAYOUT, path=tmp_path / "store")
    for name, run in zip("abc", RUNS, strict=True):
        backend.add(make_document(name, len(run)), [run])
    backend.remove_document("b")
    backend.close()
    return tmp_path / "store"


@contextmanager
def files_no_longer_than(num_bytes: int) -> Iterator[None]:
    """Let writes beyond so many bytes of any file fail, as they do on a full disk: after a part."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def assert_as_before(backend: MemoryBackend, store: Path) -> None:
    left = [*range(70), *range(130, 210)]
    for memory in (backend, MemoryBackend.open(store)):
        assert_finds(memory, RUNS, left)
        assert_fetches(memory, RUNS)
        assert memory.catalog.document_names() == ["a", "c"]
        assert memory.sampled_queries(0).shape == (2, 4, 3, 8)
    assert verify(store) == []


def test_a_disk_full_at_any_byte_leaves_the_store_as_it_was(store: Path) -> None:
    backend = MemoryBackend.open(store)
    largest = max(file.stat().st_size for file in store.rglob("*") if file.is_file())
    failed = 0
    for limit in (*range(100, 3000, 700), *range(3000, largest + 60_000, 4111)):
        error = None
        with files_no_longer_than(limit):
            try:
                ids = backend.add(make_document("new", 300), MORE)
            except StoreError as caught:
                error = str(caught)
        if error is None:
            assert ids == range(210, 610)
            break
        failed += 1
        assert re.search(r"too large|disk I/O error|disk is full", error), error
        assert_as_before(backend, store)
    assert failed > 10
    assert_fetches(MemoryBackend.open(store), [*RUNS, *MORE])
    assert verify(store) == []


@pytest.mark.parametrize("write", ["add", "remove", "remove_document", "clear"])
def test_a_catalogue_without_room_stays_as_it_was(store: Path, write: str) -> None:
    backend = MemoryBackend.open(store)
    act = {
        "add": lambda: backend.add(make_document("x", 300), [MORE[0]]),
        "remove": lambda: backend.remove(range(0, 60, 2)),
        "remove_document": lambda: backend.remove_document("a"),
        "clear": backend.clear,
    }[write]
    with files_no_longer_than(2000), pytest.raises(StoreError, match=r"disk I/O error|too large"):
        act()
    assert_as_before(backend, store)
    act()
    assert verify(store) == []


def test_what_was_committed_before_the_disk_was_full_is_kept(tmp_path: Path) -> None:
    """Even in the write that made the store."""
    backend = MemoryBackend(LAYOUT, path=tmp_path / "store")
    runs = [RUNS[0], make_rows(4000, seed=1)]
    documents = [(make_document(str(at), len(run)), [run]) for at, run in enumerate(runs)]
    added: list[tuple[str, range]] = []
    with pytest.raises(StoreError, match="too large"), files_no_longer_than(45_000):
        added.extend(backend.add_many(documents, rows_per_commit=1))
    assert added == [("0", range(70))]
    assert_finds(backend, RUNS, range(70))
    assert_fetches(MemoryBackend.open(tmp_path / "store"), RUNS[:1])
    assert verify(tmp_path / "store") == []


@pytest.mark.parametrize(
    "change",
    [
        lambda backend: backend.add(make_document("d", 300), [MORE[0]]),
        lambda backend: backend.add(make_document("a", 300), [MORE[0]], replace=True),
        lambda backend: backend.remove_document("a"),
        lambda backend: backend.remove([3]),
        lambda backend: backend.clear(),
    ],
    ids=["add", "replace", "remove document", "remove", "clear"],
)
def test_ctrl_c_in_a_commit_leaves_the_memory_as_its_store_is(
    store: Path, change: Callable[[MemoryBackend], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = MemoryBackend.open(store)

    @contextmanager
    def interrupted(connection: sqlite3.Connection) -> Iterator[None]:
        with transaction(connection):
            yield
        raise KeyboardInterrupt

    num_changes = backend.num_changes
    with monkeypatch.context() as patch:
        patch.setattr(catalog, "transaction", interrupted)
        with pytest.raises(KeyboardInterrupt):
            change(backend)
    assert backend.num_changes > num_changes
    expected = MemoryBackend.open(store)
    assert backend.catalog.document_names() == expected.catalog.document_names()
    assert len(backend) == len(expected)
    for layer_idx in LAYOUT.layers:
        queries = make_queries(layer_idx, 4)
        found, right = (each.search(layer_idx, queries, 5) for each in (backend, expected))
        assert torch.equal(found[1], right[1])
    assert backend.add(make_document("e", 100), [MORE[1]]).start == expected.catalog.num_rows


@pytest.mark.parametrize("directory_exists", [False, True])
def test_a_first_write_that_fails_leaves_nothing_and_can_be_tried_again(
    directory_exists: bool, tmp_path: Path
) -> None:
    store = tmp_path / "m"
    if directory_exists:
        store.mkdir()
    backend = MemoryBackend(LAYOUT, path=store)
    backend.catalog.set_setting("model", "some/model")

    def failing() -> Iterator[Rows]:
        yield MORE[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        backend.add(make_document("a", 300), failing())
    assert store.exists() == directory_exists
    assert {file.name for file in tmp_path.rglob("*")} <= {"m", "write.lock"}
    assert len(backend) == 0
    assert backend.add(make_document("a", 70), [RUNS[0]]) == range(70)
    assert MemoryBackend.open(store).catalog.setting("model") == "some/model"


def test_a_first_write_without_room_leaves_nothing(tmp_path: Path) -> None:
    backend = MemoryBackend(LAYOUT, path=tmp_path / "store")
    for limit in (0, 1000, 10_000, 30_000):
        with files_no_longer_than(limit), pytest.raises(StoreError):
            backend.add(make_document("a", 4000), [make_rows(4000, seed=1)])
        assert not (tmp_path / "store").exists()
        assert len(backend) == 0
    backend.add(make_document("a", 70), [RUNS[0]])
    assert_finds(backend, RUNS, range(70))


def test_a_directory_that_cannot_be_written_is_named(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = MemoryBackend.open(store)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(filelock.FileLock, "acquire", refuse)
        message = f"the store at '{store}' cannot be written: Permission denied"
        with pytest.raises(StoreError, match=re.escape(message)):
            backend.remove([1])
    assert_as_before(backend, store)


@pytest.mark.skipif(
    sys.platform == "win32" or os.geteuid() == 0, reason="permissions do not bind this user"
)
def test_a_read_only_store_is_read(store: Path) -> None:
    for path in (store, store / "rows", store / "queries"):
        path.chmod(0o555)
    try:
        backend = MemoryBackend.open(store)
        assert_fetches(backend, RUNS)
        assert backend.is_read_only
        # Of the lock, or of the database if the file of a lock was left that can be written.
        with pytest.raises(StoreError, match=r"Permission denied|readonly database"):
            backend.remove([1])
        backend.save()
        backend.save(store.parent / "copy")
        copy = MemoryBackend.open(store.parent / "copy")
        assert_finds(copy, RUNS, [*range(70), *range(130, 210)])
        assert verify(store.parent / "copy") == []
    finally:
        for path in (store, store / "rows", store / "queries"):
            path.chmod(0o755)


def test_a_store_that_cannot_be_written_is_copied_as_it_is_by_now(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = MemoryBackend.open(store), MemoryBackend.open(store)
    assert not reader.is_read_only
    writer.add(make_document("new", 300), [MORE[0]])

    def copy_while_another_commits(memory: Store, directory: Path) -> None:
        other = sqlite3.connect(store / "catalog.sqlite", timeout=0, isolation_level=None)
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("DELETE FROM documents")
        other.close()
        copy_store(memory, directory)

    monkeypatch.setattr("memory_backends.store.single.copy_store", copy_while_another_commits)
    with monkeypatch.context() as patch:
        forbid_writing(patch, store)
        assert reader.is_read_only
        reader.save(store.parent / "copy")
    assert reader.catalog.document_names() == ["a", "c", "new"]
    copied = MemoryBackend.open(store.parent / "copy")
    assert copied.catalog.document_names() == ["a", "c", "new"]
    left = [*range(70), *range(130, 510)]
    assert_finds(copied, [*RUNS, MORE[0]], left)
    assert verify(store.parent / "copy") == []
    assert_finds(MemoryBackend.open(store), [*RUNS, MORE[0]], left)


def test_index_files_that_are_up_to_date_need_no_permission(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = MemoryBackend.open(store, "vector_db")
    with monkeypatch.context() as patch:
        forbid_writing(patch, store)
        with pytest.raises(StoreError, match="Permission denied"):
            backend.save()  # there are none yet
    backend.save()
    with monkeypatch.context() as patch:
        forbid_writing(patch, store)
        backend.save()
        MemoryBackend.open(store, "vector_db").save()
    backend.remove([1])
    with monkeypatch.context() as patch:
        forbid_writing(patch, store)
        with pytest.raises(StoreError, match="Permission denied"):
            backend.save()


@pytest.mark.parametrize("begin", ["BEGIN IMMEDIATE", "BEGIN"])
def test_ctrl_c_right_after_a_beginning_ends_it(store: Path, begin: str) -> None:
    backend = MemoryBackend.open(store)
    real = backend.catalog.connection

    class Interrupted:
        def __getattr__(self, name: str) -> object:
            return getattr(real, name)

        def execute(self, statement: str, *given: object) -> object:
            result = real.execute(statement, *given)
            if statement == begin:
                raise KeyboardInterrupt
            return result

    backend.catalog.connection = cast(Any, Interrupted())
    with pytest.raises(KeyboardInterrupt):
        backend.remove_document("a")
    backend.catalog.connection = real
    assert not real.in_transaction
    backend.remove_document("a")
