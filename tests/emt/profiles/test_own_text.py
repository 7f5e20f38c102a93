"""Head profiles made of a memory's own text, when it is saved or on request."""

import logging

import pytest

from emt import MemoryConfig, attach, detach
from emt.errors import ConfigError, MemoryUseError
from emt.profiles.stored_text import stored_texts
from emt.routing.head_profile import HeadProfile
from tests.emt.bytes import BYTES_VOCAB_SIZE, byte_tokenizer
from tests.families import build

PEOPLE = ["Anselm", "Beatrix", "Caspar", "Dorothea", "Emmerich", "Friederike"]
TEXTS = {
    f"{number}.txt": "\n".join(
        f"The {thing} near the old river {verb} by {person}{number} before the long winter."
        for person, thing, verb in zip(
            PEOPLE,
            ["bridge", "castle", "garden", "chapel", "tavern", "harbour"],
            ["was measured", "was painted", "got restored", "was visited", "got sold", "was drawn"],
            strict=True,
        )
    )
    for number in (11, 12, 13)
}


def reading_passages(path):
    model = build("llama", vocab_size=BYTES_VOCAB_SIZE)
    config = MemoryConfig.published(mode="passage", path=str(path))
    return model, attach(model, config, tokenizer=byte_tokenizer())


@pytest.fixture
def lacking(tmp_path):
    """A model, and its memory that lacks a head profile."""
    model, memory = reading_passages(tmp_path / "store")
    for name, text in sorted(TEXTS.items()):
        memory.write(text, document=name)
    return model, memory


@pytest.mark.parametrize("end", [". ", "\u3002", "\u0964 "])
def test_pieces_of_stored_text_end_where_sentences_do(end):
    model = build("llama", vocab_size=BYTES_VOCAB_SIZE)
    memory = attach(model, tokenizer=byte_tokenizer())
    long = "".join(f"Sentence {number} of a long text{end}" for number in range(400))
    memory.write(long[:9000], document="long")
    memory.write("A short one.", document="short")
    memory.write([70, 71, 72], document="ids")
    pieces = list(stored_texts(memory.backend, memory.tokenizer))
    of_long = sorted(piece for piece in pieces if piece.startswith("Sentence"))
    assert "".join(sorted(of_long, key=long.index)) == long[:9000]
    assert len(of_long) == 2
    assert max(map(len, of_long)) <= 6000
    assert sum(piece.endswith(f"text{end}") for piece in of_long) == 1
    assert sorted(set(pieces) - set(of_long)) == ["A short one.", "def"]
    one = list(stored_texts(memory.backend, None, num_texts=2, seed=1))
    assert len(one) <= 2
    assert "def" not in one


def test_saving_gives_a_memory_the_profile_that_it_lacks(lacking):
    _, memory = lacking
    assert memory.lacks_profile
    memory.save()  # as `write_all` does
    kept = memory.profile
    assert (kept.model, kept.source) == ("llama", "texts of emt")
    expected = memory.rank_heads(name="llama").profile
    assert [(head.layer, head.head) for head in kept.heads] == [
        (head.layer, head.head) for head in expected.heads
    ]
    stored = memory.backend.catalog.setting("head_profile")
    assert HeadProfile.from_json(stored).to_json() == kept.to_json()
    memory.save()
    assert memory.profile is kept  # it is made once


def test_the_log_says_once_that_a_profile_is_made(lacking, caplog):
    _, memory = lacking
    caplog.set_level(logging.WARNING, "emt")
    memory.save()
    (record,) = caplog.records
    said = record.getMessage()
    assert record.levelno == logging.WARNING
    assert "no head profile: one is made, and kept for all its memories" in said
    assert "beforehand with `emt profile`, or set mode to token" in said
    memory.save()
    assert len(caplog.records) == 1


def test_no_profile_is_made_while_the_model_generates(lacking):
    _, memory = lacking
    refused = pytest.raises(MemoryUseError, match="cannot save while the model is generating")
    with memory.activity.shared("generate"), refused:
        memory.save()
    assert memory.lacks_profile


def test_a_memory_whose_model_cannot_be_asked_is_saved_without_a_profile(lacking, monkeypatch):
    model, memory = lacking
    model.train()
    memory.save()
    assert memory.lacks_profile
    model.eval()
    with monkeypatch.context() as patched:
        patched.setattr(type(memory.tokenizer), "is_fast", False)
        memory.save()
        assert memory.lacks_profile
        with pytest.raises(ConfigError, match="needs a fast tokenizer"):
            memory.make_profile()
    detach(model)
    memory.save()
    assert memory.backend.catalog.setting("head_profile") is None
