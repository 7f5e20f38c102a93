"""Long articles cut to a length in tokens, around an answer that may stand at any depth."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import NamedTuple

CountTokens = Callable[[str], int]

_SENTENCE_END = re.compile(r"(?<=[.!?\u201d\"])\s+(?=[A-Z0-9\"\u201c(])|\n+")


class Cut(NamedTuple):
    """A context.

    Attributes:
        context: the title, a blank line, and whole sentences of the article.
        answer_start: of the answer in it.
        n_tokens: of the context.
        construction: "full" for the whole article, "truncated" for a part of it.
        start: first character of the part.
        stop: one after its last character.
    """

    context: str
    answer_start: int
    n_tokens: int
    construction: str
    start: int
    stop: int


def cut(
    text: str,
    title: str,
    answer: tuple[int, int],
    limits: tuple[int, int],
    count: CountTokens,
    draw: random.Random,
) -> Cut | None:
    """Cut an article to a split's limits; None if it is too short.

    Args:
        text: the article, which begins with its title.
        title: stays in front of every cut.
        answer: start and stop of the answer in the text.
        limits: lowest and highest number of tokens.
        count: tells how many tokens a text has.
        draw: decides the length, and the place of the answer within it.
    """
    low, high = limits
    whole = count(text)
    if whole < low:
        return None
    if whole <= high:
        return Cut(text, answer[0], whole, "full", 0, len(text))
    head = f"{title}\n\n" if title else ""
    sentences = _sentences(text, len(head))
    sizes = [count(text[start:stop]) for start, stop in sentences]
    first = next(i for i, (_, stop) in enumerate(sentences) if stop > answer[0])
    last = next(i for i, (_, stop) in enumerate(sentences) if stop >= answer[1])
    target = draw.randint((low + high) // 2, high) - (count(head) if head else 0)
    first, last = _grown(sizes, first, last, target, draw.random())
    while True:
        start, stop = sentences[first][0], sentences[last][1]
        body = text[start:stop].rstrip()
        n_tokens = count(head + body)
        if n_tokens <= high:
            break
        # Sentences counted one by one can come to less than their text.
        if sentences[last][0] >= answer[1]:
            last -= 1
        elif sentences[first][1] <= answer[0]:
            first += 1
        else:
            return None
    if n_tokens < low:
        return None
    at = answer[0] - start + len(head)
    return Cut(head + body, at, n_tokens, "truncated", start, start + len(body))


def _grown(sizes: list[int], first: int, last: int, target: int, depth: float) -> tuple[int, int]:
    """Add sentences before, up to `depth` of the target, then after, then before again."""
    room = target - sum(sizes[first : last + 1])
    before = room * depth
    while first and sizes[first - 1] <= before:
        first -= 1
        before -= sizes[first]
        room -= sizes[first]
    while last + 1 < len(sizes) and sizes[last + 1] <= room:
        last += 1
        room -= sizes[last]
    while first and sizes[first - 1] <= room:
        first -= 1
        room -= sizes[first]
    return first, last


def _sentences(text: str, start: int) -> list[tuple[int, int]]:
    """Return start and stop of each sentence, with the space after it."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text) if match.end() > start]
    starts = [start, *ends]
    return [pair for pair in zip(starts, [*ends, len(text)], strict=True) if pair[0] < pair[1]]
