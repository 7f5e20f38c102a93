"""Where rows live: on a device or in mapped files."""

from __future__ import annotations

import re
from pathlib import Path

import torch
import numpy as np
import pytest

from memory_backends import LayerLayout, MemoryLayout, StoreError
from memory_backends.layout import Rows
from memory_backends.rows.base import RowStorage, interleave
from memory_backends.rows.files import RowFiles
from memory_backends.rows.tensors import RowTensors
from memory_backends.testing.rows import LAYOUT, make_rows


@pytest.fixture(params=["tensors", "files"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> RowStorage:
    if request.param == "tensors":
        return RowTensors(LAYOUT, torch.device("cpu"))
    return RowFiles(LAYOUT, tmp_path, 0)


def test_a_row_is_its_heads_keys_and_values_side_by_side() -> None:
    rows = make_rows(4, seed=1)
    joined = interleave(rows, 3)
    assert joined.shape == (4, 1, 10)
    for row, head in np.ndindex(4, 1):
        assert joined[row, head, :4].tolist() == rows.keys[3][head, row].tolist()
        assert joined[row, head, 4:].tolist() == rows.values[3][head, row].tolist()


def test_appended_rows_show_when_committed(storage: RowStorage) -> None:
    first, second = make_rows(300, seed=1), make_rows(5, seed=2)
    storage.append(first)
    storage.append(second)
    storage.flush()
    assert storage.num_rows == 0
    assert storage.span(0, 0, 5).shape == (0, 2, 16)
    storage.show(305)
    assert storage.num_rows == 305
    for layer_idx in (0, 3):
        expected = torch.cat([interleave(first, layer_idx), interleave(second, layer_idx)])
        assert torch.equal(storage.span(layer_idx, 0, 305), expected)
        assert torch.equal(storage.span(layer_idx, 299, 302), expected[299:302])
        heads = expected.shape[1]
        ids = torch.randint(0, 305, (heads, 3, 4))
        rows = storage.gather(layer_idx, ids)
        assert rows.shape == (heads, 3, 4, expected.shape[2])
        for head in range(heads):
            assert torch.equal(rows[head], expected[ids[head], head])
        places = ids * heads + torch.arange(heads).view(-1, 1, 1)
        assert torch.equal(storage.take(layer_idx, places), rows)
        if isinstance(storage, RowFiles):
            raw = storage.records(layer_idx, 2, 4)
            assert raw.numpy().tobytes() == expected[2:4].numpy().tobytes()


def test_forgotten_rows_are_overwritten(storage: RowStorage) -> None:
    runs = [make_rows(5, seed=seed) for seed in range(3)]
    storage.append(runs[0])
    storage.flush()
    storage.show(5)
    held = storage.span(0, 0, 5)
    storage.append(runs[1])
    storage.flush()
    storage.show(5)
    assert torch.equal(storage.span(0, 0, 5), interleave(runs[0], 0))
    storage.append(runs[2])
    storage.flush()
    storage.show(10)
    assert torch.equal(storage.span(0, 5, 10), interleave(runs[2], 0))
    assert torch.equal(held, interleave(runs[0], 0))


@pytest.mark.parametrize(
    ("dtype", "bits"), [(torch.float16, "<f2"), (torch.bfloat16, "<u2"), (torch.float32, "<f4")]
)
def test_every_bit_pattern_survives(tmp_path: Path, dtype: torch.dtype, bits: str) -> None:
    layout = MemoryLayout({0: LayerLayout(1, 2, 1)}, dtype)
    special = torch.tensor([1.0, -0.0, torch.finfo(dtype).tiny, torch.finfo(dtype).max]).to(dtype)
    rows = Rows.of({0: special.view(1, 2, 2)}, {0: special[2:].view(1, 2, 1)})
    files = RowFiles(layout, tmp_path, 0)
    assert not (tmp_path / "rows").exists()  # a store without rows needs none
    files.append(rows)
    files.flush()
    files.show(2)
    again = RowFiles(layout, tmp_path, 2).span(0, 0, 2)
    assert again.dtype == dtype
    assert again.flatten().tolist() == special[[0, 1, 2, 2, 3, 3]].tolist()
    raw = np.fromfile(tmp_path / "rows" / "layer-000.bin", bits)
    assert len(raw) == 6
    if dtype == torch.bfloat16:  # the upper half of a float32
        expected = again.float().flatten().numpy().view(np.uint32) >> 16
        assert raw.tolist() == expected.tolist()
    else:
        assert raw.astype(np.float32).tolist() == special[[0, 1, 2, 2, 3, 3]].tolist()


def test_a_file_cut_while_open_is_not_filled_up(tmp_path: Path) -> None:
    files = RowFiles(LAYOUT, tmp_path, 0)
    files.append(make_rows(5, seed=1))
    files.flush()
    files.show(5)
    path = tmp_path / "rows" / "layer-000.bin"
    path.write_bytes(path.read_bytes()[:100])
    message = f"'{path}' is truncated to 100 bytes; expected at least 640 bytes for 5 rows"
    for use in (
        lambda: files.show(5, anew=True),
        lambda: files.append(make_rows(1, seed=2)),
        lambda: RowFiles(LAYOUT, tmp_path, 5),
    ):
        with pytest.raises(StoreError, match=re.escape(message)):
            use()
    assert path.stat().st_size == 100
