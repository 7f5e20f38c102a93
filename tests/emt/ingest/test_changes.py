"""`Memory.write_all`: what is added, replaced and skipped, and that it is what `write` writes."""

import torch
import pytest

from emt import MemoryConfig, attach
from emt.errors import ConfigError, DocumentError, MemoryUseError, StoreError
from emt.ingest.changes import Written
from tests.emt.ingest.encoding import count_forwards
from tests.emt.words import word_tokenizer
from tests.families import build

SHORT, LONG = "w5 w6 w7", " ".join(f"w{number}" for number in range(3, 60))
TEXTS = [("a", SHORT), ("b", LONG), ("c", "w9"), ("d", "w8 w9"), ("e", LONG), ("f", SHORT)]


@pytest.fixture
def forwards(monkeypatch):
    return count_forwards(monkeypatch)


def remembering(tmp_path=None, **settings):
    model = build("llama")
    path = None if tmp_path is None else tmp_path / "store"
    config = MemoryConfig.published(stride=8, max_length=24, path=path, **settings)
    return model, attach(model, config, tokenizer=word_tokenizer())


def contents(memory):
    """Return each document's text, tokens, and rows of every layer."""
    result = {}
    for name in memory.documents:
        stored = memory.backend.catalog.document(name)
        ids = stored.first_row + torch.arange(len(stored.row_tokens))
        rows = [
            torch.cat(memory.backend.fetch(idx, torch.stack([ids] * 2)), dim=-1)
            for idx in memory.backend.layout.layers
        ]
        result[name] = (stored.text, stored.row_tokens.tolist(), stored.sink_rows.tolist(), rows)
    return result


@pytest.mark.parametrize("memory_type", ["manual", "vector_db"])
@pytest.mark.parametrize("carry_context", [False, True])
def test_many_documents_are_as_if_written_one_by_one(tmp_path, memory_type, carry_context):
    _model, memory = remembering(tmp_path, memory_type=memory_type, carry_context=carry_context)
    assert memory.write_all(iter(TEXTS)) == Written(added=6, replaced=0, skipped=0)
    _other, one_by_one = remembering(carry_context=carry_context)
    for name, text in TEXTS:
        one_by_one.write(text, document=name)
    written, expected = contents(memory), contents(one_by_one)
    assert list(written) == list(expected) == [name for name, _ in TEXTS]
    for name, (*described, rows) in written.items():
        *expected_described, expected_rows = expected[name]
        assert described == expected_described
        torch.testing.assert_close(rows, expected_rows, atol=1e-5, rtol=1e-5)


def test_short_documents_share_a_forward_and_carried_tokens_are_read_once(forwards):
    _model, memory = remembering(carry_context=True)
    memory.write_all(TEXTS)
    tokens = [size[1] for size in memory.backend.catalog.document_sizes()]
    assert tokens == [4, 58, 2, 3, 58, 4]
    long = [24, 8, 8, 8, 8, 2]
    assert forwards == [4, *long, 2 * 3, *long, 4]
    forwards.clear()
    _model, memory = remembering()
    memory.write_all([(name, SHORT) for name in "abcdefgh"])
    assert forwards == [32]


def test_what_is_there_is_skipped_and_what_has_changed_is_replaced(tmp_path, forwards):
    _model, memory = remembering(tmp_path)
    memory.write_all(TEXTS)
    rows = contents(memory)["a"][-1]
    forwards.clear()
    assert memory.write_all(TEXTS) == Written(added=0, replaced=0, skipped=6)
    assert forwards == []
    changed = [("a", SHORT), ("b", "w20 w21"), ("g", "w22"), ("c", "w9")]
    assert memory.write_all(changed) == Written(added=1, replaced=1, skipped=2)
    assert forwards == [2 * 3]
    assert memory.documents == ["a", "c", "d", "e", "f", "b", "g"]
    written = contents(memory)
    assert [written[name][0] for name in ("b", "g")] == ["w20 w21", "w22"]
    for row, before in zip(written["a"][-1], rows, strict=True):
        assert torch.equal(row, before)


def test_token_ids_are_documents_too(tmp_path):
    _model, memory = remembering(tmp_path)
    assert memory.write_all([("ids", [5, 6, 7]), ("text", "w5")]) == Written(2, 0, 0)
    assert memory.write_all([("ids", torch.tensor([5, 6, 7]))]) == Written(0, 0, 1)
    assert memory.write_all([("ids", "w5 w6 w7")]) == Written(0, 1, 0)  # has a text now
    assert memory.backend.catalog.document("ids").text == "w5 w6 w7"


def test_names_come_once_in_a_stream():
    _model, memory = remembering()
    with pytest.raises(DocumentError, match="document 'a' comes twice"):
        memory.write_all([("a", SHORT), ("b", SHORT), ("a", LONG), ("c", SHORT)])
    assert memory.documents == ["a", "b"]


def test_errors_of_the_stream_come_after_what_was_before_them(tmp_path):
    _model, memory = remembering(tmp_path)

    def stream():
        yield from TEXTS[2:4]
        raise StoreError("the disk is gone")

    with pytest.raises(StoreError, match="the disk is gone"):
        memory.write_all(stream())
    assert memory.documents == ["c", "d"]
    with pytest.raises(DocumentError, match="document 'y' has no rows"):
        memory.write_all([("x", SHORT), ("y", [1, 2]), ("z", SHORT)])
    assert memory.documents == ["c", "d", "x"]
    assert memory.write_all(TEXTS) == Written(added=4, replaced=0, skipped=2)


def test_nothing_is_read_by_a_model_that_cannot():
    model, memory = remembering()
    model.train()
    with pytest.raises(MemoryUseError, match="in training mode"):
        memory.write_all(iter(TEXTS))
    _model, memory = remembering(carry_context=True)
    memory.config = memory.config.replace(stride=24)
    for write in (
        lambda: memory.write(SHORT, document="a"),
        lambda: memory.write_all(TEXTS),
    ):
        with pytest.raises(ConfigError, match=r"max_length \(24\) .* stride \(24\)"):
            write()
    assert memory.documents == []
