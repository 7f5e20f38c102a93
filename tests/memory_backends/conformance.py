"""What every backend must do. A test module inherits the class and says how to make one."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import filelock
import numpy as np
import pytest

from memory_backends import (
    Document,
    DocumentError,
    LayerLayout,
    MemoryBackend,
    MemoryLayout,
    MemoryMismatchError,
    Rows,
    StoreError,
    verify,
)
from memory_backends.catalog import Catalog
from tests.memory_backends.reference import (
    IDENTITY,
    LAYERS,
    LAYOUT,
    keys_of,
    make_document,
    make_queries,
    make_rows,
    nearest,
)

Make = Callable[..., MemoryBackend]
# Of a row's length; int4 has two bytes of a record of 8 for scales here, so little for the numbers.
CODEC_ERRORS = {"exact": 0.0, "float16": 1e-3, "bfloat16": 8e-3, "int8": 0.05, "int4": 1.0}


def assert_finds(
    backend: MemoryBackend, runs: list[Rows], searchable: Iterable[int], k: int = 5
) -> None:
    """Compare a search of every layer with brute force over `runs`, ids counted from 0.

    Where a codec has changed the rows a little, brute force has those that the backend fetches.
    """
    searchable = list(searchable)
    assert len(backend) == len(searchable)
    for layer_idx in LAYERS:
        queries = make_queries(layer_idx, 6)
        keys = stored_keys(backend, runs, layer_idx, searchable)
        scores, ids = nearest(keys, queries, k, searchable)
        found = backend.search(layer_idx, queries, k)
        assert found.ids.dtype == torch.int64
        assert found.scores.dtype == torch.float32
        np.testing.assert_array_equal(found.ids.numpy(), ids)
        np.testing.assert_allclose(found.scores.numpy(), scores, atol=2e-6)


def stored_keys(
    backend: MemoryBackend, runs: list[Rows], layer_idx: int, searchable: Iterable[int]
) -> np.ndarray:
    """Return the keys of `runs`, the searchable ones as the backend's codec has changed them."""
    keys, rows = keys_of(runs, layer_idx), list(searchable)
    if backend.catalog.row_codec != "exact" and rows:
        found = backend.fetch(layer_idx, torch.tensor(rows).expand(len(keys), -1))[0]
        assert_close(backend, found, torch.from_numpy(keys[:, rows]))
        keys[:, rows] = found.double().numpy()
    return keys


def assert_fetches(backend: MemoryBackend, runs: list[Rows]) -> None:
    """Compare every row's keys and values: bit for bit, if the codec is exact."""
    num_rows = sum(map(len, runs))
    for layer_idx, layer in LAYERS.items():
        ids = torch.arange(num_rows).expand(layer.num_key_value_heads, -1)
        keys, values = backend.fetch(layer_idx, ids)
        assert_close(backend, keys, torch.cat([run.keys[layer_idx] for run in runs], dim=1))
        assert_close(backend, values, torch.cat([run.values[layer_idx] for run in runs], dim=1))


def assert_close(backend: MemoryBackend, stored: torch.Tensor, written: torch.Tensor) -> None:
    """Compare rows (..., D), as closely as the backend's codec allows."""
    assert stored.shape == written.shape
    if backend.catalog.row_codec == "exact":
        assert torch.equal(stored, written.to(stored.dtype))
    error = torch.linalg.vector_norm(stored.double() - written.double(), dim=-1)
    length = torch.linalg.vector_norm(written.double(), dim=-1)
    assert (error <= CODEC_ERRORS[backend.catalog.row_codec] * length).all()


