"""Space of removed documents is given back; nothing else changes."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import torch
import pytest

from memory_backends import (
    LayerLayout,
    MemoryBackend,
    MemoryLayout,
    StoreError,
    verify,
)
from memory_backends.rows.coding import record_bytes
from memory_backends.testing.rows import make_document, make_rows

LAYOUT = MemoryLayout({0: LayerLayout(2, 32, 32), 3: LayerLayout(1, 64, 64)}, torch.float32)
BYTES_PER_ROW = sum(record_bytes(LAYOUT, "exact").values())
ROWS = 200  # a document: 100 KiB a layer
NAMES = "abcdef"
RUNS = {name: make_rows(ROWS, seed=at, layout=LAYOUT) for at, name in enumerate(NAMES)}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    backend = MemoryBackend(LAYOUT, path=tmp_path / "store")
    for name in NAMES:
        backend.add(make_document(name, ROWS), [RUNS[name]])
    backend.close()
    return tmp_path / "store"


def assert_has(backend: MemoryBackend, names: str) -> None:
    """Compare each document's rows, which have the ids they always had, bit for bit."""
    assert backend.catalog.document_names() == list(names)
    assert len(backend) == ROWS * len(names)
    for name in names:
        first = ROWS * NAMES.index(name)
        for layer_idx, layer in LAYOUT.layers.items():
            ids = torch.arange(first, first + ROWS).expand(layer.num_key_value_heads, -1)
            keys, values = backend.fetch(layer_idx, ids)
            assert torch.equal(keys, RUNS[name].keys[layer_idx])
            assert torch.equal(values, RUNS[name].values[layer_idx])
            query = RUNS[name].keys[layer_idx][:, 7:8]
            hits = backend.search(layer_idx, query, 1)
            assert hits.ids.flatten().tolist() == [first + 7] * layer.num_key_value_heads


def disk_bytes(store: Path) -> int:
    return sum(file.stat().st_blocks * 512 for file in (store / "rows").iterdir())


def test_space_is_given_back_and_ids_stay(store: Path) -> None:
    backend = MemoryBackend.open(store)
    assert backend.compact() < 2**16  # there was nothing to give back
    for name in "bcd":
        backend.remove_document(name)
    before = disk_bytes(store)
    sizes = [file.stat().st_size for file in sorted((store / "rows").iterdir())]
    freed = backend.compact()
    assert freed >= before - disk_bytes(store) > 0.9 * 3 * ROWS * BYTES_PER_ROW
    assert [file.stat().st_size for file in sorted((store / "rows").iterdir())] == sizes
    assert_has(backend, "aef")
    assert_has(MemoryBackend.open(store), "aef")
    assert verify(store) == []
    rows = (store / "rows" / "layer-003.bin").read_bytes()
    assert not any(rows[ROWS * 512 : 4 * ROWS * 512])
    more = make_rows(5, seed=9, layout=LAYOUT)
    assert backend.add(make_document("g", 5), [more]) == range(6 * ROWS, 6 * ROWS + 5)
    assert verify(store) == []


@pytest.mark.parametrize("step", [0, 1, 2, 3, 4])
def test_a_crash_at_any_step_leaves_a_good_store(
    store: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Steps: fsync of a file and of its folder for each of two layers, then the catalogue's."""
    backend = MemoryBackend.open(store)
    backend.remove_document("b")
    fsync, calls = os.fsync, iter(range(100))

    def failing(descriptor: int) -> None:
        if next(calls) == step:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    def full(*_: Any) -> None:
        raise StoreError("the catalogue cannot be used: disk is full")

    with monkeypatch.context() as patch:
        patch.setattr("memory_backends.store.compaction.os.fsync", failing)
        patch.setattr("memory_backends.catalog.Catalog.vacuum", full)
        with pytest.raises(StoreError, match=r"No space left|disk is full"):
            backend.compact()
    assert_has(backend, "acdef")
    assert_has(MemoryBackend.open(store), "acdef")
    assert verify(store) == []
    assert {file.name for file in (store / "rows").iterdir()} == {"layer-000.bin", "layer-003.bin"}
    backend.compact()
    assert_has(MemoryBackend.open(store), "acdef")


def test_a_memory_in_ram_has_nothing_to_give_back() -> None:
    backend = MemoryBackend(LAYOUT)
    backend.add(make_document("a", ROWS), [RUNS["a"]])
    backend.clear()
    assert backend.compact() == 0


def test_an_empty_store_is_compacted(store: Path) -> None:
    backend = MemoryBackend.open(store)
    backend.clear()
    assert backend.compact() > 5 * ROWS * BYTES_PER_ROW
    assert len(backend) == 0
    assert verify(store) == []
    assert backend.add(make_document("a", ROWS), [RUNS["a"]]) == range(6 * ROWS, 7 * ROWS)
