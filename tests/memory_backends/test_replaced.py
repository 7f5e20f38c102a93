"""A store that is removed or replaced while it is open: nobody reads or writes another's rows."""

import shutil
from pathlib import Path

import torch
import pytest

from memory_backends import MemoryBackend
from memory_backends.errors import StoreReplacedError
from memory_backends.testing.checks import assert_fetches, assert_finds
from memory_backends.testing.rows import LAYOUT, make_document, make_queries, make_rows

OLD, NEW = make_rows(10, seed=1), make_rows(10, seed=2)
KINDS = ["manual", "vector_db"]


def store(path: Path, rows, *names: str) -> Path:
    """Make a store of documents with the same rows."""
    backend = MemoryBackend(LAYOUT, "vector_db", path=path)
    for name in names:
        backend.add(make_document(name, len(rows)), [rows])
    backend.save()
    backend.close()
    return path


def removed(path: Path) -> None:
    shutil.rmtree(path)


def made_anew(path: Path) -> None:
    shutil.rmtree(path)
    store(path, NEW, "new")


def moved_here(path: Path) -> None:
    store(path.with_name("fresh"), NEW, "new")
    path.rename(path.with_name("before"))
    path.with_name("fresh").rename(path)


def catalog_alone(path: Path) -> None:
    other = store(path.with_name("other"), NEW, "new")
    (other / "catalog.sqlite").replace(path / "catalog.sqlite")


WAYS = {way.__name__: way for way in (removed, made_anew, moved_here, catalog_alone)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_refreshing_and_writing_say_so_and_change_nothing(tmp_path, way, kind):
    path = store(tmp_path / "store", OLD, "old")
    backend = MemoryBackend.open(path, kind)
    WAYS[way](path)
    says = "was removed" if way == "removed" else "was replaced by another one"
    changes = [
        backend.refresh,
        lambda: backend.add(make_document("more", 10), [OLD]),
        lambda: backend.remove([0]),
        lambda: backend.remove_document("old"),
        backend.clear,
        backend.compact,
        lambda: backend.set_setting("mine", 1),
    ]
    before = (
        {} if way == "removed" else {p: p.read_bytes() for p in path.rglob("*.*") if p.is_file()}
    )
    for _ in range(2):
        for change in changes:
            with pytest.raises(StoreReplacedError, match=f"{path}.*{says}"):
                change()
    assert path.exists() == (way != "removed")
    assert before == {p: p.read_bytes() for p in path.rglob("*.*") if p.is_file()}
    assert backend.catalog.document_names() == ["old"]
    assert_fetches(backend, [OLD])
    backend.save(tmp_path / "copy")
    backend.close()
    copy = MemoryBackend.open(tmp_path / "copy", kind)
    assert_finds(copy, [OLD], range(10))
    if way in ("made_anew", "moved_here"):
        again = MemoryBackend.open(path, kind)
        assert again.catalog.document_names() == ["new"]
        assert_finds(again, [NEW], range(10))


@pytest.mark.parametrize("kind", KINDS)
def test_a_link_that_leads_to_another_store(tmp_path, kind):
    for name, rows in (("one", OLD), ("two", NEW)):
        store(tmp_path / name, rows, name)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "one")
    backend = MemoryBackend.open(link, kind)
    backend.refresh()
    link.unlink()
    link.symlink_to(tmp_path / "two")
    with pytest.raises(StoreReplacedError, match="replaced"):
        backend.refresh()
    if kind == "manual":
        assert_finds(backend, [OLD], range(10))
    else:  # the index was not read before, and another one is there now
        with pytest.raises(StoreReplacedError, match=r"index/000001.*replaced"):
            assert_finds(backend, [OLD], range(10))
    link.unlink()
    link.symlink_to(tmp_path / "one")
    backend.refresh()
    assert_finds(backend, [OLD], range(10))


def test_a_backup_that_is_put_back_over_the_files(tmp_path):
    path = store(tmp_path / "store", OLD, "old")
    shutil.copytree(path, tmp_path / "backup")
    writer = MemoryBackend.open(path)
    writer.add(make_document("more", 10), [NEW])
    writer.close()
    reader = MemoryBackend.open(path)
    shutil.copyfile(tmp_path / "backup" / "catalog.sqlite", path / "catalog.sqlite")
    for _ in range(2):
        with pytest.raises(StoreReplacedError, match="replaced"):
            reader.refresh()


def test_going_to_another_folder_replaces_nothing(tmp_path, monkeypatch):
    store(tmp_path / "store", OLD, "old")
    monkeypatch.chdir(tmp_path)
    backend = MemoryBackend.open("store", "vector_db")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    backend.refresh()
    assert_fetches(backend, [OLD])


def test_a_path_below_a_file(tmp_path):
    path = store(tmp_path / "store", OLD, "old")
    backend = MemoryBackend.open(path)
    shutil.rmtree(path)
    path.write_text("not a store")
    with pytest.raises(StoreReplacedError, match="replaced"):
        backend.refresh()
    assert torch.isfinite(backend.search(0, make_queries(0, 2), 3).scores).all()
