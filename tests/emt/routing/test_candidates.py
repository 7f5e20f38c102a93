"""The rankings of words, values and heads: each as its own index gives it, in the scope."""

import pytest

from emt.routing.candidates import CandidateSearch
from emt.routing.evidence import best_windows
from emt.routing.question import Asking
from emt.routing.values import ValueIndex
from emt.routing.words import WordIndex
from tests.emt.routing.worlds import attached_model, build, document, heads_of, routing
from tests.emt.words import word_tokenizer

VOICES = ("words", "values", "heads")


@pytest.fixture(scope="module")
def memory():
    model = build("llama")
    yield routing(model, tokenizer=word_tokenizer())
    del model  # which the memory does not keep


def rankings_of(memory, question, voices=VOICES, *, tokenizer=True, heads=True, **options):
    """Return the rankings of five windows by all tokens of a question."""
    search = CandidateSearch(
        attached_model(memory),
        memory.tokenizer if tokenizer else None,
        heads_of(memory) if heads else None,
    )
    asking = Asking(question, 0, list(range(len(question))))
    return search.rankings(voices, asking, memory.backend, 5, min_distance=16, **options)


@pytest.mark.parametrize("name", [None, "three"])
def test_each_voice_ranks_its_own_scores(memory, name):
    question, backend = document(1)[20:30], memory.backend
    scope = None if name is None else backend.catalog.scope([name])
    rankings = rankings_of(memory, question, scope=scope)
    text = " ".join(f"w{number}" for number in question.tolist())
    words, of_words = WordIndex(memory.tokenizer).scores(text, backend, scope)
    values, of_values = ValueIndex(attached_model(memory)).scores(question, backend, scope)
    hits = heads_of(memory).hits(question, range(len(question)), backend, scope=scope)
    options = {"min_distance": 16}
    assert rankings == {
        "words": words.windows(of_words, 5, **options),
        "values": values.windows(of_values, 5, **options),
        "heads": best_windows(hits, 5, min_distance=16),
    }
    assert rankings["words" if name is None else "heads"]
    if name is not None:
        first_row = backend.catalog.document(name).first_row
        windows = [window for ranking in rankings.values() for window in ranking]
        assert {window.document for window in windows} == {first_row}


def test_the_settings_choose_voices_and_what_is_lacking_is_left_out(memory):
    question = document(2)[20:30]
    assert list(rankings_of(memory, question, ["values"])) == ["values"]
    assert list(rankings_of(memory, question, ["words", "heads"])) == ["words", "heads"]
    assert list(rankings_of(memory, question, tokenizer=False)) == ["values", "heads"]
    assert list(rankings_of(memory, question, heads=False)) == ["words", "values"]
    assert list(rankings_of(memory, question, tokenizer=False, heads=False)) == ["values"]
