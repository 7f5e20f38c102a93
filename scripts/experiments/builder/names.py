"""Names that take the place of others: of people, places and everything else with a capital."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from experiments.builder.edits import Edit, Rejected
from experiments.builder.folded import fold, folded, phrase
from experiments.builder.vocabulary import WORDS

_SUFFIX = r"(?:'s|s'|es|s|')?"


@dataclass(frozen=True)
class NameChange:
    """A name that becomes another, with its possessives and plurals.

    Attributes:
        old: as it stands in the article.
        new: of the same type.
        is_person: then the bare surname becomes the new surname, and given names that are shortened
            or initials belong to the name.
    """

    old: str
    new: str
    is_person: bool = False

    def edits(self, text: str) -> list[Edit]:
        """Return every occurrence: any case, with or without accents, possessive or plural.

        Raises:
            Rejected: an occurrence is part of a longer name, somebody else's surname, or an
                ordinary word that only looks like the name.
        """
        edits: list[Edit] = []
        if fold(self.old.split()[-1]) not in folded(text).text:  # far faster than a search
            return edits
        for start, stop in folded(text).spans(_pattern(self.old, self.is_person)):
            shown = text[start:stop]
            is_surname = self.is_person and " " in self.old and len(shown.split()) == 1
            if shown[0].islower() and len(shown.split()) == 1:
                raise Rejected("also an ordinary word")
            if _before(text, start, is_surname):
                raise Rejected("surname of others" if is_surname else "part of a longer name")
            if len(self.old.split()) == 1 and _after(text, stop):
                raise Rejected("part of a longer name")
            new = self.new.split()[-1] if is_surname else self.new
            is_loud = len(shown) > 3 and shown.isupper() and not self.old.isupper()
            edits.append(Edit(start, stop, new.upper() if is_loud else new))
        return edits

    def back(self) -> NameChange:
        """Return the opposite change."""
        return NameChange(self.new, self.old, self.is_person)


@lru_cache(maxsize=4096)
def _pattern(name: str, is_person: bool) -> re.Pattern[str]:
    """Return the pattern of a name in folded text; longer forms first."""
    forms = [phrase(name)]
    parts = name.split()
    if is_person and len(parts) > 1:
        first, last = phrase(parts[0]), phrase(parts[-1])
        initials = r"(?:\w\.\s*)*"
        forms += [rf"{first}\s+{initials}{last}", rf"\w\.\s*{initials}{last}", last]
    suffix = "(?:'s?)?" if phrase(parts[-1]).endswith("s") else _SUFFIX
    return re.compile(rf"(?<!\w)({'|'.join(forms)})(?={suffix}(?!\w))")


def _before(text: str, start: int, is_surname: bool) -> bool:
    """Tell whether a name's first word belongs to the word before it."""
    match = re.search(r"([^\W\d_][\w'\u2019-]*\.?)\s?$", text[max(0, start - 40) : start])
    if match is None or not match[1][0].isupper():
        return False
    word = match[1].rstrip(".").lower()
    if match[1].endswith(".") and word not in WORDS["titles"] and len(word) > 1:
        return False  # the end of a sentence
    if word in WORDS["name_parts"] and not is_surname:
        return True
    no_name = WORDS["titles"] | WORDS["function_words"] | _words_of(text)
    return word not in no_name


def _after(text: str, stop: int) -> bool:
    """Tell whether a name goes on after this place."""
    match = re.match(r"\s([^\W\d_][\w'\u2019-]*)", text[stop : stop + 40])
    return bool(match and match[1][0].isupper() and match[1].lower() not in _words_of(text))


@lru_cache(maxsize=64)
def _words_of(text: str) -> frozenset[str]:
    """Return the words that stand in a text in lower case: no names."""
    return frozenset(word for word in re.findall(r"\w[\w'\u2019-]*", text) if word[0].islower())
