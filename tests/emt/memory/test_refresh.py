"""`Memory.refresh` and `Memory.compact`: what other processes wrote, and space given back."""

import torch
import pytest

from emt import MemoryConfig, attach
from emt.errors import MemoryUseError
from tests.families import build

PROMPT = torch.tensor([[5, 9, 33, 60, 41, 18]])


@torch.no_grad()
def logits(model):
    return model(PROMPT).logits


def attached(path, memory_type):
    model = build("llama")
    return model, attach(model, MemoryConfig(memory_type=memory_type, path=str(path)))


@pytest.mark.parametrize("memory_type", ["manual", "vector_db"])
def test_refresh_shows_what_another_memory_wrote_and_removed(tmp_path, memory_type):
    writing, writer = attached(tmp_path / "store", memory_type)
    writer.write(range(3, 40), document="first")
    reading, reader = attached(tmp_path / "store", memory_type)
    before = logits(reading)
    torch.testing.assert_close(before, logits(writing))
    writer.write(range(40, 90), document="second")
    assert len(reader) == 37
    torch.testing.assert_close(logits(reading), before)
    reader.refresh()
    assert (reader.documents, len(reader)) == (["first", "second"], 87)
    torch.testing.assert_close(logits(reading), logits(writing))
    writer.remove("first")
    reader.refresh()
    assert (reader.documents, len(reader)) == (["second"], 50)
    torch.testing.assert_close(logits(reading), logits(writing))


def test_compact_gives_back_at_least_the_pages_of_what_was_removed(tmp_path):
    model, memory = attached(tmp_path / "store", "vector_db")
    memory.write([3 + number * number % 90 for number in range(4000)], document="long")
    memory.write(range(3, 40), document="short")
    memory.remove("long")
    before = logits(model)
    rows = 3 * 2 * 32 * 4 * 4000  # layers, heads, key and value, bytes, rows
    assert memory.compact() > 0.9 * rows
    assert memory.documents == ["short"]
    torch.testing.assert_close(logits(model), before)
    assert memory.compact() == 0


@pytest.mark.parametrize("method", ["refresh", "compact"])
def test_neither_happens_while_the_model_generates(tmp_path, method):
    _, memory = attached(tmp_path / "store", "vector_db")
    with (
        memory.activity.shared("generate"),
        pytest.raises(MemoryUseError, match=f"cannot {method} while the model is generating"),
    ):
        getattr(memory, method)()
