import pytest
from experiments.retrieval.prompts import Templates, closed_book, with_chunks, with_document

from emt.errors import ConfigError
from tests.experiments.fakes import Parrot, item, tiny

TEMPLATES = Templates(question="Q: {question}", document="{document} Q: {question}")
ITEM = item(context="one two Leeds four five six", question="Where to?")


def test_a_question_alone():
    asked = closed_book(ITEM, TEMPLATES)
    assert asked.message == "Q: Where to?"
    assert (asked.truncated, asked.has_answer) == (False, None)


def test_a_document_that_fits_is_whole():
    asked = with_document(ITEM, Parrot(room=11), TEMPLATES)
    assert asked.message == "one two Leeds four five six Q: Where to?"
    assert (asked.truncated, asked.has_answer) == (False, True)
    assert with_document(ITEM, Parrot(room=None), TEMPLATES) == asked


@pytest.mark.parametrize(
    ("room", "document", "has_answer"),
    [(10, "one two Leeds four five", True), (8, "one two Leeds", True), (7, "one two", False)],
)
def test_a_long_document_loses_its_end_wherever_the_answer_is(room, document, has_answer):
    asked = with_document(ITEM, Parrot(room=room), TEMPLATES)
    assert asked.message.split(" Q:")[0].strip() == document
    assert asked.message.endswith("Q: Where to?")
    assert (asked.truncated, asked.has_answer) == (True, has_answer)


def test_a_truncated_prompt_of_a_real_tokenizer_fills_the_room():
    responder = tiny(max_new_tokens=10, window=60)
    asked = with_document(item(context="é" * 100 + " Leeds"), responder, TEMPLATES)
    assert asked.truncated
    assert responder.room - 1 <= responder.count(asked.message) <= responder.room


def test_chunks_stand_with_the_best_last():
    asked = with_chunks(ITEM, [" best ", "second", "third Leeds"], Parrot(), TEMPLATES)
    assert asked.message == "third Leeds\n\nsecond\n\nbest Q: Where to?"
    assert (asked.truncated, asked.has_answer) == (False, True)


def test_the_worst_chunks_are_dropped_first():
    chunks = ["best", "second", "third Leeds"]
    asked = with_chunks(ITEM, chunks, Parrot(room=7), TEMPLATES)
    assert asked.message == "second\n\nbest Q: Where to?"
    assert (asked.truncated, asked.has_answer) == (True, False)


def test_a_question_that_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="item 'a' does not fit the 4 tokens"):
        with_document(ITEM, Parrot(room=4), TEMPLATES)
    with pytest.raises(ConfigError, match="item 'a' does not fit the 4 tokens"):
        with_chunks(ITEM, ["best"], Parrot(room=4), TEMPLATES)


def test_braces_in_a_document_or_question_mean_nothing():
    odd = item(context="{question} Leeds {document}", question="{document}?")
    asked = with_document(odd, Parrot(), TEMPLATES)
    assert asked.message == "{question} Leeds {document} Q: {document}?"


@pytest.mark.parametrize(
    "wrong", [{"question": "Q"}, {"document": "{question}"}, {"document": "{document}"}]
)
def test_a_template_without_a_place_is_refused(wrong):
    with pytest.raises(ConfigError, match=r"with \{(question|document)\} in it"):
        Templates(**wrong)
