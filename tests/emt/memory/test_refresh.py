"""`Memory.refresh` and `Memory.compact`: what other processes wrote, and space given back."""

import contextlib
import shutil
import threading

import torch
import pytest

from emt import MemoryConfig, attach, detach
from emt.errors import MemoryMismatchError, MemoryUseError, StoreError
from tests.families import build

PROMPT = torch.tensor([[5, 9, 33, 60, 41, 18]])


@torch.no_grad()
def logits(model):
    return model(PROMPT).logits


def attached(path, memory_type):
    model = build("llama")
    return model, attach(
        model,
        MemoryConfig.published(
            memory_type=memory_type, path=None if path is None else str(path), mode="token"
        ),
    )


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


def replaced(path, document, tokens):
    """Remove a store, and put another one in its place."""
    model, memory = attached(path.with_name("fresh"), "vector_db")
    memory.write(tokens, document=document)
    memory.save()
    detach(model)
    memory.close()
    shutil.rmtree(path)
    path.with_name("fresh").rename(path)


@pytest.mark.parametrize("memory_type", ["manual", "vector_db"])
def test_refresh_opens_a_store_that_has_taken_the_place_of_another(tmp_path, memory_type):
    path = tmp_path / "store"
    _, writer = attached(path, "vector_db")
    writer.write(range(3, 40), document="old")
    writer.save()
    model, memory = attached(path, memory_type)
    before = logits(model)
    replaced(path, "new", range(50, 90))
    with pytest.raises(StoreError, match="replaced by another one"):
        memory.write(range(3, 9), document="more")
    with memory.using(documents=["old"]):
        assert torch.equal(logits(model), before)
        memory.refresh()
        assert memory.documents == ["new"]
        plain = logits(model)
    other, expected = attached(path, memory_type)
    torch.testing.assert_close(logits(model), logits(other))
    with expected.using(enabled=False):  # "old" has no rows any more
        assert torch.equal(plain, logits(other))
    memory.write(range(3, 9), document="more")
    expected.refresh()
    assert expected.documents == memory.documents == ["new", "more"]


def test_refresh_keeps_the_rows_of_a_store_that_was_removed(tmp_path):
    model, memory = attached(tmp_path / "store", "vector_db")
    memory.write(range(3, 40), document="old")
    before = logits(model)
    shutil.rmtree(tmp_path / "store")
    with pytest.raises(StoreError, match="was removed"):
        memory.refresh()
    with pytest.raises(StoreError, match="was removed"):
        memory.write(range(3, 9), document="more")
    assert not (tmp_path / "store").exists()
    assert torch.equal(logits(model), before)
    memory.save(tmp_path / "copy")
    memory.open(tmp_path / "copy")
    torch.testing.assert_close(logits(model), before)


def test_refresh_leaves_a_store_of_another_model_alone(tmp_path):
    path = tmp_path / "store"
    model, memory = attached(path, "manual")
    memory.write(range(3, 40), document="old")
    before = logits(model)
    shutil.rmtree(path)
    other = build("gpt2")
    attach(other, MemoryConfig.published(path=str(path))).write(range(3, 40), document="gpt2")
    for _ in range(2):
        with pytest.raises(MemoryMismatchError, match="another model"):
            memory.refresh()
    assert torch.equal(logits(model), before)


def test_a_forward_goes_on_with_the_rows_that_it_began_with(tmp_path):
    path = tmp_path / "store"
    model, memory = attached(path, "manual")
    memory.write(range(3, 40), document="old")
    before = logits(model)

    def refresh(*_):
        hook.remove()
        replaced(path, "new", range(50, 90))
        thread = threading.Thread(target=memory.refresh)
        thread.start()
        thread.join()

    hook = model.model.layers[1].register_forward_pre_hook(refresh)
    assert torch.equal(logits(model), before)
    assert memory.documents == ["new"]
    assert not torch.equal(logits(model), before)


@pytest.mark.parametrize("memory_type", ["manual", "vector_db"])
@pytest.mark.parametrize("has_path", [True, False])
def test_a_second_backend_writes_while_the_first_is_read(tmp_path, memory_type, has_path):
    _, memory = attached(tmp_path / "store" if has_path else None, memory_type)
    if memory.backend.path is None:
        with pytest.raises(StoreError, match="in RAM has one backend"):
            memory.second_backend()
        return
    _, alone = attached(None, "manual")
    encoder = alone.encoder
    for ids, name in ((range(3, 40), "first"), (range(40, 90), "second")):  # the first makes it
        document = encoder.document(ids, name)
        with contextlib.closing(memory.second_backend()) as second:
            second.add(document, encoder.encode(document))
        assert name not in memory.documents
        memory.refresh()
        alone.write(ids, document=name)
        assert memory.documents == alone.documents
    for layer in memory.layers:
        ids = torch.arange(87).expand(memory.backend.layout.layers[layer].num_key_value_heads, -1)
        for got, expected in zip(
            memory.backend.fetch(layer, ids), alone.backend.fetch(layer, ids), strict=True
        ):
            torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-3)
    assert memory.backend.catalog.lengths("second") == (50, None)
