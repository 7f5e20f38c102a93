"""A memory with shards is the memory that one store is, whatever happens to it."""

from __future__ import annotations

import contextlib
import logging
import shutil
import sqlite3
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import pytest

from memory_backends import MemoryBackend, StoreError, verify
from memory_backends.catalog import Catalog
from memory_backends.errors import DocumentError
from memory_backends.search.scores import Search, SearchResult
from memory_backends.sharded import (
    LocalShard,
    ShardedStore,
    ShardMissingError,
    ShardRecord,
    ShardSettings,
    adopt,
    make_sharded,
    open_shard,
    shard_of,
    shards_at,
)
from memory_backends.testing.rows import IDENTITY, LAYOUT, make_document, make_rows
from tests.memory_backends.sharded.worlds import (
    SIZES,
    assert_same,
    document,
    filled,
    found,
    searches,
    sharded,
)


@pytest.mark.parametrize("shard_type", ["manual", "vector_db"])
@pytest.mark.parametrize("sinks", ["all", "one"])
@pytest.mark.parametrize("num_shards", [1, 2, 5])
def test_it_is_the_memory_that_one_store_is(
    tmp_path: Path, num_shards: int, sinks: Any, shard_type: str
) -> None:
    """Also after replacements and removals, saving, and opening again."""
    one = MemoryBackend(LAYOUT, path=tmp_path / "one", identity=IDENTITY, sinks=sinks)
    path = tmp_path / "many"
    many = sharded(path, num_shards, sinks=sinks, shard_type=shard_type)
    for memory in (one, many):
        filled(memory)
    assert_same(one, many)
    for memory in (one, many):
        filled(memory, ["d2", "d9", "new"], seed=50)
        memory.remove_document("d0")
        memory.remove([20, 21, 40])
        memory.set_metadata("d4", {"other": 1})
    assert_same(one, many)
    many.save()
    many.close()
    for kind in ("manual", "vector_db", "sharded"):
        reopened = MemoryBackend.open(path, kind, sinks=sinks)
        assert reopened.memory_type == "sharded"
        assert_same(one, reopened)
        reopened.close()
    assert verify(path) == []
    many = MemoryBackend.open(path, sinks=sinks)
    many.compact()
    assert_same(one, many)
    assert verify(path) == []


def test_a_document_is_in_the_shard_that_its_name_says(tmp_path: Path) -> None:
    filled(sharded(tmp_path, 3)).close()
    for number, path in enumerate(shards_at(tmp_path)):
        with contextlib.closing(Catalog.open(path)) as catalog:
            expected = [name for name in SIZES if shard_of(name, 3) == number]
            assert catalog.document_names() == expected
    assert [shard_of(name, 5) for name in ("a", "b", "c")] == [0, 1, 0]  # it must never change


def test_a_prompt_is_two_messages_a_shard(tmp_path: Path) -> None:
    """One with all searches, and one for all rows at all layers."""
    memory = filled(sharded(tmp_path, 4))
    assert isinstance(memory.store, ShardedStore)
    shards = memory.store.shards
    before = shards.num_messages
    hits = memory.search_many(searches())
    assert shards.num_messages == before + 4
    memory.fetch_layers(hits[0].ids[0])
    assert shards.num_messages == before + 8


# -- adopting -----------------------------------------------------------------------------------


def own_names(number: int, num_shards: int = 2) -> list[str]:
    return [name for name in SIZES if shard_of(name, num_shards) == number]


