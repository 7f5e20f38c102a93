"""The texts and questions that come with emt, by which the heads of any model can be ranked."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources

from emt.profiles.examples import Example

_BETWEEN = "\n\n"
_PASSAGES_PER_TEXT = 6


@dataclass(frozen=True)
class _Passage:
    """A passage, and questions about it with their answers."""

    text: str
    questions: dict[str, str]


def built_in_examples(num_tokens: Callable[[str, list[str]], int], budget: int) -> list[Example]:
    """Return questions about short passages.

    Six passages make a text, since passages of a memory have others around them, too.

    Args:
        num_tokens: tells how many tokens a text and some questions have.
        budget: tokens; passages that no longer fit are left out, the last first.
    """
    passages: list[_Passage] = []
    for passage in _passages():
        budget -= num_tokens(passage.text + _BETWEEN, list(passage.questions))
        if budget < 0:
            break
        passages.append(passage)
    firsts = range(0, len(passages), _PASSAGES_PER_TEXT)
    texts = [passages[first : first + _PASSAGES_PER_TEXT] for first in firsts]
    return [example for of_text in texts for example in _examples(of_text)]


def _examples(passages: Sequence[_Passage]) -> Iterator[Example]:
    """Yield the questions about passages that make one text."""
    text, first = _BETWEEN.join(passage.text for passage in passages), 0
    for passage in passages:
        for question, answer in passage.questions.items():
            start = first + passage.text.index(answer)
            yield Example(text, question, start, start + len(answer))
        first += len(passage.text) + len(_BETWEEN)


@functools.cache
def _passages() -> tuple[_Passage, ...]:
    file = resources.files("emt.profiles") / "built_in" / "questions.json"
    return tuple(_Passage(**passage) for passage in json.loads(file.read_text(encoding="utf-8")))
