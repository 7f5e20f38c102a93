import pytest
from experiments.prompts import Templates, closed_book, with_chunks, with_document

from emt.errors import ConfigError
from tests.experiments.fakes import Parrot, tiny

TEMPLATES = Templates(question="Q: {question}", document="{document} Q: {question}")
TEXT, QUESTION = "one two Leeds four five six", "Where to?"


def test_a_question_alone():
    asked = closed_book(QUESTION, TEMPLATES)
    assert (asked.message, asked.text, asked.truncated) == ("Q: Where to?", None, False)


def test_a_document_that_fits_is_whole():
    asked = with_document(TEXT, QUESTION, Parrot(room=11), TEMPLATES)
    assert asked.message == "one two Leeds four five six Q: Where to?"
    assert (asked.text, asked.truncated) == (TEXT, False)
    assert with_document(TEXT, QUESTION, Parrot(room=None), TEMPLATES) == asked


@pytest.mark.parametrize(
    ("room", "document"),
    [(10, "one two Leeds four five"), (8, "one two Leeds"), (7, "one two")],
)
def test_a_long_document_loses_its_end_wherever_the_answer_is(room, document):
    asked = with_document(TEXT, QUESTION, Parrot(room=room), TEMPLATES)
    assert asked.message.split(" Q:")[0].strip() == asked.text.strip() == document
    assert asked.message.endswith("Q: Where to?")
    assert asked.truncated


def test_a_truncated_prompt_of_a_real_tokenizer_fills_the_room():
    responder = tiny(max_new_tokens=10, window=60)
    asked = with_document("é" * 100 + " Leeds", QUESTION, responder, TEMPLATES)
    assert asked.truncated
    assert responder.room - 1 <= responder.count(asked.message) <= responder.room


def test_chunks_stand_with_the_best_last():
    asked = with_chunks([" best ", "second", "third"], QUESTION, Parrot(), TEMPLATES)
    assert asked.message == "third\n\nsecond\n\nbest Q: Where to?"
    assert (asked.text, asked.truncated) == ("third\n\nsecond\n\nbest", False)


def test_the_worst_chunks_are_dropped_first():
    asked = with_chunks(["best", "second", "third"], QUESTION, Parrot(room=7), TEMPLATES)
    assert asked.message == "second\n\nbest Q: Where to?"
    assert asked.truncated


def test_a_question_that_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match=r"question 'Where to\?' does not fit the 4 tokens"):
        with_document(TEXT, QUESTION, Parrot(room=4), TEMPLATES)
    with pytest.raises(ConfigError, match=r"question 'Where to\?' does not fit the 4 tokens"):
        with_chunks(["best"], QUESTION, Parrot(room=4), TEMPLATES)


def test_braces_in_a_document_or_question_mean_nothing():
    asked = with_document("{question} {document}", "{document}?", Parrot(), TEMPLATES)
    assert asked.message == "{question} {document} Q: {document}?"


@pytest.mark.parametrize(
    "wrong", [{"question": "Q"}, {"document": "{question}"}, {"document": "{document}"}]
)
def test_a_template_without_a_place_is_refused(wrong):
    with pytest.raises(ConfigError, match=r"with \{(question|document)\} in it"):
        Templates(**wrong)
