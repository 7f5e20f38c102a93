"""One layer's records: parts of KV heads, and the rest of the keys of fine heads."""

from __future__ import annotations

from pathlib import Path

import torch
import numpy as np
import pytest

from memory_backends import LayerLayout, MemoryBackend, StoreError, verify
from memory_backends.catalog import Catalog
from memory_backends.rows import files
from memory_backends.rows.codecs import row_codec
from memory_backends.rows.records import LayerRecords
from memory_backends.testing.rows import LAYOUT, make_document, make_rows

SHAPES = [LayerLayout(3, 16, 16), LayerLayout(2, 24, 8), LayerLayout(4, 40, 2)]


def rows_of(layer: LayerLayout, num_rows: int = 300) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (num_rows, layer.num_key_value_heads, layer.row_dim)
    return torch.randn(shape, generator=generator) + 3


def records_of(layer: LayerLayout, rows: torch.Tensor, fine: list[int]) -> LayerRecords:
    codec = row_codec("int5.5", torch.float32)
    coder = codec.coder(layer, codec.learn(layer, rows))
    return LayerRecords(coder, layer, codec.record_bytes(layer), fine)


@pytest.mark.parametrize("layer", SHAPES, ids=str)
def test_keys_of_fine_heads_are_as_near_as_their_step_says(layer: LayerLayout) -> None:
    rows, dim = rows_of(layer), layer.head_dim
    plain, fine = records_of(layer, rows, []), records_of(layer, rows, [1])
    part_bytes = row_codec("int5.5", torch.float32).record_bytes(layer)
    records = fine.encode(rows)
    assert records.shape == (300, layer.num_key_value_heads * part_bytes + 2 + dim)
    coded, refined = plain.span(plain.encode(rows)), fine.span(records)
    assert torch.equal(records[:, : plain.encode(rows).shape[1]], plain.encode(rows))
    rest = (rows - coded)[:, 1, :dim].numpy()
    step = np.abs(rest).max(-1, keepdims=True) / 127
    error = np.abs((refined - rows)[:, 1, :dim].numpy())
    assert (error <= step * (0.5 + 127 * 2**-10) + 1e-6).all()  # half a step, and float16's step
    others = torch.ones_like(rows, dtype=torch.bool)
    others[:, 1, :dim] = False
    assert torch.equal(refined[others], coded[others])


@pytest.mark.parametrize("fine", [[], [0, 2], [1]])
@pytest.mark.parametrize("layer", [SHAPES[0], LayerLayout(3, 40, 2)], ids=str)
def test_gathered_and_taken_rows_are_those_of_a_span(layer: LayerLayout, fine: list[int]) -> None:
    rows = rows_of(layer)
    records = records_of(layer, rows, fine)
    data = records.encode(rows)
    whole = records.span(data)
    ids = torch.randint(0, 300, (3, 4, 2), generator=torch.Generator().manual_seed(2))
    heads = torch.arange(3).view(3, 1, 1)
    torch.testing.assert_close(records.gather(data, ids), whole[ids, heads])
    torch.testing.assert_close(records.take(data, ids * 3 + heads), whole[ids, heads])
    torch.testing.assert_close(records.gather(data, ids[:2], [2, 0]), whole[ids[:2], heads[[2, 0]]])
    torch.testing.assert_close(records.span(data[5:9], [2, 0]), whole[5:9, [2, 0]])
    torch.testing.assert_close(records.span(data[5:6]), whole[5:6])
    assert records.encode(rows[:0]).shape == (0, data.shape[1])
    assert records.span(data[:0]).shape == (0, 3, layer.row_dim)


def test_a_gather_from_a_large_file_reads_what_it_takes() -> None:
    """Of a file of 10^15 records, which are all the same here and take no space."""
    layer = SHAPES[0]
    rows = rows_of(layer)
    records = records_of(layer, rows, [1])
    data = records.encode(rows)[7:8]
    ids = torch.tensor([[0], [10**15 - 1], [5]])
    large = data.expand(10**15, -1)
    expected = records.span(data)[0, :, None]  # (3, 1, R)
    torch.testing.assert_close(records.gather(large, ids), expected)
    torch.testing.assert_close(records.gather(large, ids[:1], [1]), expected[[1]])
    torch.testing.assert_close(records.take(large, ids * 3 + torch.arange(3)[:, None]), expected)


def test_any_bytes_are_finite_numbers() -> None:
    layer = SHAPES[0]
    rows = rows_of(layer)
    records = records_of(layer, rows, [0])
    size = records.encode(rows).shape[1]
    generator = torch.Generator().manual_seed(3)
    damaged = torch.randint(0, 256, (500, size), dtype=torch.uint8, generator=generator)
    assert records.span(damaged).isfinite().all()
    assert records.span(torch.zeros_like(damaged)).isfinite().all()