def test_what_others_write_to_shards_is_adopted(tmp_path: Path) -> None:
    """New, replaced and removed documents, metadata and rows; the second time nothing."""
    make_sharded(tmp_path, LAYOUT, num_shards=2, identity=IDENTITY)
    paths = shards_at(tmp_path)
    for number, path in enumerate(paths):
        with contextlib.closing(MemoryBackend.open(path)) as worker:
            filled(worker, own_names(number))
    memory = MemoryBackend.open(tmp_path)
    assert memory.catalog.document_names() == []
    assert adopt(tmp_path) == (12, 0)
    assert adopt(tmp_path) == (0, 0)
    memory.refresh()
    assert sorted(memory.catalog.document_names()) == sorted(SIZES)
    assert len(memory) == sum(SIZES.values())
    replaced, removed, changed, *_ = own_names(1)
    with contextlib.closing(MemoryBackend.open(paths[1])) as worker:
        filled(worker, [replaced], seed=70)
        worker.remove_document(removed)
        worker.set_metadata(changed, {"k": "v"})
        worker.remove([worker.catalog.document(changed).first_row + 1])
    before = memory.catalog.document(changed).first_row
    memory.add(document("more"), [make_rows(9, 5)])  # any write adopts
    names = memory.catalog.document_names()
    assert names[-2:] == [replaced, "more"]
    assert removed not in names
    assert memory.catalog.metadata(changed) == {"k": "v"}
    assert before + 1 not in memory.catalog.searchable_rows("all").tolist()
    assert verify(tmp_path) == []


