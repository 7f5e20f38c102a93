"""Merging and splitting: the same documents with the same rows, in other stores."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
import pytest

from memory_backends import DocumentError, MemoryBackend, MemoryMismatchError, StoreError, verify
from memory_backends.layout import Document, MemoryLayout, Rows
from memory_backends.sharded import is_sharded, merge, split
from memory_backends.testing.rows import IDENTITY, LAYOUT, make_document, make_rows
from tests.memory_backends.sharded.worlds import SIZES, assert_same, filled, sharded


def store(path: Path, names: Any = SIZES, **options: Any) -> Path:
    given = {"identity": IDENTITY, **options}
    with contextlib.closing(MemoryBackend(LAYOUT, path=path, **given)) as backend:
        filled(backend, names)
    return path


def test_a_split_store_is_the_same_memory_and_so_is_what_is_merged_of_it(tmp_path: Path) -> None:
    """With rows that were removed singly; ids count from 0 again."""
    source = store(tmp_path / "one")
    with contextlib.closing(MemoryBackend.open(source)) as backend:
        backend.remove_document("d0")
        backend.remove([6, 7])
        backend.set_setting("mine", {"a": 1})
    assert split(source, tmp_path / "many", 3) == 11
    assert is_sharded(tmp_path / "many")
    assert merge([tmp_path / "many"], tmp_path / "merged") == 11
    assert not is_sharded(tmp_path / "merged")
    many, merged = MemoryBackend.open(tmp_path / "many"), MemoryBackend.open(tmp_path / "merged")
    assert_same(merged, many)
    assert merged.catalog.num_rows == sum(SIZES.values()) - 5
    assert len(merged) == sum(SIZES.values()) - 7
    assert merged.catalog.setting("mine") == many.catalog.setting("mine") == {"a": 1}
    with contextlib.closing(MemoryBackend.open(source)) as backend:
        names = backend.catalog.document_names()
        assert merged.catalog.document_names() == names
        for name in names:
            firsts = [each.catalog.document(name).first_row for each in (backend, merged)]
            rows = [
                each.fetch_layers(torch.arange(first, first + SIZES[name]))
                for each, first in zip((backend, merged), firsts, strict=True)
            ]
            assert all(map(torch.equal, rows[0][3], rows[1][3]))
    assert verify(tmp_path / "many") == verify(tmp_path / "merged") == []


def test_several_stores_become_one(tmp_path: Path) -> None:
    """Sharded ones among them."""
    first, rest = list(SIZES)[:5], list(SIZES)[5:]
    store(tmp_path / "a", first)
    filled(sharded(tmp_path / "b", 2), rest).close()
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    with contextlib.closing(MemoryBackend.open(tmp_path / "c")) as merged:
        assert merged.catalog.document_names() == [*first, *rest]


def test_quantised_rows_are_copied_as_they_are(tmp_path: Path) -> None:
    """The shards know what the store's codec has learned; so do stores that are merged of them."""
    rows = make_rows(900, 5)
    source = tmp_path / "one"
    with contextlib.closing(MemoryBackend(LAYOUT, path=source, row_codec="int4")) as backend:
        for number in range(3):
            part = slice(300 * number, 300 * number + 300)
            run = Rows.of(
                {idx: keys[:, part] for idx, keys in rows.keys.items()},
                {idx: values[:, part] for idx, values in rows.values.items()},
            )
            backend.add(make_document(f"d{number}", 300), [run])
    split(source, tmp_path / "many", 2)
    merge([tmp_path / "many"], tmp_path / "merged")
    backends = [MemoryBackend.open(tmp_path / name) for name in ("one", "many", "merged")]
    expected, *others = (backend.fetch_layers(torch.arange(900)) for backend in backends)
    for other in others:
        for layer_idx, parts in expected.items():
            assert all(map(torch.equal, other[layer_idx], parts))


def test_query_samples_come_along(tmp_path: Path) -> None:
    rows = make_rows(300, 1)
    queries = {0: torch.randn(4, 300, 8), 3: torch.randn(2, 300, 4)}
    rows = Rows(rows.keys, rows.values, rows.tokens, rows.sinks, queries)
    with contextlib.closing(MemoryBackend(LAYOUT, path=tmp_path / "one")) as backend:
        backend.add(make_document("a", 300), [rows])
        backend.add(make_document("b", 40), [make_rows(40, 2)])
        expected = backend.sampled_queries(0)
    split(tmp_path / "one", tmp_path / "many", 2)
    merge([tmp_path / "many"], tmp_path / "merged")
    merge([tmp_path / "one"], tmp_path / "copy")
    for name in ("many", "merged", "copy"):
        with contextlib.closing(MemoryBackend.open(tmp_path / name)) as backend:
            samples = backend.sampled_queries(0)
        assert samples.shape == expected.shape
        torch.testing.assert_close(samples.sum(1), expected.sum(1))  # in whatever order
        assert verify(tmp_path / name) == []


def test_names_that_several_stores_have_are_named(tmp_path: Path) -> None:
    """And nothing is made."""
    store(tmp_path / "a"), store(tmp_path / "b", ["x", "d3", "d7"])
    with pytest.raises(DocumentError, match="'d3', 'd7'"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"row_codec": "float16"}, "one codec.*exact.*float16"),
        ({"identity": {"architecture": "other"}}, "another model"),
    ],
)
def test_stores_that_do_not_fit_are_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    store(tmp_path / "a"), store(tmp_path / "b", ["x"], **options)
    with pytest.raises(MemoryMismatchError, match=message):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    other = MemoryLayout({0: LAYOUT.layers[3]}, torch.float32)
    with contextlib.closing(MemoryBackend(other, path=tmp_path / "d")) as backend:
        backend.add(Document("y", make_document("y", 3).token_ids), [make_rows(3, 1, layout=other)])
    with pytest.raises(MemoryMismatchError, match="has layout"):
        merge([tmp_path / "a", tmp_path / "d"], tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_nothing_is_left_of_a_merge_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(tmp_path / "a")

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("memory_backends.sharded.moving._copy", fail)
    with pytest.raises(StoreError, match="No space left"):
        split(tmp_path / "a", tmp_path / "b", 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]
    with pytest.raises(StoreError, match="not empty"):
        merge([tmp_path / "a"], tmp_path / "a")
