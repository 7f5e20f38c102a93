"""Text as a search should see it: no case, no accents, one kind of dash, quote and space."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache
from typing import NamedTuple

_SAME = {
    **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212", "-"),
    **dict.fromkeys("\u2018\u2019\u201a\u201b\u02bc\u00b4`", "'"),
    **dict.fromkeys("\u201c\u201d\u201e\u201f\u00ab\u00bb", '"'),
    "\u00ad": "",  # a soft hyphen
}


class Folded(NamedTuple):
    """A text folded, and the way back.

    Attributes:
        text: folded.
        offsets: for each character of `text`, and for its end, its place in the original.
    """

    text: str
    offsets: tuple[int, ...]

    def spans(self, pattern: re.Pattern[str]) -> list[tuple[int, int]]:
        """Return (start, stop) in the original of each match's group 1."""
        return [
            (self.offsets[match.start(1)], self.offsets[match.end(1) - 1] + 1)
            for match in pattern.finditer(self.text)
        ]


@lru_cache(maxsize=256)
def folded(text: str) -> Folded:
    """Fold a text: case, accents, dashes, quotes and white space no longer differ."""
    parts: list[str] = []
    offsets: list[int] = []
    for index, character in enumerate(text):
        part = _fold(character)
        parts.append(part)
        offsets.extend([index] * len(part))
    return Folded("".join(parts), (*offsets, len(text)))


def fold(text: str) -> str:
    """Return a text folded, with single spaces and none around it."""
    return " ".join(folded(text).text.split())


def phrase(text: str) -> str:
    """Return the pattern of a phrase in folded text, as its words with any space between."""
    return r"\s+".join(re.escape(word) for word in fold(text).split())


def stands_in(needle: str, text: str) -> bool:
    """Tell whether a phrase stands in a text as whole words."""
    haystack = folded(text).text
    if not all(word in haystack for word in fold(needle).split()):  # far faster than a search
        return False
    return re.search(rf"(?<!\w){phrase(needle)}(?!\w)", haystack) is not None


@lru_cache(maxsize=4096)
def _fold(character: str) -> str:
    if character in _SAME:
        return _SAME[character]
    if character.isspace():
        return " "
    plain = unicodedata.normalize("NFKD", character)
    return "".join(part for part in plain if not unicodedata.combining(part)).casefold()
