"""The names that a corpus answers questions with, by type: what may replace an answer."""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from experiments.builder.articles import Article, Question
from experiments.builder.folded import fold
from experiments.builder.kinds import kind_of

_LEADING = re.compile(
    r"(?:a|an|the|in|on|at|by|from|to|of|until|since|during|throughout|about|around|over|under|"
    r"approximately|nearly|almost|more than|less than|up to|as of|with|for)\s+",
    re.IGNORECASE,
)
_WIDER = {"place": ("place", "city")}  # types that may stand in for a type


@dataclass(frozen=True)
class Answer:
    """An answer as the article words it, without what leads up to it.

    Attributes:
        text: "1580s" for "Throughout the 1580s".
        start: its first character in the article.
    """

    text: str
    start: int

    @property
    def stop(self) -> int:
        """After its last character."""
        return self.start + len(self.text)


def answers_of(question: Question) -> list[Answer]:
    """Return its answers, the one that most annotators gave first; of equals, the shortest."""
    bare = [_bare(text, start) for text, start in question.answers]
    votes = Counter(fold(answer.text) for answer in bare)
    return sorted(bare, key=lambda a: (-votes[fold(a.text)], len(a.text), a.start))


class NamePool:
    """The names among the answers of some articles.

    A name to which questions give two types is of neither: one of them is a mistake, or the name is
    of two things.
    """

    def __init__(self, articles: Iterable[Article]) -> None:
        types: dict[str, set[str]] = defaultdict(set)
        self._with_the: dict[str, bool] = {}
        for article in articles:
            for question in article.questions:
                for answer in answers_of(question)[:1]:
                    kind = kind_of(question.text, answer.text)
                    if kind is not None and kind.kind == "entity":
                        types[answer.text].add(kind.type)
                        self._with_the.setdefault(answer.text, has_the(article.text, answer.start))
        self._types = {name: type for name, given in types.items() if (type := _agreed(given))}
        self._names: dict[str, list[str]] = defaultdict(list)
        for name, type in sorted(self._types.items()):
            self._names[type].append(name)

    def type_of(self, name: str) -> str | None:
        """Return the type of a name; None if it has none that its questions agree on."""
        return self._types.get(name)

    def others(self, name: str, with_the: bool, draw: random.Random) -> Iterator[str]:
        """Yield names that may take a name's place, in random order.

        They are of its type, have "the" before them as it has, are plural if it is, and have about
        as many words; none shares a word with it but what names its type.
        """
        type = self._types[name]
        others = [other for wider in _WIDER.get(type, (type,)) for other in self._names[wider]]
        draw.shuffle(others)
        shared = set(type.split())
        words = set(fold(name).split()) - shared
        for other in others:
            if (
                self._with_the[other] == with_the
                and other.endswith("s") == name.endswith("s")
                and abs(len(other.split()) - len(name.split())) <= 1
                and not words & (set(fold(other).split()) - shared)
            ):
                yield other


def _agreed(types: set[str]) -> str | None:
    """Return the one type; "place", which "where" asks for, gives way to any other."""
    specific = types - {"place"} or types
    return next(iter(specific)) if len(specific) == 1 else None


def has_the(text: str, start: int) -> bool:
    """Tell whether "the" stands before a character."""
    return text[max(0, start - 4) : start].lower().strip(" ") == "the"


def _bare(text: str, start: int) -> Answer:
    while match := _LEADING.match(text):
        text, start = text[match.end() :], start + match.end()
    kept = text.lstrip(" \"'\u201c\u2018(")
    start += len(text) - len(kept)
    return Answer(kept.rstrip(" .,;:\"'\u201d\u2019)?"), start)
