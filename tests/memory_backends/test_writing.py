"""Writing: what is refused, what is all or nothing, and what waits for what."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import numpy as np
import pytest

from memory_backends import (
    Document,
    DocumentError,
    MemoryBackend,
    MemoryMismatchError,
    Rows,
    StoreError,
    verify,
)
from memory_backends.catalog import Catalog
from memory_backends.testing.checks import assert_fetches, assert_finds
from memory_backends.testing.rows import LAYOUT, make_document, make_rows

RUNS = [make_rows(10, seed=1, sinks=[0]), make_rows(7, seed=2, sinks=[0])]


@pytest.fixture(params=["in RAM", "exact", "int8"])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> MemoryBackend:
    """An empty memory, of each kind of row storage."""
    if request.param == "in RAM":
        return MemoryBackend(LAYOUT)
    return MemoryBackend(LAYOUT, path=tmp_path / "store", row_codec=request.param)


@pytest.fixture
def filled(backend: MemoryBackend) -> MemoryBackend:
    """A memory with the document 'a'."""
    backend.add(make_document("a", 10), [RUNS[0]])
    return backend


def failing(error: BaseException) -> Iterator[Rows]:
    yield make_rows(500, seed=9)
    raise error


def test_documents_are_kept_whole(filled: MemoryBackend, tmp_path: Path) -> None:
    offsets = np.array([[0, 0], [0, 2], [2, 5]], dtype=np.int32)
    document = Document("née.txt", np.array([1, 70, 9], dtype=np.int32), "onetwo", offsets)
    filled.add(document, [make_rows(2, seed=1, sinks=[1], first=1)])
    filled.save(tmp_path / "copy")
    for memory in (filled, MemoryBackend.open(tmp_path / "copy")):
        stored = memory.catalog.document("née.txt")
        assert stored.token_ids.tolist() == [1, 70, 9]
        assert stored.text == "onetwo"
        assert stored.offsets is not None
        assert stored.offsets.tolist() == offsets.tolist()
        assert (stored.first_row, stored.row_tokens.tolist()) == (10, [1, 2])
        assert stored.sink_rows.tolist() == [1]
        assert memory.catalog.document_sizes() == [("a", 10, 10), ("née.txt", 3, 2)]
        assert memory.catalog.document_of_rows([9, 10, 12]) == {9: "a", 10: "née.txt"}


def test_a_taken_name_is_refused_before_its_rows_are_read(filled: MemoryBackend) -> None:
    unread = iter([RUNS[1]])
    with pytest.raises(DocumentError, match="document 'a' is already in the memory"):
        filled.add(make_document("a", 7), unread)
    assert len(next(unread)) == 7
    assert_finds(filled, RUNS, range(10))


@pytest.mark.parametrize("error", [OSError(2, "gone"), KeyboardInterrupt()])
def test_an_error_of_the_rows_is_not_called_one_of_the_store(
    filled: MemoryBackend, error: BaseException
) -> None:
    with pytest.raises(type(error)) as caught:
        filled.add(make_document("x", 500), failing(error))
    assert caught.value is error
    assert_finds(filled, RUNS, range(10))


@pytest.mark.parametrize("nested", ["add", "refresh"])
def test_another_call_while_adding_is_refused(backend: MemoryBackend, nested: str) -> None:
    def rows() -> Iterator[Rows]:
        yield RUNS[0]
        call: Callable[[], object] = {
            "add": lambda: backend.add(make_document("inner", 10), [RUNS[0]]),
            "refresh": backend.refresh,
        }[nested]
        with pytest.raises(StoreError, match="written to already"):
            call()
        yield make_rows(7, seed=2, first=3)

    backend.add(make_document("outer", 10), rows())
    assert backend.catalog.document_names() == ["outer"]
    assert_finds(backend, RUNS, range(17))


KEYS, VALUES = {3: torch.ones(1, 2, 4)}, {3: torch.ones(1, 2, 6)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys": {0: torch.ones(4, 2, 8), **KEYS}}, r"keys of layer 0 .*got \(4, 2, 8\)"),
        (
            {"values": {0: torch.ones(2, 2, 8), 3: VALUES[3].half()}},
            r"values of layer 3 .*value_head_dim=6.*got \(1, 2, 6\), torch.float16",
        ),
        ({"keys": KEYS}, r"layers \[0, 3\]; got \[3\]"),
        (
            {"keys": {0: torch.ones(2, 2, 8), 3: torch.tensor([[[1.0] * 4, [0.0] * 4]])}},
            "layer 3, KV head 0, row 4 that is zero",
        ),
        (
            {"values": {0: torch.ones(2, 2, 8) / 0, **VALUES}},
            "layer 0, KV head 0, row 3 that is NaN",
        ),
        ({"tokens": np.array([4, 5], dtype=np.int32)}, r"'x' .* tokens 0 to 4; got 4 to 5"),
        ({"sinks": np.zeros(3, dtype=bool)}, r"got \(2,\) and \(3,\)"),
    ],
)
def test_rows_that_do_not_fit_are_refused(
    filled: MemoryBackend, change: dict[str, Any], message: str
) -> None:
    good = make_rows(2, seed=4)
    parts = {name: getattr(good, name) for name in ("keys", "values", "tokens", "sinks")}
    with pytest.raises(MemoryMismatchError, match=message):
        filled.add(make_document("x", 5), [make_rows(3, seed=4), Rows(**{**parts, **change})])
    assert filled.catalog.document_names() == ["a"]
    assert_finds(filled, RUNS, range(10))


@pytest.mark.parametrize(
    ("document", "rows", "message"),
    [
        (make_document("", 10), [RUNS[0]], "got ''"),
        (Document("x", np.zeros((1, 10), np.int32)), [RUNS[0]], r"got \(1, 10\)"),
        (
            Document("x", np.zeros(10, np.int32), "", np.zeros((9, 2), np.int32)),
            [RUNS[0]],
            r"\(T=10, 2\), .*; got \(9, 2\)",
        ),
        (make_document("x", 0), [], "'x' has no rows"),
        (make_document("x", 0), [make_rows(0, seed=1)], "'x' has no rows"),
    ],
)
def test_a_document_that_does_not_fit_is_refused(
    document: Document, rows: list[Rows], message: str
) -> None:
    backend = MemoryBackend(LAYOUT)
    with pytest.raises(DocumentError, match=message):
        backend.add(document, rows)
    assert backend.catalog.document_names() == []


def test_removing_rows_that_never_were_is_refused(filled: MemoryBackend) -> None:
    with pytest.raises(MemoryMismatchError, match=r"less than 10, .*; got \[-1, 10\]"):
        filled.remove([2, 10, -1])
    assert_finds(filled, RUNS, range(10))


# -- many documents -----------------------------------------------------------------------------


def test_many_documents_are_committed_in_groups(
    backend: MemoryBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [make_rows(n, seed=n, sinks=[0]) for n in (3, 4, 5, 6, 7)]
    groups: list[int] = []
    commit = Catalog.commit

    def counting(catalog: Catalog, documents: Any, **options: Any) -> Any:
        groups.append(len(documents))
        return commit(catalog, documents, **options)

    monkeypatch.setattr(Catalog, "commit", counting)
    documents = ((make_document(f"{len(run)}", len(run)), [run]) for run in runs)
    expected = [("3", range(3)), ("4", range(3, 7)), ("5", range(7, 12)), ("6", range(12, 18))]
    added = list(backend.add_many(documents, rows_per_commit=7))
    assert added == [*expected, ("7", range(18, 25))]
    assert groups == [2, 2, 1]
    assert_finds(backend, runs, range(25))
    assert_fetches(backend, runs)
    assert backend.catalog.document("6").sink_rows.tolist() == [0]


def test_each_of_many_is_yielded_after_it_is_committed(backend: MemoryBackend) -> None:
    taken = []

    def documents() -> Iterator[tuple[Document, list[Rows]]]:
        for name in "abcd":
            taken.append(name)
            yield make_document(name, 10), [RUNS[0]]

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


@pytest.mark.parametrize("fails", ["rows", "name", "shape"])
def test_documents_before_one_that_fails_are_kept(
    backend: MemoryBackend, tmp_path: Path, fails: str
) -> None:
    def documents() -> Iterator[tuple[Document, Iterable[Rows]]]:
        yield make_document("a", 10), [RUNS[0]]
        yield make_document("b", 7), [RUNS[1]]
        yield {
            "rows": (make_document("x", 500), failing(RuntimeError("cut"))),
            "name": (make_document("a", 10), [RUNS[0]]),
            "shape": (make_document("x", 1), [make_rows(500, seed=9)]),
        }[fails]

    error = {"name": DocumentError, "shape": MemoryMismatchError}.get(fails, RuntimeError)
    added: list[tuple[str, range]] = []
    with pytest.raises(error):
        added.extend(backend.add_many(documents()))  # keeps what came before the error
    assert added == [("a", range(10)), ("b", range(10, 17))]
    assert_finds(backend, RUNS, range(17))
    more = make_rows(4, seed=5)
    assert backend.add(make_document("c", 4), [more]) == range(17, 21)
    assert_fetches(backend, [*RUNS, more])
    backend.save(tmp_path / "copy")
    assert verify(tmp_path / "copy") == []


def test_many_replace_each_other(filled: MemoryBackend) -> None:
    again = [(make_document("a", len(run)), [run]) for run in (RUNS[1], RUNS[0])]
    added = list(filled.add_many(again, replace=True))
    assert added == [("a", range(10, 17)), ("a", range(17, 27))]
    assert filled.catalog.document_sizes() == [("a", 10, 10)]
    assert_finds(filled, [RUNS[0], RUNS[1], RUNS[0]], range(17, 27))


def test_many_of_none_are_none(backend: MemoryBackend) -> None:
    assert list(backend.add_many([])) == []