def test_bits_go_where_queries_look() -> None:
    """Scores of queries that look along few directions are nearer to those of exact keys."""
    layer = LayerLayout(2, 16, 16)
    generator = torch.Generator().manual_seed(4)
    rows = torch.randn(2000, 2, 32, generator=generator)
    queries = torch.randn(2, 400, 16, generator=generator) * torch.tensor([4.0] * 4 + [0.2] * 12)
    codec = row_codec("int5.5", torch.float32)

    def errors(asked: torch.Tensor | None) -> tuple[float, float]:
        coder = codec.coder(layer, codec.learn(layer, rows[:600], asked))
        error = (coder.decode(coder.encode(rows), 1) - rows)[600:].numpy()
        scores = np.einsum("hqd,nhd->hqn", queries[:, 200:].numpy(), error[..., :16]) / 4.0
        return float((scores**2).mean()), float((error[..., 16:] ** 2).mean())

    (usual_scores, usual_values), (scores, values) = errors(None), errors(queries[:, :200])
    assert scores < 0.3 * usual_scores
    assert values < usual_values  # and bits are left for values
    for unusable in (queries[:, :0], torch.zeros_like(queries)):
        assert errors(unusable) == errors(None)


@pytest.fixture
def few_rows_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "ROWS_TO_LEARN", 10)


@pytest.mark.parametrize("memory_type", ["manual", "vector_db"])
@pytest.mark.usefixtures("few_rows_are_enough")
def test_a_new_store_keeps_the_keys_of_searched_heads_finely(
    memory_type: str, tmp_path: Path
) -> None:
    rows, path = make_rows(600, seed=1), tmp_path / "m"
    errors = {}
    for name, heads in (("all", None), ("one", {3: [0]})):
        backend = MemoryBackend(LAYOUT, memory_type, path=tmp_path / name, row_codec="int5.5")
        backend.index_heads(heads)
        backend.add(make_document("a", 600), [rows])
        backend.save()
        key = backend.fetch(3, torch.arange(600)[None].expand(rows.keys[3].shape[0], -1))[0][0]
        errors[name] = float((key - rows.keys[3][0]).norm() / rows.keys[3][0].norm())
        assert verify(tmp_path / name) == []
        backend.save(tmp_path / f"{name} copy")
        assert verify(tmp_path / f"{name} copy") == []
        backend.close()
    assert errors["one"] < 0.02 * errors["all"]
    for copy in ("one", "one copy"):
        reopened = MemoryBackend.open(tmp_path / copy, memory_type)
        reopened.index_heads({0: [1]})  # too late: the store is made
        assert reopened.catalog.fine_heads == {3: (0,)}
        ids = torch.arange(600)[None].expand(rows.keys[3].shape[0], -1)
        assert (reopened.fetch(3, ids)[0][0] - rows.keys[3][0]).norm() < 0.02 * errors["all"] * (
            rows.keys[3][0].norm()
        )
        reopened.close()
    assert not path.exists()


@pytest.mark.usefixtures("few_rows_are_enough")
def test_a_memory_in_ram_is_saved_with_fine_heads(tmp_path: Path) -> None:
    rows, backend = make_rows(600, seed=1), MemoryBackend(LAYOUT, row_codec="int5.5")
    backend.add(make_document("a", 600), [rows])
    backend.index_heads({3: [0]})
    backend.save(tmp_path / "m")
    saved = MemoryBackend.open(tmp_path / "m")
    ids = torch.arange(600)[None].expand(rows.keys[3].shape[0], -1)
    error = saved.fetch(3, ids)[0][0] - rows.keys[3][0]
    assert error.norm() < 2e-3 * rows.keys[3][0].norm()
    assert verify(tmp_path / "m") == []


@pytest.mark.parametrize(
    "damage", [[0], {"3": 0}, {"1": [0]}, {"3": [99]}, {"3": [0, 0]}, {"3": [True]}, {"3": ["0"]}]
)
def test_fine_heads_that_the_layout_has_not_are_damage(damage: object, tmp_path: Path) -> None:
    backend = MemoryBackend(LAYOUT, path=tmp_path / "m", row_codec="int5.5")
    backend.add(make_document("a", 5), [make_rows(5, seed=1)])
    backend.catalog.set_setting("fine_heads", damage)
    backend.close()
    with pytest.raises(StoreError, match="fine_heads must be ascending KV heads"):
        Catalog.open(tmp_path / "m")
