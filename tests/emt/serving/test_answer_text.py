"""Pieces of an answer's text: together they are the content, whatever the tokens are."""

import pytest

from emt.serving.answer_text import AnswerText
from tests.emt.bytes import byte_tokenizer
from tests.emt.words import word_tokenizer


def of_bytes(text, stop=(), *, strip=False):
    """Return the pieces of a text whose tokens are bytes, and what they leave behind."""
    tokenizer = byte_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    answer = AnswerText(tokenizer, tokenizer.bos_token_id, stop, strip=strip)
    pieces = []
    for token_id in ids:
        pieces.append(answer.add(token_id))
        if answer.is_stopped:
            break
    pieces.append(answer.end())
    return pieces, answer


@pytest.mark.parametrize(
    "text", ["", "a", "abc", "h\u00e9llo", "\u6587\u5b57", "a \U0001f600 b", " x  y ", "\n\n"]
)
@pytest.mark.parametrize("strip", [False, True])
def test_pieces_are_the_text_in_whole_characters(text, strip):
    pieces, answer = of_bytes(text, strip=strip)
    expected = text.strip() if strip else text
    assert "".join(pieces) == answer.content == "".join(answer.token_texts) == expected
    assert len(answer.token_texts) == len(text.encode())
    assert not any("\ufffd" in piece for piece in pieces)


def test_unfinished_characters_come_at_the_end():
    tokenizer = byte_tokenizer()
    ids = tokenizer("a\u6587", add_special_tokens=False)["input_ids"][:-1]
    answer = AnswerText(tokenizer, 1, strip=False)
    assert [answer.add(token_id) for token_id in ids] == ["a", "", ""]
    assert answer.end().startswith("\ufffd")
    assert "".join(answer.token_texts) == answer.content


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one STOP two", ["STOP"], "one "),
        ("one ST two", ["STOP"], "one ST two"),
        ("one STOSTOP two", ["STOP"], "one STO"),
        ("one STO", ["STOP"], "one STO"),
        ("STOP", ["STOP"], ""),
        ("abcd", ["d", "bc"], "a"),
        ("aab", ["ab", "aab"], ""),
        ("x\u6587y", ["\u6587"], "x"),
        ("line\n\nnext", ["\n\n"], "line"),
        ("aaaa", ["aab"], "aaaa"),
    ],
)
def test_nothing_of_a_stop_string_is_sent(text, stop, expected):
    pieces, answer = of_bytes(text, stop)
    assert "".join(pieces) == answer.content == "".join(answer.token_texts) == expected
    assert answer.is_stopped == any(each in text for each in stop)
    sent = ""
    for piece in pieces:  # also not for a while
        sent += piece
        assert expected.startswith(sent)


def test_a_stop_string_is_found_in_the_text_before_it_is_stripped():
    pieces, answer = of_bytes("\n\nhello", ["\n\n"], strip=True)
    assert answer.is_stopped
    assert "".join(pieces) == ""


def test_spaces_wait_for_the_next_word_where_they_may_be_the_last():
    pieces, _ = of_bytes(" a  b ", strip=True)
    assert pieces == ["", "a", "", "", "  b", "", ""]


def test_words_have_the_space_before_them():
    tokenizer = word_tokenizer()
    answer = AnswerText(tokenizer, 7, strip=False)
    assert [answer.add(token_id) for token_id in (9, 10)] == [" w9", " w10"]
    stripped = AnswerText(tokenizer, 7, strip=True)
    assert [stripped.add(token_id) for token_id in (9, 10, 2)] == ["w9", " w10", ""]
    assert stripped.token_texts == ["w9", " w10", ""]  # the last is special
