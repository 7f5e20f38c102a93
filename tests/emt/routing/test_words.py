"""Routing by words: the documents that have them, as they are, inside of the scope."""

import torch
import pytest

from emt.errors import ConfigError
from emt.routing import words as words_module
from emt.routing.words import WordIndex
from memory_backends import Scope
from tests.emt.routing.worlds import NAMES, build, document, routing, tokens
from tests.emt.words import word_tokenizer

MODES = pytest.mark.parametrize("mode", ["words", "both"])


def with_words():
    model = build("llama")
    return model, routing(model, tokenizer=word_tokenizer(), relevance=None)


@pytest.fixture(scope="module")
def world():
    """A model, and its memory that no test changes."""
    pytest.importorskip("bm25s")
    return with_words()


def names_of(routed):
    return [part.passage.document for part in routed.passages]


@MODES
def test_words_find_their_document(world, mode):
    _, memory = world
    for number, name in enumerate(NAMES):
        with memory.using(routing=mode, passage_rows=64):  # room for more than one window
            routed = memory.route(document(number)[20:30])
        names = names_of(routed)
        assert name in names if mode == "both" else names[0] == name
        assert (routed.score > 0) == (mode == "both")


@MODES
def test_words_stay_inside_of_the_scope(world, mode):
    _, memory = world
    for number in range(3):
        prompt = document(number)[20:30]
        for name in NAMES:
            with memory.using(routing=mode, documents=[name]):
                assert set(names_of(memory.route(prompt))) <= {name}
        with memory.using(routing=mode, documents=[]):
            assert memory.route(prompt).passages == ()


def test_words_are_those_of_the_memory_as_it_is():
    pytest.importorskip("bm25s")
    _model, memory = with_words()
    prompt = document(0)[20:30]
    with memory.using(routing="words"):
        assert names_of(memory.route(prompt))[0] == "one"
        memory.write(tokens(70, 99), document="one", replace=True)  # as long as before
        memory.write(document(0), document="four")
        assert names_of(memory.route(prompt))[0] == "four"
        memory.remove("four")
        assert "four" not in names_of(memory.route(prompt))


def test_words_that_are_nowhere():
    pytest.importorskip("bm25s")
    _model, memory = with_words()
    memory.clear()
    memory.write(torch.arange(10, 40), document="d")
    index = WordIndex(memory.backend, memory.tokenizer)
    for question in ("w90 w91", "", "the of and", "unheard"):
        assert index.windows(question, 3, min_distance=8) == []
    assert index.windows("w12", 3, min_distance=8)[0].score == 1
    assert index.windows("w12", 3, min_distance=8, scope=Scope(())) == []
    with memory.using(routing="words"):
        assert memory.route(torch.tensor([90, 91])).passages == ()


def test_words_without_their_library(monkeypatch):
    _model, memory = with_words()

    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(words_module.importlib, "import_module", missing)
    with memory.using(routing="words"), pytest.raises(ConfigError, match=r"needs bm25s.*pip"):
        memory.route(tokens(5, 1))
    assert memory.route(tokens(5, 1)).passages
