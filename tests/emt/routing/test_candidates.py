"""Candidates of all voices, and of all of them together."""

import pytest

from emt.routing.candidates import CandidateSearch
from emt.routing.fusion import fused_scores
from emt.routing.values import ValueIndex
from emt.routing.words import WordIndex
from tests.emt.routing.worlds import attached_model, build, document, heads_of, routing
from tests.emt.words import word_tokenizer

OPTIONS = {"min_distance": 16}


@pytest.fixture(scope="module")
def memory():
    return routing(build("llama"), tokenizer=word_tokenizer())


def test_candidates_are_those_of_each_voice_and_of_their_sum(memory):
    question, backend = document(1)[20:30], memory.backend
    search = CandidateSearch(attached_model(memory), memory.tokenizer)
    candidates = search.candidates(question, backend, 5, **OPTIONS)
    text = " ".join(f"w{number}" for number in question.tolist())
    words = WordIndex(memory.tokenizer).scores(text, backend)
    values = ValueIndex(attached_model(memory)).scores(question, backend)
    assert list(candidates.of_voices) == ["words", "values"]
    for name, (runs, scores) in (("words", words), ("values", values)):
        assert candidates.of_voices[name] == runs.windows(scores, 5, **OPTIONS)
    runs, scores = fused_scores([words, values])
    assert candidates.fused == runs.windows(scores, 5, **OPTIONS)
    assert candidates.fused[0].document == backend.catalog.document("two").first_row


def test_heads_are_a_third_voice_and_words_need_a_tokenizer(memory):
    question = document(2)[20:30]
    search = CandidateSearch(attached_model(memory), None)
    hits = heads_of(memory).hits(question, range(len(question)), memory.backend)
    scope = memory.backend.catalog.scope(["three"])
    candidates = search.candidates(question, memory.backend, 5, hits=hits, scope=scope, **OPTIONS)
    assert list(candidates.of_voices) == ["values", "heads"]
    first_row = memory.backend.catalog.document("three").first_row
    assert {window.document for window in candidates.fused} == {first_row}


def test_what_is_usual_is_that_of_the_scope():
    memory = routing(build("llama"), tokenizer=word_tokenizer())
    question = document(1)[20:30]
    for number in range(40):  # all of them better than the document in the scope
        memory.write(question, document=f"better {number}")
    scope = memory.backend.catalog.scope(["two"])
    search = CandidateSearch(attached_model(memory), memory.tokenizer)
    candidates = search.candidates(question, memory.backend, 5, scope=scope, **OPTIONS)
    assert candidates.fused[0].document == memory.backend.catalog.document("two").first_row
