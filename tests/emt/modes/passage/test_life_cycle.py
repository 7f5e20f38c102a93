"""A memory whose store cannot be written, whose model is gone, or that was closed."""

import gc
import logging
import weakref

import torch
import pytest

from emt import MemoryConfig, Passage, attach
from emt.errors import ConfigError, MemoryUseError, StoreError
from emt.memory.head_profiles import HeadProfiles
from memory_backends import MemoryBackend, verify
from tests.emt.routing.worlds import (
    BACKENDS,
    NAMES,
    asked,
    chosen,
    document,
    heads_of,
    profile_of,
    routing,
)
from tests.emt.words import word_tokenizer
from tests.families import build, let_go_of_models
from tests.read_only import forbid_writing

KINDS = pytest.mark.parametrize("memory_type", BACKENDS)


@pytest.fixture
def world(tmp_path, memory_type):
    """A model and its memory, in a store without an index of the profile's heads."""
    model = build("llama")
    path = str(tmp_path / "store")
    memory = routing(model, memory_type, tokenizer=word_tokenizer(), path=path)
    memory.backend.index_heads(None)
    memory.backend.save()
    return model, memory


# -- a store that cannot be written -----------------------------------------------------------


@KINDS
def test_what_has_not_changed_is_saved_without_permission(world, tmp_path, monkeypatch):
    _, memory = world
    with monkeypatch.context() as patch:
        forbid_writing(patch, tmp_path / "store")
        memory.save()
        memory.save(tmp_path / "store")
        with pytest.raises(StoreError, match="Permission denied"):
            memory.write(document(3), document="four")


@KINDS
def test_a_copy_of_a_store_that_cannot_be_written(world, tmp_path, monkeypatch):
    _, memory = world
    with monkeypatch.context() as patch:
        forbid_writing(patch, tmp_path / "store")
        memory.save(tmp_path / "copy")
    assert verify(tmp_path / "copy") == []
    found = memory.route(asked(1)).passages
    memory.open(tmp_path / "copy")
    assert memory.documents == list(NAMES)
    assert memory.route(asked(1)).passages == found


def test_no_profile_is_made_that_cannot_be_kept(tmp_path, monkeypatch):
    settings = {"mode": "passage", "path": str(tmp_path / "store")}
    memory = attach(build("llama"), MemoryConfig.published(**settings), tokenizer=word_tokenizer())
    memory.write(document(0), document="one")
    made = []

    def rank(*_, **__):
        made.append(1)
        raise ConfigError("too few questions")

    monkeypatch.setattr(HeadProfiles, "rank", rank)
    with monkeypatch.context() as patch:
        forbid_writing(patch, tmp_path / "store")
        memory.save()
    assert made == []
    memory.save()
    assert made == [1]


# -- what takes long is said ------------------------------------------------------------------


@pytest.mark.parametrize(("index", "takes_long"), [("IVF4,Flat", True), ("Flat", False)])
def test_the_log_says_that_heads_of_another_profile_have_no_files(
    tmp_path, caplog, monkeypatch, index, takes_long
):
    model = build("llama")
    path = tmp_path / "store"
    memory = routing(model, "vector_db", path=str(path), index=index, heads=((0, 1),))
    memory.save()
    memory.open(path)
    memory.keep_profile(profile_of(build("llama"), ((0, 1), (2, 3))))
    assert not caplog.records
    with monkeypatch.context() as patch:
        forbid_writing(patch, path)
        memory.open(path)
        found = memory.route(asked(1)).passages
        assert {one.passage.document for one in found} <= set(NAMES)
        assert found
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * takes_long
    if takes_long:
        said = caplog.records[0].getMessage()
        assert "no FAISS files of some heads" in said
        assert "for 237 rows. save() writes the files" in said
    caplog.clear()
    memory.save()
    memory.open(path)
    assert memory.route(asked(1)).passages == found
    assert not caplog.records