def test_a_write_that_was_cut_between_its_two_steps_is_ended_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is lost, doubled or half there; until then nothing has changed."""
    one, many = MemoryBackend(LAYOUT, identity=IDENTITY), sharded(tmp_path, 2)
    for memory in (one, many):
        filled(memory, ["d0", "d1"])
    rows = [make_rows(6, 77)]
    with monkeypatch.context() as patch:

        def fail(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        patch.setattr("memory_backends.sharded.placements.Placements.add", fail)
        with pytest.raises(KeyboardInterrupt):
            many.add(document("d1"), rows, replace=True)
    reader = MemoryBackend.open(tmp_path)
    assert_same(one, reader)
    one.add(document("d1"), rows, replace=True)  # which the other's next write adopts
    for memory in (one, many):
        memory.add(document("d2"), [make_rows(7, 3)])
    assert_same(one, many)
    reader.refresh()
    assert_same(one, reader)
    assert verify(tmp_path) == []


@pytest.mark.parametrize("change", ["remove_rows", "set_metadata"])
def test_a_change_that_was_cut_between_its_two_steps_is_ended_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """By the same object, too, whose shard has seen its own change already."""
    many = sharded(tmp_path, 2)
    filled(many, ["d0", "d1"])
    row = many.catalog.document("d1").first_row + 1
    many.add(document("d2"), [make_rows(7, 3)])
    with monkeypatch.context() as patch:

        def fail(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(many.catalog, change, fail)
        given: Any = ([row],) if change == "remove_rows" else ("d1", {"k": "v"})
        with pytest.raises(KeyboardInterrupt):
            getattr(many, {"remove_rows": "remove"}.get(change, change))(*given)
    many.add(document("d3"), [make_rows(8, 4)])
    if change == "remove_rows":
        assert row not in many.catalog.searchable_rows("all").tolist()
    else:
        assert many.catalog.metadata("d1") == {"k": "v"}


def test_a_name_that_cannot_be_stored_is_refused_and_those_before_it_are_kept(
    tmp_path: Path,
) -> None:
    """In one store and in several, whatever shards the documents belong to."""
    names = ["d0", "d1", "d2", "\udce9.txt", "d3"]
    entries = [(make_document(name, 9), [make_rows(9, at)]) for at, name in enumerate(names)]
    for memory in (MemoryBackend(LAYOUT, identity=IDENTITY), sharded(tmp_path, 3)):
        with pytest.raises(DocumentError, match="not Unicode"):
            list(memory.add_many(entries))
        assert memory.catalog.document_names() == names[:3]


def test_a_document_in_a_wrong_shard_is_refused(tmp_path: Path) -> None:
    make_sharded(tmp_path, LAYOUT, num_shards=2, identity=IDENTITY)
    with contextlib.closing(MemoryBackend.open(shards_at(tmp_path)[0])) as worker:
        worker.add(document(own_names(1)[0]), [make_rows(3, 1)])
    with pytest.raises(StoreError, match=r"is in shard 0 .*; it belongs to shard 1"):
        adopt(tmp_path)


def test_a_store_whose_making_was_cut_is_made_by_the_next(tmp_path: Path) -> None:
    """Whether the catalogue was there, or not yet."""
    make_sharded(tmp_path / "made", LAYOUT, num_shards=2, identity=IDENTITY)
    (tmp_path / "made" / "shards").rename(tmp_path / "made" / "shards.partial")
    filled(MemoryBackend.open(tmp_path / "made")).close()
    assert verify(tmp_path / "made") == []
    make_sharded(tmp_path / "cut", LAYOUT, num_shards=2, identity=IDENTITY)
    (tmp_path / "cut" / "shards").rename(tmp_path / "cut" / "shards.partial")
    (tmp_path / "cut" / "catalog.sqlite").unlink()
    filled(sharded(tmp_path / "cut", 3)).close()
    assert verify(tmp_path / "cut") == []
    assert len(shards_at(tmp_path / "cut")) == 3


def test_documents_that_an_older_copy_of_a_shard_has_not_are_removed_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second, *_ = own_names(1)
    store = tmp_path / "store"
    with contextlib.closing(sharded(store, 2)) as memory:
        filled(memory, [first])
    shutil.copytree(store / "shards/00001", tmp_path / "older")
    with contextlib.closing(MemoryBackend.open(store)) as memory:
        filled(memory, [second, own_names(0)[0]])
    shutil.rmtree(store / "shards/00001")
    (tmp_path / "older").rename(store / "shards/00001")
    with caplog.at_level(logging.WARNING):
        assert adopt(store) == (0, 1)
    assert "is an older copy" in caplog.text
    with contextlib.closing(MemoryBackend.open(store)) as memory:
        assert sorted(memory.catalog.document_names()) == sorted([first, own_names(0)[0]])
        filled(memory, ["a longer name", *own_names(1)[3:5], second], seed=9)
        names = memory.catalog.document_names()
        assert second in names
        one = MemoryBackend(LAYOUT)
        filled(one, [first])
        filled(one, [own_names(0)[0]], seed=1)
        filled(one, names[2:], seed=9)
        for search in searches():  # rows of the shard that are written again are the new ones
            hits, expected = found(memory, search), found(one, search)
            torch.testing.assert_close(hits.scores, expected.scores)
            owners = [
                each.catalog.document_of_rows(ids.flatten().tolist())
                for each, ids in ((memory, hits.ids), (one, expected.ids))
            ]
            ranked = [
                [of[row] for row in ids.flatten().tolist()]
                for of, ids in zip(owners, (hits.ids, expected.ids), strict=True)
            ]
            assert ranked[0] == ranked[1]
    assert verify(store) == []


# -- missing shards -----------------------------------------------------------------------------


def test_a_missing_shard_is_an_error(tmp_path: Path) -> None:
    filled(sharded(tmp_path, 3)).close()
    shutil.move(tmp_path / "shards/00001", tmp_path / "away")
    with pytest.raises(ShardMissingError, match=r"shard 1 of .*00001.*Put the shard back"):
        MemoryBackend.open(tmp_path)
    (damage,) = verify(tmp_path)
    assert damage.file == "shards/00001"


def test_or_the_others_answer_and_it_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Until the shard is back."""
    one = filled(MemoryBackend(LAYOUT, identity=IDENTITY))
    many = filled(sharded(tmp_path, 3))
    many.close()
    shutil.move(tmp_path / "shards/00001", tmp_path / "away")
    with caplog.at_level(logging.WARNING):
        memory = MemoryBackend.open(tmp_path, "sharded", missing_shards="warn", shard_type="manual")
    assert "shard 1 of" in caplog.text
    assert memory.missing_shards == (1,)
    left = [name for name in SIZES if shard_of(name, 3) != 1]
    assert memory.readable(None) == one.catalog.scope(left)
    for search in searches(one.catalog.scope(left)):
        expected = found(one, search)
        assert found(memory, search).ids.tolist() == expected.ids.tolist()
        assert found(memory, search._replace(scope=None)).ids.tolist() == expected.ids.tolist()
    lost = memory.catalog.document(next(name for name in SIZES if shard_of(name, 3) == 1))
    with pytest.raises(ShardMissingError, match="shard 1"):
        memory.fetch_layers(torch.tensor([lost.first_row]))
    with pytest.raises(ShardMissingError, match="shard 1"):
        memory.add(document("more"), [make_rows(9, 5)])
    shutil.move(tmp_path / "away", tmp_path / "shards/00001")
    memory.refresh()
    assert memory.missing_shards == ()
    memory.add(document("more"), [make_rows(9, 5)])
    one.add(document("more"), [make_rows(9, 5)])
    assert_same(one, memory)


