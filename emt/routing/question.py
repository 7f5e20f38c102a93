"""Find the question in a prompt: the user's last message in a chat, or the end of a plain text."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from emt.passage import Question

_LONGEST = 64  # tokens; of a longer message its last so many ask
_BEGINNINGS = ("Xylophone", "who", "1", " a", "\n", "\n\nA", '"', "\u00e9", "\u6587")  # of messages


def question_of(token_ids: Tensor, tokenizer: PreTrainedTokenizerBase | None) -> Question:
    """Find the question in a prompt: the tokens to search by.

    Args:
        token_ids: (T,) int64, without padding.
        tokenizer: the model's, whose chat template tells messages apart; None for a plain text.

    Returns:
        In a chat, the last 64 tokens of the user's last message, with passages before the message;
        in a plain text its last 64 tokens, with passages before the text.
    """
    ids = token_ids.tolist()
    found = None if tokenizer is None else _message(ids, tokenizer)
    at, stop = found or (0, len(ids))
    return Question(at, max(at, stop - _LONGEST), stop)


def has_message(token_ids: Tensor, tokenizer: PreTrainedTokenizerBase | None) -> bool:
    """Tell whether tokens (T,) have a message of the user, as the chat template marks it."""
    return tokenizer is not None and _message(token_ids.tolist(), tokenizer) is not None


def _message(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> tuple[int, int] | None:
    """Return (first, stop) of the last message between the user's marks in a template."""
    marks = _marks(tokenizer)
    return None if marks is None else _between(ids, marks)


def _between(ids: list[int], marks: _Marks) -> tuple[int, int] | None:
    before, stable, after = marks
    at = _last(ids, before[:stable])
    if at is None:
        return None
    # What follows the stable part may have joined the message's first characters.
    rest = zip(ids[at + stable :], before[stable:], strict=False)
    at += stable + sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], rest))
    stop = next((i for i in range(at, len(ids)) if ids[i : i + len(after)] == after), len(ids))
    return (at, stop) if stop > at else None


def _last(ids: list[int], part: list[int]) -> int | None:
    starts = range(len(ids) - len(part), -1, -1)
    return next((i for i in starts if ids[i : i + len(part)] == part), None)


_Marks = tuple[list[int], int, list[int]]  # before, how many of them are stable, after


def _marks(tokenizer: PreTrainedTokenizerBase) -> _Marks | None:
    if not tokenizer.chat_template:
        return None
    known: dict[Any, Any] = vars(tokenizer).setdefault("_emt_marks", {})
    template = str(tokenizer.chat_template)
    if template not in known:
        known[template] = _marks_of(tokenizer)
    found: _Marks | None = known[template]
    return found


def _marks_of(tokenizer: PreTrainedTokenizerBase) -> _Marks | None:
    """Return the tokens before and after a user's message, as the template shows them.

    Of those before, the first few stay the same whatever the message begins with; others may join
    it, such as a space before a word.
    """
    first, reply, second = "Xylophone.", "Quokka.", "Zeppelin."
    chat = functools.partial(tokenizer.apply_chat_template, tokenize=False)
    try:
        one = str(chat([{"role": "user", "content": first}], add_generation_prompt=True))
        two = str(
            chat(
                [
                    {"role": "user", "content": first},
                    {"role": "assistant", "content": reply},
                    {"role": "user", "content": second},
                ],
                add_generation_prompt=True,
            )
        )
    except Exception:  # a template may raise whatever it likes, for a chat it does not want
        return None
    if first not in one or second not in two or reply not in two:
        return None
    openings = [one.partition(first)[0], two.partition(reply)[2].partition(second)[0]]
    opening = _shared_start([text[::-1] for text in openings])[::-1]
    closing = _shared_start([one.partition(first)[2], two.partition(second)[2]])
    encode = functools.partial(tokenizer.encode, add_special_tokens=False)
    before, after = list(encode(opening)), list(encode(closing))
    stable = min(_same(before, list(encode(opening + text))) for text in _BEGINNINGS)
    # The end of a message may join what follows it: the first special token is enough.
    special = set(tokenizer.all_special_ids)
    after = next(([idx] for idx in after if idx in special), after[:1])
    if not before or not after:
        return None

    def finds(marks: _Marks) -> bool:
        ids = list(encode(two))
        at, stop = _between(ids, marks) or (0, 0)
        found = ids[at:stop]  # of a small vocabulary, words that it does not know
        is_second = found == list(encode(second))
        return is_second or str(tokenizer.decode(found)).strip() == second

    # From the last special token on that the user's header alone has; its stable part may be what
    # all headers begin with.
    starts = [i for i, idx in enumerate(before) if idx in special][::-1] or [0]
    for start in starts:
        for count in (stable - start, len(before) - start):
            # One token that is not special could be any word of a message.
            is_mark = count > 1 or (count == 1 and before[start] in special)
            if is_mark and finds((before[start:], count, after)):
                return before[start:], count, after
    return None


def _same(one: list[int], other: list[int]) -> int:
    """Return how many tokens two lists have in common at their start."""
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _shared_start(texts: list[str]) -> str:
    pairs = itertools.takewhile(lambda chars: len(set(chars)) == 1, zip(*texts, strict=False))
    return "".join(chars[0] for chars in pairs)


def prompt_ids(tokenizer: Any, question: str) -> Tensor:
    """Return the tokens of a question as a user asks it, (T,) int64.

    It is in the chat template if there is one that takes a message of the user alone; else a plain
    text.
    """
    text = _in_template(tokenizer, question)
    if text:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    else:
        ids = tokenizer(question, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)


def _in_template(tokenizer: Any, question: str) -> str:
    if not tokenizer.chat_template:
        return ""
    chat = [{"role": "user", "content": question}]
    try:
        return str(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))
    except Exception:  # a template may raise whatever it likes
        return ""
