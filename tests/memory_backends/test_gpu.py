"""Layers on a GPU: what goes there, what does not, and that both find the same.

There is no GPU here: `FakeFaiss` stands for what an installed FAISS with GPU support adds, and
refuses what the real one refuses. It shows that the right calls are made, not that a GPU answers.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import torch
import faiss
import numpy as np
import pytest

from memory_backends import (
    IndexFactoryError,
    LayerLayout,
    MemoryBackend,
    MemoryLayout,
    MemoryMismatchError,
)
from memory_backends.faiss import gpu as gpu_module
from memory_backends.faiss.gpu import GPU, bytes_on_gpu, gpu_of, layers_that_fit
from memory_backends.testing import BackendConformance
from memory_backends.testing.checks import assert_finds
from memory_backends.testing.rows import (
    LAYERS,
    LAYOUT,
    make_document,
    make_queries,
    make_rows,
)

_ENOUGH = 1100  # rows to train any index on; with fewer it is Flat
LAYER = MemoryLayout({0: LayerLayout(2, 8, 8)}, torch.float32)


class FakeIndex:
    """A GPU index as far as a caller can tell: fewer parameters, one thread at a time."""

    def __init__(self, owner: FakeFaiss, index: Any) -> None:
        self._owner = owner
        self._index = faiss.clone_index(index)
        self._is_ivf = isinstance(index, faiss.IndexIVF)

    def search(self, queries: np.ndarray, k: int, *, params: Any = None) -> Any:
        assert 0 < k < 2048
        assert self._is_ivf or params is None
        assert not self._is_ivf or (params.sel is None and 0 < params.nprobe < 2048)
        assert self._owner.one_at_a_time.acquire(blocking=False), "two threads in one GPU"
        try:
            self._owner.searches += 1
            return self._index.search(queries, k, params=params)
        finally:
            self._owner.one_at_a_time.release()


class FakeFaiss:
    """What FAISS with GPU support has, and what was done with it."""

    def __init__(self) -> None:
        self.free_bytes = 2**30
        self.refuses = ""
        self.cloned: list[int] = []  # components of each index
        self.searches = 0
        self.one_at_a_time = threading.Lock()

    def clone(self, resources: Any, device: int, index: Any, options: Any) -> FakeIndex:
        assert (resources.scratch, device) == (2**28, 0)
        assert not options.use_cuvs
        assert not options.useFloat16  # it would round exact indexes
        if self.refuses:
            raise RuntimeError(self.refuses)
        self.cloned.append(index.d)
        return FakeIndex(self, index)


class FakeResources:
    def setTempMemory(self, num_bytes: int) -> None:  # noqa: N802  # FAISS's name
        self.scratch = num_bytes


class FakeOptions:
    useFloat16 = False  # noqa: N815
    use_cuvs = True


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeFaiss]:
    """FAISS with one GPU, whose memory is the CPU's."""
    fake = FakeFaiss()
    monkeypatch.setattr(faiss, "StandardGpuResources", FakeResources, raising=False)
    monkeypatch.setattr(faiss, "GpuClonerOptions", FakeOptions, raising=False)
    monkeypatch.setattr(faiss, "index_cpu_to_gpu", fake.clone, raising=False)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(gpu_module, "usable_device", lambda device: torch.device("cpu", 0))
    monkeypatch.setattr(GPU, "free_bytes", lambda self: fake.free_bytes)
    return fake


class TestOnAGPU(BackendConformance):
    """The whole contract, with every layer on the stand-in for a GPU."""

    memory_type = "vector_db"
    options: ClassVar = {"index": "Flat", "device": "cuda:0"}

    @pytest.fixture(autouse=True)
    def _with_a_gpu(self, fake: FakeFaiss) -> None:
        pass


def _filled(num_rows: int = 17, **options: Any) -> MemoryBackend:
    backend = MemoryBackend(LAYOUT, "vector_db", device="cuda:0", **options)
    backend.add(make_document("a", num_rows), [make_rows(num_rows, seed=1)])
    return backend