def test_shards_in_each_others_places_are_refused(tmp_path: Path) -> None:
    filled(sharded(tmp_path, 2)).close()
    for source, target in (("00000", "x"), ("00001", "00000"), ("x", "00001")):
        (tmp_path / "shards" / source).rename(tmp_path / "shards" / target)
    with pytest.raises(ShardMissingError, match="is not the shard that is expected there"):
        MemoryBackend.open(tmp_path)


class SlowShard(LocalShard):
    """Waits before it searches."""

    def __init__(self, backend: MemoryBackend, wait: threading.Event) -> None:
        super().__init__(backend)
        self._wait = wait

    def search(self, searches: Sequence[Search]) -> list[SearchResult]:
        self._wait.wait(10)
        return super().search(searches)


@pytest.mark.parametrize("missing_shards", ["error", "warn"])
def test_a_shard_has_a_time_to_answer(tmp_path: Path, missing_shards: str) -> None:
    filled(sharded(tmp_path, 2)).close()
    go_on = threading.Event()

    def connect(record: ShardRecord, settings: ShardSettings) -> Any:
        backend = open_shard(record, settings)
        return SlowShard(backend, go_on) if record.number else LocalShard(backend)

    options: Mapping[str, Any] = {"connect": connect, "time_limit": 0.2}
    memory = MemoryBackend.open(
        tmp_path, "sharded", missing_shards=missing_shards, shard_type="manual", **options
    )
    search = searches()[0]
    if missing_shards == "error":
        with pytest.raises(ShardMissingError, match=r"shard 1 .* no answer within 0.2 s"):
            found(memory, search)
    else:
        hits = found(memory, search)
        owners = memory.catalog.document_of_rows(hits.ids[hits.ids >= 0].tolist())
        assert {shard_of(name, 2) for name in owners.values()} == {0}
        assert memory.missing_shards == (1,)
    go_on.set()
    memory.refresh()
    assert memory.missing_shards == ()
    assert len(found(memory, search).ids)
    memory.close()


# -- damage -------------------------------------------------------------------------------------


def test_damage_in_a_shard_is_named(tmp_path: Path) -> None:
    filled(sharded(tmp_path, 2)).close()
    file = tmp_path / "shards/00001/rows/layer-003.bin"
    data = bytearray(file.read_bytes())
    data[7] ^= 1
    file.write_bytes(data)
    (damage,) = verify(tmp_path)
    assert damage.file == "shards/00001/rows/layer-003.bin"


def test_damaged_placements_are_refused(tmp_path: Path) -> None:
    filled(sharded(tmp_path, 2)).close()
    with contextlib.closing(sqlite3.connect(tmp_path / "shards.sqlite3")) as connection:
        connection.execute("UPDATE placements SET shard_row = shard_row + 1 WHERE first_row = 0")
        connection.commit()
    with pytest.raises(StoreError, match=r"placement.* is damaged"):
        MemoryBackend.open(tmp_path)
    assert [damage.file for damage in verify(tmp_path)] == ["shards.sqlite3"]


def test_a_store_without_shards_is_not_opened_as_one_with_some(tmp_path: Path) -> None:
    filled(MemoryBackend(LAYOUT, path=tmp_path)).close()
    with pytest.raises(StoreError, match=r"no shards.sqlite3. `emt split`"):
        MemoryBackend.open(tmp_path, "sharded")
