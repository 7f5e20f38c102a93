"""A memory that grows: the rows of one written at once, and no token read twice."""

import torch
import pytest
from experiments.perplexity.growing import GrowingMemory

from emt import MemoryConfig, attach
from emt.ingest.windows import Windows
from tests.experiments.long_texts import random_ids, tiny

IDS = torch.cat([torch.tensor([1]), random_ids(60, 4)])
WINDOWS = {"stride": 8, "max_length": 24}


def all_rows(backend, layer_idx):
    """Keys and values of every row, in order."""
    ids = torch.arange(backend.catalog.num_rows).expand(2, -1)
    return backend.fetch(layer_idx, ids)


@pytest.mark.parametrize("carry_context", [False, True])
def test_it_has_the_rows_of_a_memory_written_at_once(carry_context):
    config = MemoryConfig(**WINDOWS, carry_context=carry_context, special_ids=[1])
    loaded, other = tiny(), tiny()
    memory, expected = attach(loaded.model, config), attach(other.model, config)
    expected.write(IDS[:53], document="at once")
    growing = GrowingMemory(memory, IDS[:53], [memory.backend], [1])
    read = []
    loaded.model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    for length in (0, 10, 10, 30, 53):
        growing.grow(length)
        assert len(memory) == max(length - 1, 0)  # <bos> has no row
    assert sum(read) == Windows(8, 24, carry_context).tokens_run(53)
    for layer_idx in memory.layers:
        rows = zip(
            all_rows(memory.backend, layer_idx), all_rows(expected.backend, layer_idx), strict=True
        )
        for found, wanted in rows:
            assert torch.allclose(found, wanted, atol=1e-5)
    sinks = [backend.catalog.sink_rows().tolist() for backend in (memory.backend, expected.backend)]
    assert sinks == [[0, 1, 2], [0, 1, 2]]


def test_documents_have_the_tokens_of_their_rows():
    memory = attach(tiny().model, MemoryConfig(**WINDOWS, special_ids=[1]))
    growing = GrowingMemory(memory, IDS, [memory.backend], [1])
    growing.grow(1)
    assert memory.documents == []
    growing.grow(30)
    assert memory.documents == ["tokens 1 to 23", "tokens 24 to 29"]
    document = memory.backend.catalog.document("tokens 24 to 29")
    assert document.token_ids.tolist() == IDS[24:30].tolist()
    assert document.row_tokens.tolist() == list(range(6))


def test_it_cannot_grow_beyond_the_text():
    memory = attach(tiny().model, MemoryConfig(**WINDOWS))
    with pytest.raises(ValueError, match="at most 61; got 62"):
        GrowingMemory(memory, IDS, [memory.backend]).grow(62)