def _on_gpu(backend: MemoryBackend) -> list[int]:
    layers = backend.searcher._gpu_layers
    assert layers is not None
    return [idx for idx in LAYERS if layers.get(idx) is not None]


# -- which device -----------------------------------------------------------------------------


@pytest.mark.parametrize("device", [None, "cpu", torch.device("cpu")])
def test_the_cpu_is_no_gpu(device: Any) -> None:
    assert gpu_of(device) is None
    assert MemoryBackend(LAYOUT, "vector_db", device=device).searcher._gpu_layers is None


def test_faiss_without_gpu_support_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(faiss, "StandardGpuResources", raising=False)
    with pytest.raises(IndexFactoryError, match=r"'cuda:0' needs FAISS with GPU support"):
        MemoryBackend(LAYOUT, "vector_db", device="cuda:0")


def test_a_device_that_torch_does_not_see_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faiss, "StandardGpuResources", FakeResources, raising=False)
    with pytest.raises(MemoryMismatchError, match=r"of this machine, .* got 'cuda:77'"):
        gpu_of("cuda:77")


def test_a_device_that_faiss_does_not_see_is_refused(
    fake: FakeFaiss, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0)
    with pytest.raises(MemoryMismatchError, match=r"FAISS sees; got 'cuda', and it sees 0\. Upda"):
        gpu_of("cuda")


@pytest.mark.parametrize("device", ["meta", "mps", "xpu:0", "gpu"])
def test_other_devices_are_refused(fake: FakeFaiss, device: str) -> None:
    with pytest.raises(MemoryMismatchError, match=f"'cpu' or a CUDA device .* got '{device}'"):
        gpu_of(device)


@pytest.mark.parametrize(
    "index", ["HNSW16", "SQ8", "IVF2,PQ4", "IVF2_HNSW8,Flat", "PCA4,IVF2,Flat", "IVF2,SQ6"]
)
def test_indexes_without_a_gpu_are_refused(fake: FakeFaiss, index: str) -> None:
    MemoryBackend(LAYER, "vector_db", index=index)
    with pytest.raises(IndexFactoryError, match=rf"must be 'auto', 'Flat' .* got '{index}'"):
        MemoryBackend(LAYER, "vector_db", index=index, device="cuda:0")


# -- which layers -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "free", "reserve", "chosen"),
    [
        ({0: 10, 1: 10, 2: 10}, 30, 0.0, [0, 1, 2]),
        ({0: 10, 1: 10, 2: 10}, 29, 0.0, [1, 2]),
        ({0: 10, 1: 10, 2: 10}, 30, 0.5, [2]),
        ({0: 10, 1: 10, 2: 10}, 9, 0.0, []),
        ({0: 10, 1: 30, 2: 10}, 20, 0.0, [0, 2]),  # layer 1 is passed over
        ({7: 10, 3: 10}, 10, 0.0, [7]),
        ({0: 1}, 1, 0.25, []),
        ({}, 100, 0.0, []),
    ],
)
def test_the_deepest_layers_that_fit_are_chosen(
    sizes: dict[int, int], free: int, reserve: float, chosen: list[int]
) -> None:
    assert layers_that_fit(sizes, free, reserve) == chosen


def test_a_copy_takes_rows_and_indexes() -> None:
    layer = LayerLayout(2, 64, 32)
    rows = 2 * 1000 * (64 + 32) * 2
    assert bytes_on_gpu(layer, torch.bfloat16, 1000, 900, "Flat") == rows + 2 * 900 * 64 * 4
    in_lists = 900 + 32 * 16
    expected = rows + 2 * in_lists * (64 * 2 + 8)
    assert bytes_on_gpu(layer, torch.bfloat16, 1000, 900, "IVF16,SQfp16") == expected


def test_layers_go_to_the_gpu_when_first_searched(fake: FakeFaiss) -> None:
    backend = _filled()
    assert _on_gpu(backend) == fake.cloned == []
    backend.search(3, make_queries(3, 2), 4)
    assert _on_gpu(backend) == [3]
    assert fake.cloned == [4]
    assert_finds(backend, [make_rows(17, seed=1)], range(17))
    assert _on_gpu(backend) == [0, 3]
    assert fake.cloned == [4, 8, 8]


