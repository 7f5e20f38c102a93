import pytest
from experiments.retrieval.scoring import candidates_of, is_right, scores

from tests.experiments.fakes import item


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("It was LEEDS.", "Leeds", True),
        ("it was leeds", "LEEDS", True),
        ("“Leeds”, they say", "Leeds", True),
        ("Le eds", "Leeds", False),
        ("", "Leeds", False),
        ("The year 1,066.", "1066", False),  # as published: no normalisation
        ("The year 1066.", "1066", True),
        ("in 10661", "1066", True),
        ("Pieter\nHoekstra", "Pieter Hoekstra", False),
        ("Straße", "STRASSE", False),
    ],
)
def test_the_published_score(text, answer, right):
    assert is_right(text, answer) is right


def test_an_answer_split_over_tokens_counts_once_the_text_is_whole():
    pieces = ["It", " was", " Le", "e", "ds", "."]
    assert not any(is_right(piece, "Leeds") for piece in pieces)
    assert is_right("".join(pieces), "Leeds")


def test_the_original_answer_beside_the_right_one_is_told_apart():
    found = scores(item(), "Not York but Leeds", (-1.0, -2.0))
    assert found == {
        "right": True,
        "original": True,
        "log_prob": -1.0,
        "original_log_prob": -2.0,
        "preferred": True,
    }
    assert scores(item(), "York", (-2.0, -1.0))["preferred"] is False
    assert scores(item(), "York", (-2.0, -2.0))["preferred"] is False
    assert scores(item(), "York", (-2.0, -1.0))["right"] is False


def test_what_is_not_known_is_none():
    text_only = scores(item(), "leeds", None)
    assert text_only["right"] is True
    assert text_only["original"] is False
    assert [text_only[name] for name in ("log_prob", "original_log_prob", "preferred")] == [
        None
    ] * 3
    lone = item(original_answer=None)
    assert candidates_of(item()) == ["Leeds", "York"]
    assert candidates_of(lone) == ["Leeds"]
    found = scores(lone, "leeds", (-1.0,))
    assert found["log_prob"] == -1.0
    assert (found["original"], found["original_log_prob"], found["preferred"]) == (None,) * 3
