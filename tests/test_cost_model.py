"""The cost model of docs/scale.md: its bytes are those of stores, its tables the script's."""

import torch
import numpy as np
import pytest
from cost_model import CODECS, DOCS, MODELS, Assumptions, Model, cost, written

from memory_backends import Document, MemoryBackend, MemoryLayout, Rows
from memory_backends.layout import LayerLayout

LAYERS, HEADS, DIM, NUM_ROWS = 3, 2, 16, 4000
SEARCHED = {0: [1], 2: [0, 1]}


@pytest.mark.parametrize("codec", CODECS)
def test_bytes_a_token_are_those_of_a_store(tmp_path, codec):
    layout = MemoryLayout(dict.fromkeys(range(LAYERS), LayerLayout(HEADS, DIM, DIM)), torch.float32)
    index = {"index": "IVF4,SQfp16", "indexed_heads": SEARCHED}
    backend = MemoryBackend(layout, "vector_db", path=tmp_path, row_codec=codec, **index)
    backend.index_heads(SEARCHED)
    keys = {idx: torch.randn(HEADS, NUM_ROWS, DIM) for idx in range(LAYERS)}
    values = {idx: torch.randn(HEADS, NUM_ROWS, DIM) for idx in range(LAYERS)}
    backend.add(Document("one", np.zeros(NUM_ROWS, dtype=np.int32)), [Rows.of(keys, values)])
    backend.save()
    backend.close()
    model = Model("tiny", LAYERS, HEADS, DIM, 4, 1e3, searched_heads=3)
    files = [*(tmp_path / "rows").iterdir()]
    assert sum(file.stat().st_size for file in files) == NUM_ROWS * model.row_bytes(codec)
    files = [*(tmp_path / "index").rglob("*.faiss")]
    num_bytes = sum(file.stat().st_size for file in files)
    assert len(files) == 3
    overhead = num_bytes - NUM_ROWS * model.index_bytes  # centroids and headers
    assert 0 < overhead < 3 * 1500


def test_costs_are_those_of_the_formulas():
    """An 8B model in half precision, a billion tokens, by hand."""
    given = Assumptions()
    model, tokens = MODELS[1], 10**9
    assert model.row_bytes("float16") == 131_072
    found = cost(model, "float16", tokens, given)
    assert found.bytes == tokens * (131_072 + 2_112 + 20)
    assert found.gpu_hours == pytest.approx(tokens * 131_072 * 8 / 1e9 / 3600)  # the disk's
    assert found.machines == 17
    assert found.read_dollars == pytest.approx(found.gpu_hours * 2.69)
    assert found.disk_dollars == pytest.approx(found.bytes / 1e9 * 0.08)
    text = cost(model, "text", tokens, given)
    assert text.gpu_hours == pytest.approx(tokens * 2 * 8e9 / (989e12 * 0.4) / 3600)
    assert text.machines == 9  # the index in RAM


def test_the_page_has_the_tables_of_the_script():
    page = DOCS.read_text(encoding="utf-8")
    assert page == written(page, Assumptions()), "run python scripts/cost_model.py --write"