def test_layers_that_do_not_fit_stay_where_they_are(fake: FakeFaiss) -> None:
    backend = _filled()
    needed = bytes_on_gpu(LAYERS[3], torch.float32, 17, 17, "Flat")
    fake.free_bytes = needed * 4 // 3 + 1
    assert_finds(backend, [make_rows(17, seed=1)], range(17))
    assert _on_gpu(backend) == [3]
    assert fake.cloned == [4]


def test_layers_that_are_not_indexed_stay_where_they_are(fake: FakeFaiss) -> None:
    backend = _filled(indexed_layers=[0])
    assert_finds(backend, [make_rows(17, seed=1)], range(17))
    assert _on_gpu(backend) == [0]


def test_a_search_of_some_heads_is_the_cpus(fake: FakeFaiss) -> None:
    backend, queries = _filled(indexed_heads={0: [1]}), make_queries(0, 4)
    alone = backend.search(0, queries[1:], 5, heads=[1])
    assert fake.cloned == []  # a copy would be of the whole layer
    assert backend.searcher._indexes.made.keys() == {(0, 1)}
    every = backend.search(0, queries, 5)
    assert (_on_gpu(backend), fake.cloned) == ([0], [8, 8])
    assert torch.equal(alone.ids[0], every.ids[1])
    again = backend.search(0, queries[[1, 0]], 5, heads=[1, 0])
    assert torch.equal(again.ids, every.ids[[1, 0]])
    assert fake.searches == 2  # of all heads, once


@pytest.mark.parametrize(
    "message",
    ["CUDA out of memory. Tried to allocate 2 GiB", "StandardGpuResources: alloc fail type IVF"],
)
def test_a_gpu_that_has_filled_up_leaves_the_layer_to_the_cpu(
    fake: FakeFaiss, message: str
) -> None:
    backend = _filled()
    fake.refuses = message
    assert_finds(backend, [make_rows(17, seed=1)], range(17))
    assert _on_gpu(backend) == []
    fake.refuses = ""
    assert_finds(backend, [make_rows(17, seed=1)], range(17))
    assert _on_gpu(backend) == []  # not tried at each search


def test_other_errors_are_not_hidden(fake: FakeFaiss) -> None:
    backend = _filled()
    fake.refuses = "CUDA error: an illegal memory access"
    with pytest.raises(RuntimeError, match="illegal memory access"):
        backend.search(0, make_queries(0, 1), 2)


# -- when -------------------------------------------------------------------------------------


def test_a_search_with_removed_rows_is_the_cpus_until_saved(
    fake: FakeFaiss, tmp_path: Path
) -> None:
    backend = _filled(path=tmp_path / "store")
    backend.search(0, make_queries(0, 1), 2)
    backend.remove([0, 12])
    assert _on_gpu(backend) == []
    left = [idx for idx in range(17) if idx not in (0, 12)]
    before = fake.searches
    assert_finds(backend, [make_rows(17, seed=1)], left)
    assert (_on_gpu(backend), fake.searches) == ([], before)
    backend.save()
    assert_finds(backend, [make_rows(17, seed=1)], left)
    assert (_on_gpu(backend), fake.searches) == ([0, 3], before + 3)  # one a head


def test_new_rows_are_copied_anew(fake: FakeFaiss) -> None:
    backend = _filled()
    runs = [make_rows(17, seed=1), make_rows(5, seed=2)]
    assert_finds(backend, runs[:1], range(17))
    backend.add(make_document("b", 5), [runs[1]])
    assert _on_gpu(backend) == []
    assert_finds(backend, runs, range(22))
    assert _on_gpu(backend) == [0, 3]
    assert len(backend.searcher._gpu_layers.get(0).rows) == 22


def test_more_than_a_gpu_selects_is_searched_on_the_cpu(fake: FakeFaiss) -> None:
    backend = _filled(2100)
    assert_finds(backend, [make_rows(2100, seed=1)], range(2100), k=2050)
    assert fake.searches == 0
    assert_finds(backend, [make_rows(2100, seed=1)], range(2100), k=5)
    assert fake.searches == 3