class BackendConformance:
    """Inherit, and define the fixture `make`: (layout=LAYOUT, **options) -> an empty backend."""

    @pytest.fixture
    def make(self, tmp_path: Path) -> Make:
        raise NotImplementedError

    @pytest.fixture
    def store(self, make: Make, tmp_path: Path) -> Path:
        """A store with the documents 'a' (rows 0-9, sink 0) and 'b' (rows 10-16, sink 10)."""
        backend = make(identity=IDENTITY)
        for name, rows in zip("ab", self.runs, strict=True):
            backend.add(make_document(name, len(rows)), [rows])
        path = tmp_path / "saved"
        backend.save(path)
        backend.close()
        return path

    @property
    def runs(self) -> list[Rows]:
        return [make_rows(10, seed=1, sinks=[0]), make_rows(7, seed=2, sinks=[0])]

    # -- searching and fetching -----------------------------------------------------------------

    def test_search_finds_what_brute_force_finds(self, make: Make) -> None:
        backend, runs = make(), self.runs
        assert backend.add(make_document("a", 10), [runs[0]]) == range(10)
        assert_finds(backend, runs[:1], range(10))
        assert backend.add(make_document("b", 7), [runs[1]]) == range(10, 17)
        assert_finds(backend, runs, range(17))

    def test_length_of_a_query_does_not_matter(self, make: Make) -> None:
        backend = make()
        backend.add(make_document("a", 10), [self.runs[0]])
        queries = make_queries(0, 4)
        small, large = (backend.search(0, queries * scale, 3) for scale in (1e-3, 1e3))
        assert torch.equal(small.ids, large.ids)
        torch.testing.assert_close(small.scores, large.scores)

    def test_more_asked_than_there_is_ends_in_nothing(self, make: Make) -> None:
        backend = make()
        backend.add(make_document("a", 10), [self.runs[0]])
        assert_finds(backend, self.runs[:1], range(10), k=13)
        found = backend.search(0, make_queries(0, 2), 13)
        assert (found.ids[..., 10:] == -1).all()
        assert torch.isneginf(found.scores[..., 10:]).all()

    def test_no_queries_find_nothing(self, make: Make) -> None:
        backend = make()
        backend.add(make_document("a", 10), [self.runs[0]])
        found = backend.search(3, torch.empty(1, 0, 4), 5)
        assert found.ids.shape == found.scores.shape == (1, 0, 5)

    def test_an_empty_memory_finds_nothing(self, make: Make) -> None:
        backend = make()
        assert_finds(backend, [make_rows(0, seed=1)], [])
        keys, values = backend.fetch(3, torch.full((1, 2, 5), -1))
        assert keys.shape == (1, 2, 5, 4)
        assert values.shape == (1, 2, 5, 6)
        assert torch.isfinite(keys).all()
        assert torch.isfinite(values).all()

    def test_retrieve_and_nearest_give_the_rows_that_search_finds(self, make: Make) -> None:
        backend = make()
        backend.add(make_document("a", 10), [self.runs[0]])
        backend.add(make_document("b", 7), [self.runs[1]])
        backend.remove_document("a")
        for layer_idx in LAYOUT.layers:
            queries = make_queries(layer_idx, 4)
            found = backend.search(layer_idx, queries, 3)
            keys, values = backend.fetch(layer_idx, found.ids)
            retrieved = backend.retrieve(layer_idx, queries, 3)
            assert torch.equal(retrieved.ids, found.ids)
            assert torch.equal(retrieved.scores, found.scores)
            assert torch.equal(retrieved.keys, keys)
            assert torch.equal(retrieved.values, values)
            nearest = backend.nearest(layer_idx, queries, 3)
            assert nearest is not None
            for rows, expected in zip(nearest, (keys, values), strict=True):  # in any order
                torch.testing.assert_close(rows.sum(dim=2), expected.sum(dim=2))
            assert backend.nearest(layer_idx, queries, 8) is None  # there are seven

    def test_fetch_gives_each_head_its_own_rows(self, make: Make) -> None:
        backend, rows = make(), self.runs[0]
        backend.add(make_document("a", 10), [rows])
        assert_fetches(backend, [rows])
        ids = torch.tensor([[[3, 0], [9, 3]], [[1, 2], [-1, 4]]])  # (Hkv, N, k)
        keys, values = backend.fetch(0, ids)
        assert keys.shape == values.shape == (2, 2, 2, 8)
        for head, query, at in np.ndindex(2, 2, 2):
            row = int(ids[head, query, at])
            if row >= 0:
                assert_close(backend, keys[head, query, at], rows.keys[0][head, row])
                assert_close(backend, values[head, query, at], rows.values[0][head, row])
        assert torch.isfinite(keys).all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_rows_keep_their_dtype_bit_for_bit(
        self, make: Make, tmp_path: Path, dtype: torch.dtype
    ) -> None:
        layout = MemoryLayout(LAYERS, dtype)
        rows = make_rows(20, seed=3, layout=layout)
        backend = make(layout)
        backend.add(make_document("a", 20), [rows])
        assert backend.fetch(0, torch.zeros(2, 1, dtype=torch.int64))[0].dtype == dtype
        assert_fetches(backend, [rows])
        assert_finds(backend, [rows], range(20))
        backend.save(tmp_path / "copy")
        reopened = type(backend).open(tmp_path / "copy")
        assert reopened.layout == layout
        assert_fetches(reopened, [rows])

    def test_threads_search_at_the_same_time(self, make: Make) -> None:
        backend, runs = make(), self.runs
        for name, rows in zip("ab", runs, strict=True):
            backend.add(make_document(name, len(rows)), [rows])

        def search(seed: int) -> tuple[np.ndarray, np.ndarray]:
            found = backend.search(seed % 2 * 3, make_queries(seed % 2 * 3, 4, seed), 5)
            return found.scores.numpy(), found.ids.numpy()

        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(search, range(40)))
        for seed, (scores, ids) in enumerate(answers):
            layer_idx = seed % 2 * 3
            queries = make_queries(layer_idx, 4, seed)
            keys = stored_keys(backend, runs, layer_idx, range(17))
            expected = nearest(keys, queries, 5, range(17))
            np.testing.assert_array_equal(ids, expected[1])
            np.testing.assert_allclose(scores, expected[0], atol=2e-6)

    @pytest.mark.parametrize(
        ("layer_idx", "shape", "k", "message"),
        [
            (1, (2, 1, 8), 5, r"one of \[0, 3\]; got 1"),
            (0, (4, 1, 8), 5, r"\(num_key_value_heads=2, N, head_dim=8\); got \(4, 1, 8\)"),
            (0, (2, 1, 4), 5, r"\(num_key_value_heads=2, N, head_dim=8\); got \(2, 1, 4\)"),
            (3, (1, 4), 5, r"\(num_key_value_heads=1, N, head_dim=4\); got \(1, 4\)"),
            (0, (2, 1, 8), 0, "at least 1; got 0"),
        ],
    )
    def test_search_refuses(
        self, make: Make, layer_idx: int, shape: tuple[int, ...], k: int, message: str
    ) -> None:
        with pytest.raises(MemoryMismatchError, match=message):
            make().search(layer_idx, torch.ones(shape), k)

    # -- searching some heads -------------------------------------------------------------------

    @pytest.mark.parametrize("heads", [(0,), (3,), (1, 2), (3, 0, 2), (2, 3, 1, 0)])
    def test_a_search_of_some_heads_finds_what_brute_force_finds(
        self, make: Make, heads: tuple[int, ...]
    ) -> None:
        layout = MemoryLayout({1: LayerLayout(4, 8, 6)}, torch.float32)
        backend = make(layout)
        queries = torch.randn(len(heads), 5, 8, generator=torch.Generator().manual_seed(3))

        def assert_finds_by_head(searchable: list[int], k: int) -> None:
            rows = torch.arange(max(searchable) + 1).expand(4, -1)
            keys = backend.fetch(1, rows)[0].double().numpy()[list(heads)]
            scores, ids = nearest(keys, queries, k, searchable)
            found = backend.search(1, queries, k, heads=heads)
            np.testing.assert_array_equal(found.ids.numpy(), ids)
            np.testing.assert_allclose(found.scores.numpy(), scores, atol=2e-6)

        nothing = backend.search(1, queries, 2, heads=heads)
        assert (nothing.ids == -1).all()
        assert nothing.scores.shape == (len(heads), 5, 2)
        backend.add(make_document("a", 10), [make_rows(10, 1, layout=layout)])
        assert_finds_by_head(list(range(10)), k=4)
        backend.add(make_document("b", 7), [make_rows(7, 2, layout=layout)])
        assert_finds_by_head(list(range(17)), k=4)
        backend.remove([2, 11])
        left = [row for row in range(17) if row not in (2, 11)]
        assert_finds_by_head(left, k=4)
        every = backend.search(1, torch.ones(4, 1, 8), 3)  # another search of the layer meanwhile
        assert every.ids.shape == (4, 1, 3)
        assert_finds_by_head(left, k=17)  # more than there are
        assert backend.search(1, queries[:, :0], 4, heads=heads).ids.shape == (len(heads), 0, 4)

    def test_a_search_of_some_heads_ranks_near_ties_in_float64(self, make: Make) -> None:
        layout = MemoryLayout({0: LayerLayout(3, 8, 8)}, torch.float32)
        backend, rows = make(layout), make_rows(40, 1, layout=layout)
        keys = rows.keys[0]
        keys[:, 5:9] = keys[:, 5:6] * (1 + 2e-7 * torch.arange(4).view(1, 4, 1) * keys[:, 9:10])
        backend.add(make_document("a", 40), [rows])
        stored = backend.fetch(0, torch.arange(40).expand(3, -1))[0]
        queries = 3 * stored[[2, 1], 5:6] + make_queries(0, 1)  # near the four, not in their midst
        found = backend.search(0, queries, 3, heads=[2, 1])
        scores, ids = nearest(stored.double().numpy()[[2, 1]], queries, 3, range(40))
        whole = torch.stack([stored[0, :1], *reversed(queries)])  # heads 0, 1, 2
        assert torch.equal(backend.search(0, whole, 3).ids[[2, 1]], found.ids)
        if backend.catalog.row_codec == "exact":  # others may make the four equal
            assert (scores[..., 0] - scores[..., 2] < 1e-6).all()
            np.testing.assert_array_equal(found.ids.numpy(), ids)

    @pytest.mark.parametrize(
        ("heads", "shape", "message"),
        [
            ([2], (1, 1, 8), r"KV heads 0 to 1 of layer 0, each once; got \[2\]"),
            ([-1], (1, 1, 8), r"KV heads 0 to 1 of layer 0, each once; got \[-1\]"),
            ([1, 1], (2, 1, 8), r"each once; got \[1, 1\]"),
            ([], (0, 1, 8), r"one or more of the KV heads .* got \[\]"),
            ([0.0], (1, 1, 8), r"got \[0.0\]"),
            ([1], (2, 1, 8), r"\(len\(heads\)=1, N, head_dim=8\); got \(2, 1, 8\)"),
            ([1], (1, 1, 4), r"\(len\(heads\)=1, N, head_dim=8\); got \(1, 1, 4\)"),
        ],
    )
    def test_search_refuses_heads(
        self, make: Make, heads: list[Any], shape: tuple[int, ...], message: str
    ) -> None:
        with pytest.raises(MemoryMismatchError, match=message):
            make().search(0, torch.ones(shape), 5, heads=heads)

    @pytest.mark.parametrize(
        ("ids", "message"),
        [
            (torch.tensor([[0], [10]]), "less than 10, .* or -1; got 0 to 10"),
            (torch.tensor([[-2], [9]]), "less than 10, .* or -1; got -2 to 9"),
            (torch.zeros(1, 4, dtype=torch.int64), r"=2, \.\.\.\); got torch.int64 \(1, 4\)"),
            (torch.zeros(2, 4), r"must be int64 .* got torch.float32 \(2, 4\)"),
        ],
    )
    def test_fetch_refuses(self, make: Make, ids: torch.Tensor, message: str) -> None:
        backend = make()
        backend.add(make_document("a", 10), [self.runs[0]])
        with pytest.raises(MemoryMismatchError, match=message):
            backend.fetch(0, ids)

    # -- writing --------------------------------------------------------------------------------

    def test_a_document_comes_in_runs(self, make: Make) -> None:
        backend = make()
        runs = [make_rows(n, seed=n, first=at) for n, at in ((4, 0), (0, 4), (300, 4), (1, 304))]
        assert backend.add(make_document("a", 305), iter(runs)) == range(305)
        assert_fetches(backend, runs)
        assert_finds(backend, runs, range(305))
        assert backend.catalog.document("a").row_tokens.tolist() == list(range(305))

    def test_documents_are_kept_whole(self, make: Make, tmp_path: Path) -> None:
        offsets = np.array([[0, 0], [0, 2], [2, 5]], dtype=np.int32)
        document = Document("née.txt", np.array([1, 70, 9], dtype=np.int32), "onetwo", offsets)
        rows = make_rows(2, seed=1, sinks=[1], first=1)
        backend = make()
        backend.add(make_document("a", 10), [self.runs[0]])
        backend.add(document, [rows])
        backend.save(tmp_path / "copy")
        for memory in (backend, type(backend).open(tmp_path / "copy")):
            stored = memory.catalog.document("née.txt")
            assert stored.token_ids.tolist() == [1, 70, 9]
            assert stored.text == "onetwo"
            assert stored.offsets is not None
            assert stored.offsets.tolist() == offsets.tolist()
            assert stored.first_row == 10
            assert stored.row_tokens.tolist() == [1, 2]
            assert stored.sink_rows.tolist() == [1]
            assert memory.catalog.document_sizes() == [("a", 10, 10), ("née.txt", 3, 2)]
            assert memory.catalog.document_of_rows([9, 10, 12]) == {9: "a", 10: "née.txt"}

    def test_a_taken_name_is_refused_before_its_rows_are_read(self, make: Make) -> None:
        backend = make()
        backend.add(make_document("a", 10), [self.runs[0]])
        unread = iter([self.runs[1]])
        with pytest.raises(DocumentError, match="document 'a' is already in the memory"):
            backend.add(make_document("a", 7), unread)
        assert len(next(unread)) == 7
        assert_finds(backend, self.runs, range(10))

    def test_replace_puts_new_rows_for_old(self, make: Make) -> None:
        backend, runs = make(), self.runs
        backend.add(make_document("a", 10), [runs[0]])
        assert backend.add(make_document("a", 7), [runs[1]], replace=True) == range(10, 17)
        assert_finds(backend, runs, range(10, 17))
        assert backend.catalog.document_sizes() == [("a", 7, 7)]

    @pytest.mark.parametrize(
        "error", [RuntimeError("cut"), OSError(2, "gone"), KeyboardInterrupt()]
    )
    def test_rows_that_fail_half_way_leave_no_trace(self, make: Make, error: BaseException) -> None:
        backend, runs = make(), self.runs

        def failing() -> Iterator[Rows]:
            yield make_rows(500, seed=9)
            raise error

        backend.add(make_document("a", 10), [runs[0]])
        for replace in (False, True):
            with pytest.raises(type(error)) as caught:
                backend.add(make_document("a" if replace else "x", 500), failing(), replace=replace)
            assert caught.value is error  # not called an error of the store
        assert backend.catalog.document_names() == ["a"]
        assert_finds(backend, runs, range(10))
        assert backend.add(make_document("b", 7), [runs[1]]) == range(10, 17)
        assert_finds(backend, runs, range(17))
        assert_fetches(backend, runs)

    def test_adding_while_adding_is_refused(self, make: Make) -> None:
        backend = make()

        def nested() -> Iterator[Rows]:
            yield make_rows(5, seed=9)
            backend.add(make_document("inner", 10), [self.runs[0]])

        with pytest.raises(StoreError, match="written to already"):
            backend.add(make_document("outer", 5), nested())
        assert backend.add(make_document("a", 10), [self.runs[0]]) == range(10)
        assert_finds(backend, self.runs[:1], range(10))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                {"keys": {0: torch.ones(4, 2, 8), 3: torch.ones(1, 2, 4)}},
                r"keys of layer 0 .*\(num_key_value_heads=2, N=2, head_dim=8\) and dtype "
                r"torch.float32; got \(4, 2, 8\), torch.float32",
            ),
            (
                {"values": {0: torch.ones(2, 2, 8), 3: torch.ones(1, 2, 6).half()}},
                r"values of layer 3 .*\(num_key_value_heads=1, N=2, value_head_dim=6\) and dtype "
                r"torch.float32; got \(1, 2, 6\), torch.float16",
            ),
            ({"keys": {3: torch.ones(1, 2, 4)}}, r"keys must have layers \[0, 3\]; got \[3\]"),
            (
                {"keys": {0: torch.ones(2, 2, 8), 3: torch.tensor([[[1.0] * 4, [0.0] * 4]])}},
                "keys not zero; got one at layer 3, KV head 0, row 4 that is zero",
            ),
            (
                {"values": {0: torch.ones(2, 2, 8) / 0, 3: torch.ones(1, 2, 6)}},
                "values must be finite.* got one at layer 0, KV head 0, row 3 that is NaN or inf",
            ),
            (
                {"tokens": np.array([4, 5], dtype=np.int32)},
                r"document 'x' must be of its tokens 0 to 4; got 4 to 5",
            ),
            ({"sinks": np.zeros(3, dtype=bool)}, r"shape \(n,\); got \(2,\) and \(3,\)"),
        ],
    )
    def test_rows_that_do_not_fit_are_refused(
        self, make: Make, change: dict[str, Any], message: str
    ) -> None:
        backend = make()
        backend.add(make_document("a", 10), [self.runs[0]])
        good = make_rows(2, seed=4)
        parts = {name: getattr(good, name) for name in ("keys", "values", "tokens", "sinks")}
        with pytest.raises(MemoryMismatchError, match=message):
            backend.add(make_document("x", 5), [make_rows(3, seed=4), Rows(**{**parts, **change})])
        assert backend.catalog.document_names() == ["a"]
        assert_finds(backend, self.runs, range(10))

    @pytest.mark.parametrize(
        ("document", "message"),
        [
            (make_document("", 10), "needs a name; got ''"),
            (Document("x", np.zeros((1, 10), np.int32)), r"shape \(T,\); got \(1, 10\)"),
            (
                Document("x", np.zeros(10, np.int32), "", np.zeros((9, 2), np.int32)),
                r"shape \(T=10, 2\), .*; got \(9, 2\)",
            ),
        ],
    )
    def test_a_document_that_does_not_fit_is_refused(
        self, make: Make, document: Document, message: str
    ) -> None:
        with pytest.raises(DocumentError, match=message):
            make().add(document, [self.runs[0]])

    def test_a_document_without_rows_is_refused(self, make: Make) -> None:
        backend = make()
        for rows in ([], [make_rows(0, seed=1)]):
            with pytest.raises(DocumentError, match="document 'x' has no rows to remember"):
                backend.add(make_document("x", 0), rows)
        assert backend.catalog.document_names() == []

    def test_many_documents_are_published_in_groups(
        self, make: Make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        backend = make()
        runs = [make_rows(n, seed=n, sinks=[0]) for n in (3, 4, 5, 6, 7)]
        groups: list[int] = []
        publish = Catalog.publish

        def counting(catalog: Catalog, documents: Any, **options: Any) -> Any:
            groups.append(len(documents))
            return publish(catalog, documents, **options)

        monkeypatch.setattr(Catalog, "publish", counting)
        documents = ((make_document(f"{len(run)}", len(run)), [run]) for run in runs)
        expected = [("3", range(3)), ("4", range(3, 7)), ("5", range(7, 12)), ("6", range(12, 18))]
        added = list(backend.add_many(documents, rows_per_commit=7))
        assert added == [*expected, ("7", range(18, 25))]
        assert groups == [2, 2, 1]
        assert_finds(backend, runs, range(25))
        assert_fetches(backend, runs)
        assert backend.catalog.document("6").sink_rows.tolist() == [0]

    def test_each_of_many_is_yielded_after_it_is_published(self, make: Make) -> None:
        backend, runs = make(), self.runs
        taken = []

        def documents() -> Iterator[tuple[Document, list[Rows]]]:
            for name in "abcd":
                taken.append(name)
                yield make_document(name, 10), [runs[0]]

        steps = backend.add_many(documents(), rows_per_commit=20)
        assert taken == []  # nothing happens before the first step
        assert next(steps) == ("a", range(10))
        assert taken == ["a", "b"]
        assert backend.catalog.document_names() == ["a", "b"]
        with pytest.raises(StoreError, match="written to already"):
            backend.remove([1])
        steps.close()  # type: ignore[attr-defined]
        backend.remove([1])
        assert backend.catalog.document_names() == taken == ["a", "b"]
        assert len(backend) == 19

    @pytest.mark.parametrize("fails", ["rows", "name", "shape", "documents"])
    def test_documents_before_one_that_fails_are_kept(
        self, make: Make, tmp_path: Path, fails: str
    ) -> None:
        backend, runs = make(), self.runs

        def failing() -> Iterator[Rows]:
            yield make_rows(500, seed=9)
            raise RuntimeError("cut")

        def documents() -> Iterator[tuple[Document, Iterable[Rows]]]:
            yield make_document("a", 10), [runs[0]]
            yield make_document("b", 7), [runs[1]]
            if fails == "documents":
                raise RuntimeError("cut")
            yield {
                "rows": (make_document("x", 500), failing()),
                "name": (make_document("a", 10), [runs[0]]),
                "shape": (make_document("x", 1), [make_rows(500, seed=9)]),
            }[fails]

        error = {"name": DocumentError, "shape": MemoryMismatchError}.get(fails, RuntimeError)
        added: list[tuple[str, range]] = []
        with pytest.raises(error):
            added.extend(backend.add_many(documents()))  # keeps what came before the error
        assert added == [("a", range(10)), ("b", range(10, 17))]
        assert_finds(backend, runs, range(17))
        more = make_rows(4, seed=5)
        assert backend.add(make_document("c", 4), [more]) == range(17, 21)
        assert_fetches(backend, [*runs, more])
        backend.save(tmp_path / "copy")
        assert verify(tmp_path / "copy") == []

    def test_many_replace_each_other(self, make: Make) -> None:
        backend, runs = make(), self.runs
        backend.add(make_document("a", 10), [runs[0]])
        again = [(make_document("a", len(run)), [run]) for run in (runs[1], runs[0])]
        added = list(backend.add_many(again, replace=True))
        assert added == [("a", range(10, 17)), ("a", range(17, 27))]
        assert backend.catalog.document_sizes() == [("a", 10, 10)]
        assert_finds(backend, [runs[0], runs[1], runs[0]], range(17, 27))

    def test_many_of_none_are_none(self, make: Make) -> None:
        assert list(make().add_many([])) == []

    # -- removing -------------------------------------------------------------------------------

    def test_removed_rows_are_not_found(self, make: Make) -> None:
        backend, runs = make(), self.runs
        for name, rows in zip("ab", runs, strict=True):
            backend.add(make_document(name, len(rows)), [rows])
        assert_finds(backend, runs, range(17))  # an index may be there already
        backend.remove([3, 4, 5, 16, 3])
        left = [0, 1, 2, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]
        assert_finds(backend, runs, left, k=20)
        assert_fetches(backend, runs)  # ids are those of before
        backend.remove(iter([]))
        backend.remove(torch.tensor([0]))
        assert_finds(backend, runs, left[1:])

    def test_removing_rows_that_never_were_is_refused(self, make: Make) -> None:
        backend = make()
        backend.add(make_document("a", 10), [self.runs[0]])
        with pytest.raises(MemoryMismatchError, match=r"less than 10, .*; got \[-1, 10\]"):
            backend.remove([2, 10, -1])
        assert_finds(backend, self.runs, range(10))

    def test_a_removed_document_is_not_found(self, make: Make) -> None:
        backend, runs = make(), self.runs
        for name, rows in zip("ab", runs, strict=True):
            backend.add(make_document(name, len(rows)), [rows])
        backend.remove([1])
        assert backend.remove_document("a") == 10
        assert_finds(backend, runs, range(10, 17))
        assert backend.catalog.document_names() == ["b"]
        with pytest.raises(DocumentError, match="no document 'a' in this memory"):
            backend.remove_document("a")
        assert backend.add(make_document("a", 10), [runs[0]]) == range(17, 27)
        assert_finds(backend, [*runs, runs[0]], range(10, 27))

    def test_clear_removes_everything_and_uses_no_id_again(self, make: Make) -> None:
        backend, runs = make(), self.runs
        backend.add(make_document("a", 10), [runs[0]])
        backend.clear()
        assert_finds(backend, runs, [])
        assert backend.catalog.document_names() == []
        assert backend.add(make_document("a", 7), [runs[1]]) == range(10, 17)
        assert_finds(backend, runs, range(10, 17))
        assert_fetches(backend, runs)

    def test_one_set_of_sinks_can_be_found(self, make: Make) -> None:
        backend = make(sinks="one")
        runs = [
            make_rows(5, 1, sinks=[0, 3]),
            make_rows(5, 2, sinks=[0, 1]),
            make_rows(5, 3, sinks=[4]),
        ]
        for name, rows in zip("abc", runs, strict=True):
            backend.add(make_document(name, 5), [rows])
        assert_finds(backend, runs, [0, 1, 2, 3, 4, 7, 8, 9, 10, 11, 12, 13], k=15)
        backend.remove([0])  # one of them is still there
        assert_finds(backend, runs, [1, 2, 3, 4, 7, 8, 9, 10, 11, 12, 13], k=15)
        backend.remove_document("a")
        assert_finds(backend, runs, [5, 6, 7, 8, 9, 10, 11, 12, 13], k=15)
        backend.remove([5, 6])
        assert_finds(backend, runs, [7, 8, 9, 10, 11, 12, 13, 14], k=15)

    def test_all_sinks_can_be_found_by_default(self, make: Make) -> None:
        backend, runs = make(), self.runs
        for name, rows in zip("ab", runs, strict=True):
            backend.add(make_document(name, len(rows)), [rows])
        assert_finds(backend, runs, range(17), k=17)
        with pytest.raises(MemoryMismatchError, match="must be 'all' or 'one'; got 'two'"):
            make(sinks="two")

    # -- keeping --------------------------------------------------------------------------------

    def test_a_copy_is_the_same_memory(self, make: Make, tmp_path: Path) -> None:
        backend, runs = make(identity=IDENTITY), self.runs
        for name, rows in zip("ab", runs, strict=True):
            backend.add(make_document(name, len(rows)), [rows])
        backend.remove([2, 11])
        left = [row for row in range(17) if row not in (2, 11)]
        backend.save(tmp_path / "copy")
        backend.clear()  # of which the copy knows nothing
        for backend_class in (type(backend), MemoryBackend, MemoryBackend):
            reopened = MemoryBackend.open(tmp_path / "copy", kind)
            assert reopened.catalog.identity == IDENTITY
            assert reopened.layout == LAYOUT
            assert_finds(reopened, runs, left)
            assert_fetches(reopened, runs)

    def test_an_empty_memory_is_kept(self, make: Make, tmp_path: Path) -> None:
        make().save(tmp_path / "copy")
        reopened = MemoryBackend.open(tmp_path, make().memory_type / "copy")
        assert_finds(reopened, [make_rows(0, seed=1)], [])
        assert reopened.add(make_document("a", 10), [self.runs[0]]) == range(10)

    def test_writing_goes_on_after_opening(self, make: Make, store: Path) -> None:
        more = make_rows(4, seed=5)
        backend = MemoryBackend.open(store, make().memory_type)
        assert backend.add(make_document("c", 4), [more]) == range(17, 21)
        assert_finds(backend, [*self.runs, more], range(21))
        backend.remove_document("b")
        backend.close()
        left = [*range(10), *range(17, 21)]
        assert_finds(MemoryBackend.open(store, make().memory_type), [*self.runs, more], left)

    @pytest.mark.parametrize("writer_kind", ["manual", "vector_db"])
    def test_two_writers_in_turn_keep_each_others_rows(
        self, make: Make, store: Path, writer_kind: str
    ) -> None:
        first, second = (
            MemoryBackend.open(store, make().memory_type),
            MemoryBackend.open(store, writer_kind),
        )
        runs = [*self.runs, make_rows(4, seed=5), make_rows(3, seed=6)]
        assert second.add(make_document("c", 4), [runs[2]]) == range(17, 21)
        assert first.add(make_document("d", 3), [runs[3]]) == range(21, 24)
        assert_finds(first, runs, range(24))
        assert_fetches(first, runs)
        assert_fetches(MemoryBackend.open(store, writer_kind), runs)

    def test_a_reader_is_safe_from_a_writer(self, make: Make, store: Path) -> None:
        reader, writer = (
            MemoryBackend.open(store, make().memory_type, sinks="one") for _ in range(2)
        )
        writer.add(make_document("c", 10), [make_rows(10, seed=5, sinks=[0])])
        writer.save()
        assert_finds(reader, self.runs, [row for row in range(17) if row != 10])
        assert_fetches(reader, self.runs)

    def test_a_reader_keeps_its_snapshot_until_it_refreshes(self, make: Make, store: Path) -> None:
        reader, writer = (MemoryBackend.open(store, make().memory_type) for _ in range(2))
        more, again = make_rows(4, seed=5), make_rows(4, seed=6)
        writer.add(make_document("c", 4), [more])
        writer.remove_document("a")
        writer.add(make_document("b", 4), [again], replace=True)
        assert_finds(reader, self.runs, range(17))
        assert_fetches(reader, self.runs)
        assert reader.catalog.document_names() == []  # what is gone is not quoted, nor mistaken
        assert reader.catalog.document_of_rows([0, 10, 17, 21]) == {}
        with pytest.raises(DocumentError, match="no document 'b'"):
            reader.catalog.document("b")
        for _ in range(2):
            reader.refresh()
            assert_finds(reader, [*self.runs, more, again], range(17, 25))
            assert reader.catalog.document_sizes() == [("c", 4, 4), ("b", 4, 4)]
            assert reader.catalog.document("b").first_row == 21

    def test_a_refresh_while_adding_is_refused(self, make: Make, tmp_path: Path) -> None:
        backend = make()

        def refreshing() -> Iterator[Rows]:
            yield self.runs[0]
            with pytest.raises(StoreError, match="written to already"):
                backend.refresh()
            yield make_rows(7, seed=2, first=3)

        backend.add(make_document("a", 10), refreshing())
        backend.save(tmp_path / "copy")
        assert_finds(backend, self.runs, range(17))
        assert verify(tmp_path / "copy") == []

    def test_a_refresh_finds_a_store_made_meanwhile(self, make: Make, tmp_path: Path) -> None:
        backend_class = type(make())
        reader, writer = (MemoryBackend(LAYOUT, kind, path=tmp_path / "new") for _ in range(2))
        reader.refresh()
        writer.add(make_document("a", 10), [self.runs[0]])
        assert len(reader) == 0
        reader.refresh()
        assert_finds(reader, self.runs, range(10))
        assert_fetches(reader, self.runs[:1])

    def test_a_second_writer_is_refused(self, make: Make, store: Path) -> None:
        backend = MemoryBackend.open(store, make().memory_type)
        with filelock.FileLock(store / "write.lock"):
            for write in (
                lambda: backend.add(make_document("c", 10), [self.runs[0]]),
                lambda: backend.remove([1]),
                lambda: backend.remove_document("a"),
                backend.clear,
            ):
                with pytest.raises(
                    StoreError, match=f"process is writing to '{re.escape(str(store))}'"
                ):
                    write()
            assert_finds(backend, self.runs, range(17))
        backend.remove([1])
        assert len(backend) == 16

    @pytest.mark.parametrize("step", ["write", "flush", "commit"])
    def test_a_full_disk_leaves_the_store_as_it_was(
        self, make: Make, store: Path, monkeypatch: pytest.MonkeyPatch, step: str
    ) -> None:
        backend = MemoryBackend.open(store, make().memory_type)
        before = _files(store)
        full = OSError(errno.ENOSPC, "No space left on device")

        def fail(*_: Any, **__: Any) -> Any:
            raise full

        target = {
            "write": "memory_backends.append_files.AppendFile.append",
            "flush": "memory_backends.append_files.os.fsync",
            "commit": "memory_backends.schema.write_setting",
        }[step]
        with monkeypatch.context() as patch:
            patch.setattr(target, fail)
            with pytest.raises(StoreError, match="No space left on device") as caught:
                backend.add(make_document("c", 10), [self.runs[0]])
        assert str(store) in str(caught.value)
        assert _files(store) == before
        assert_finds(backend, self.runs, range(17))
        assert backend.add(make_document("c", 10), [self.runs[0]]) == range(17, 27)
        assert_fetches(type(backend).open(store), [*self.runs, self.runs[0]])
        assert verify(store) == []

    def test_what_a_killed_writer_left_is_overwritten(self, make: Make, store: Path) -> None:
        for file in (store / "rows").iterdir():
            with file.open("ab") as tail:
                tail.write(b"\xff" * 1000)
        backend = MemoryBackend.open(store, make().memory_type)
        assert_finds(backend, self.runs, range(17))
        more = make_rows(4, seed=5)
        backend.add(make_document("c", 4), [more])
        assert_fetches(type(backend).open(store), [*self.runs, more])

    def test_what_was_killed_before_it_was_a_store_is_none(
        self, make: Make, tmp_path: Path
    ) -> None:
        path = tmp_path / "begun"
        path.mkdir()
        (path / "write.lock").touch()
        (path / "catalog.sqlite.partial").write_bytes(b"SQLite")
        backend = type(make())(LAYOUT, path=path)
        backend.add(make_document("a", 10), [self.runs[0]])
        assert_finds(type(backend).open(path), self.runs, range(10))

    # -- refusing stores ------------------------------------------------------------------------

    def test_another_models_store_is_refused(self, make: Make, store: Path) -> None:
        backend_class = type(make())
        other = {"architecture": "huge", "layers": 5, "tokenizer": "only here"}
        with pytest.raises(MemoryMismatchError) as caught:
            MemoryBackend(LAYOUT, kind, path=store, identity=other)
        message = str(caught.value)
        assert f"memory at '{store}'" in message
        assert "architecture: the memory has 'tiny', this model 'huge'" in message
        assert "layers: the memory has 4, this model 5" in message
        assert "tokenizer" not in message
        same = MemoryBackend(
            LAYOUT, kind, path=store, identity={"layers": 4, "tokenizer": "only here"}
        )
        assert_finds(same, self.runs, range(17))

    def test_another_layouts_store_is_refused(self, make: Make, store: Path) -> None:
        layout = MemoryLayout({0: LayerLayout(2, 8, 8)}, torch.float16)
        with pytest.raises(MemoryMismatchError) as caught:
            type(make())(layout, path=store)
        message = str(caught.value)
        assert "{'dtype': 'float32', 'layers': {'0': [2, 8, 8], '3': [1, 4, 6]}}" in message
        assert "this model has {'dtype': 'float16', 'layers': {'0': [2, 8, 8]}}" in message

    def test_a_path_without_a_store_is_refused(self, make: Make, tmp_path: Path) -> None:
        backend_class = type(make())
        file, folder = tmp_path / "file", tmp_path / "folder"
        file.write_text("hello")
        folder.mkdir()
        (folder / "thesis.tex").write_text("hello")
        for path, message in (
            (file, f"expected a store directory at '{file}'; it is a file"),
            (folder, f"expected a memory store with a catalog.sqlite at '{folder}'; found none"),
        ):
            with pytest.raises(StoreError, match=re.escape(message)):
                MemoryBackend(LAYOUT, kind, path=path)
            with pytest.raises(StoreError, match=re.escape(message)):
                MemoryBackend.open(path, kind)
        with pytest.raises(StoreError, match=r"expected a memory store .* found none"):
            MemoryBackend.open(tmp_path / "nowhere", kind)
        assert not (tmp_path / "nowhere").exists()
        assert (folder / "thesis.tex").read_text() == "hello"

    def test_a_copy_overwrites_nothing(self, make: Make, tmp_path: Path) -> None:
        (tmp_path / "taken").mkdir()
        (tmp_path / "taken" / "thesis.tex").write_text("hello")
        message = f"a new or an empty directory at '{tmp_path / 'taken'}'; it is not empty"
        with pytest.raises(StoreError, match=re.escape(message)):
            make().save(tmp_path / "taken")
        assert [file.name for file in (tmp_path / "taken").iterdir()] == ["thesis.tex"]

    def test_a_copy_that_fails_can_be_made_again(
        self, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        backend = make()
        backend.add(make_document("a", 10), [self.runs[0]])

        def fail(_: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            message = f"'{tmp_path / 'copy'}' cannot be written: No space left on device"
            with pytest.raises(StoreError, match=re.escape(message)):
                backend.save(tmp_path / "copy")
        backend.save(tmp_path / "copy")
        assert_finds(type(backend).open(tmp_path / "copy"), self.runs, range(10))

    @pytest.mark.parametrize("file", ["rows/layer-000.bin", "rows/layer-003.bin"])
    def test_missing_and_truncated_rows_are_found(self, make: Make, store: Path, file: str) -> None:
        path = store / file
        size = path.stat().st_size
        codec = MemoryBackend.open(store, make().memory_type).catalog.row_codec
        sizes = {"exact": (2 * 16 * 4, 10 * 4), "int8": (2 * (16 + 2), 10 + 2)}[codec]
        assert size == 17 * sizes["003" in file]
        os.truncate(path, size - 1)
        message = f"'{path}' is truncated to {size - 1} bytes; expected at least {size} bytes"
        with pytest.raises(StoreError, match=re.escape(message)):
            MemoryBackend.open(store, make().memory_type)
        path.unlink()
        message = f"'{path}' is missing; expected at least {size} bytes for 17 rows"
        with pytest.raises(StoreError, match=re.escape(message)):
            MemoryBackend.open(store, make().memory_type)

    @pytest.mark.parametrize(
        ("damage", "message"),
        [(b"", "no such table"), (b"not a database at all" * 100, "file is not a database")],
    )
    def test_a_damaged_catalogue_is_found(
        self, make: Make, store: Path, damage: bytes, message: str
    ) -> None:
        (store / "catalog.sqlite").write_bytes(damage)
        with pytest.raises(StoreError, match=f"{re.escape(str(store))}.*{message}"):
            MemoryBackend.open(store, make().memory_type)


def _files(store: Path) -> dict[str, bytes]:
    """Return the bytes of all files of a store, its lock and SQLite's own journal apart."""
    return {
        str(file.relative_to(store)): file.read_bytes()
        for file in store.rglob("*")
        if file.is_file() and file.name not in ("write.lock", "catalog.sqlite-journal")
    }