# -- a model that is gone ---------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("model_type", ["llama", "gptj", "mpt"])
def test_a_deleted_model_is_collected_while_its_memory_is_kept(model_type, memory_type, tmp_path):
    model = build(model_type)
    path = str(tmp_path / "store")
    memory = routing(model, memory_type, tokenizer=word_tokenizer(), path=path)
    memory.save()
    assert memory.route(asked(1)).score > 0
    used = chosen(model, [asked(1)])
    with memory.recalling([Passage("one", 0, 8)]):
        assert chosen(model, [asked(1)]) != used
    angles, heads = memory._attached("test").angles, heads_of(memory)
    decoder = weakref.ref(model.base_model)
    del model
    let_go_of_models()
    gc.collect()
    assert decoder() is None
    gone = "cannot {}: the model is gone. Keep a reference to it."
    with pytest.raises(MemoryUseError, match=gone.format("route")):
        memory.route(asked(1))
    with pytest.raises(MemoryUseError, match=gone.format("route")):
        heads.hits(asked(1), [0], memory.backend)
    refused = pytest.raises(MemoryUseError, match=gone.format("recall"))
    with refused, memory.recalling([Passage("one", 0, 8)]):
        pass
    if model_type != "mpt":  # nothing is rotated
        with pytest.raises(MemoryUseError, match=gone.format("recall")):
            angles.at(torch.zeros(1, 1, dtype=torch.long))
    with pytest.raises(MemoryUseError, match=gone.format("write")):
        memory.write(document(3), document="four")
    memory.remove("one")
    memory.save()
    memory.save(tmp_path / "copy")
    assert MemoryBackend.open(tmp_path / "copy").catalog.document_names() == ["two", "three"]


# -- a memory that was closed -----------------------------------------------------------------

AFTER_CLOSE = {
    "save": lambda memory, other: memory.save(),
    "save a copy": lambda memory, other: memory.save(other),
    "write": lambda memory, other: memory.write(document(3), document="four"),
    "write all": lambda memory, other: memory.write_all([("four", document(3))]),
    "remove": lambda memory, other: memory.remove("one"),
    "clear": lambda memory, other: memory.clear(),
    "refresh": lambda memory, other: memory.refresh(),
    "compact": lambda memory, other: memory.compact(),
    "list documents": lambda memory, other: memory.documents,
    "route": lambda memory, other: memory.route(asked(1)),
    "recall": lambda memory, other: memory.recalling([Passage("one", 0, 8)]).__enter__(),
    "choose documents": lambda memory, other: memory.using(where={"a": 1}).__enter__(),
    "look for a head profile": lambda memory, other: memory.profile,
    "look for": lambda memory, other: memory.lacks_profile,
    "make a head profile": lambda memory, other: memory.make_profile(),
    "keep a head profile": lambda memory, other: memory.keep_profile(None),
}


@KINDS
@torch.no_grad()
def test_a_closed_memory_says_so_until_it_is_opened(memory_type, tmp_path):
    model = build("llama")
    path = tmp_path / "store"
    memory = routing(model, memory_type, tokenizer=word_tokenizer(), path=str(path))
    memory.save()
    expected, found = memory.route(asked(1)), model(asked(1)[None]).logits
    memory.close()
    plain = model(asked(1)[None]).logits
    for what, call in AFTER_CLOSE.items():
        what = what.removesuffix(" all").removesuffix(" a copy")
        with pytest.raises(MemoryUseError, match=f"cannot {what}.*: the memory was closed. Call"):
            call(memory, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    memory.close()
    with memory.using(enabled=False, topk=3):
        assert torch.equal(model(asked(1)[None]).logits, plain)
    with pytest.raises(StoreError, match="expected a memory store"):
        memory.open(tmp_path / "none")
    memory.open(path)
    assert memory.documents == list(NAMES)
    assert memory.route(asked(1)) == expected
    assert torch.equal(model(asked(1)[None]).logits, found)


def test_a_closed_memory_without_a_path_says_that_it_was_closed():
    memory = attach(build("llama"))
    memory.write(document(0), document="one")
    memory.close()
    with pytest.raises(MemoryUseError, match="cannot save: the memory was closed"):
        memory.save()