def test_more_lists_than_a_gpu_selects_are_searched_on_the_cpu(
    fake: FakeFaiss, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_module, "_SELECTION_LIMIT", 4)  # an uncalibrated search looks into 4
    backend = _filled(_ENOUGH, index="IVF8,SQfp16")
    assert backend.nearest(0, make_queries(0, 1), 3) is not None
    assert (fake.searches, _on_gpu(backend)) == (0, [])


def test_close_lets_go_of_the_gpu(fake: FakeFaiss) -> None:
    backend = _filled()
    backend.search(0, make_queries(0, 1), 2)
    backend.close()
    assert _on_gpu(backend) == []


# -- what is found ----------------------------------------------------------------------------


@pytest.mark.parametrize("index", ["Flat", "IVF8,SQfp16", "IVF8,Flat", "IVF8,SQ8"])
def test_both_devices_find_the_same(fake: FakeFaiss, tmp_path: Path, index: str) -> None:
    on_gpu = _filled(_ENOUGH, index=index, path=tmp_path / "store")
    on_gpu.save()
    on_cpu = MemoryBackend.open(tmp_path / "store", "vector_db", index=index)
    for layer_idx in LAYERS:
        queries = make_queries(layer_idx, 7)
        for ours, theirs in zip(
            on_gpu.retrieve(layer_idx, queries, 5),
            on_cpu.retrieve(layer_idx, queries, 5),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs)
        ours, theirs = (each.nearest(layer_idx, queries, 5) for each in (on_gpu, on_cpu))
        assert ours is not None
        assert theirs is not None
        for on_gpu_part, on_cpu_part in zip(ours, theirs, strict=True):
            assert torch.equal(on_gpu_part, on_cpu_part)
    assert _on_gpu(on_gpu) == [0, 3]
    assert fake.cloned == [8, 8, 4]
    assert on_gpu.searcher.factory == index


def test_retrieved_rows_are_read_on_the_gpu(fake: FakeFaiss) -> None:
    for index in ("Flat", "IVF8,SQfp16"):  # `nearest` differs
        backend = _filled(_ENOUGH, index=index)
        queries = make_queries(0, 2)
        backend.search(0, queries, 3)
        backend.searcher._gpu_layers.get(0).rows.fill_(7)
        assert (backend.retrieve(0, queries, 3).values == 7).all()
        assert (backend.nearest(0, queries, 3)[1] == 7).all()


def test_one_thread_at_a_time_searches_the_gpu(fake: FakeFaiss) -> None:
    backend = _filled(_ENOUGH, index="IVF8,SQfp16")
    queries = make_queries(0, 50)
    expected = backend.search(0, queries, 5).ids
    with ThreadPoolExecutor(8) as pool:
        for hits in pool.map(lambda _: backend.search(0, queries, 5).ids, range(100)):
            assert torch.equal(hits, expected)


# -- a real GPU -------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(
    not (torch.cuda.is_available() and hasattr(faiss, "StandardGpuResources")),
    reason="needs a CUDA device, torch for it and FAISS with GPU support",
)
@pytest.mark.parametrize("index", ["Flat", "auto", "IVF64,Flat", "IVF64,SQ8"])
def test_a_gpu_finds_what_the_cpu_finds(tmp_path: Path, index: str) -> None:
    rows = make_rows(10_000, seed=1)
    on_cpu = MemoryBackend(LAYOUT, "vector_db", path=tmp_path / "store", index=index)
    on_cpu.add(make_document("a", len(rows)), [rows])
    on_cpu.save()
    on_gpu = MemoryBackend.open(tmp_path / "store", "vector_db", index=index, device="cuda")
    for layer_idx in LAYERS:
        queries = make_queries(layer_idx, 50)
        ours, theirs = (each.retrieve(layer_idx, queries, 10) for each in (on_gpu, on_cpu))
        assert ours.keys.device.type == "cuda"
        torch.testing.assert_close(ours.scores, theirs.scores, atol=2e-3, rtol=0)
        assert (ours.ids == theirs.ids).float().mean() > 0.98
    assert _on_gpu(on_gpu) == list(LAYERS)
