"""Names that take the place of others: of people, places and everything else with a capital."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from experiments.builder.changes import Edit, Rejected
from experiments.builder.folding import fold, folded, phrase
from experiments.builder.vocabulary import words

_SHORTENED_TITLES = words(
    """
    Mr Mrs Ms Dr Prof Sir Lord Lady Rev St Gen Col Capt Sgt Lt Gov Sen Pres
    """
)
_TITLES = {title.lower() for title in _SHORTENED_TITLES} | frozenset(
    words("""
    doctor professor reverend general colonel captain lieutenant governor senator president king
    queen prince princess emperor empress pope bishop archbishop duke count baron chief
    commander major admiral marquis father brother saint
    """)
)
# Before a place these are part of its name, though they are words of their own too.
_NAME_PARTS = frozenset(
    words("""
    new north south east west great saint st fort port san lake mount old
    """)
)
# They begin sentences; the others that do are known by standing elsewhere in lower case.
_FUNCTION_WORDS = frozenset(
    words("""
    a after also although an and as at before both but by during for from he her his however if in
    into its no not of on or she since so than that the their then these they this those though
    through to under until when where which while who with
    """)
)
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
            Rejected: an occurrence is part of a longer name, the surname of somebody else, or an
                ordinary word that only looks like the name.
        """
        found: list[Edit] = []
        if fold(self.old.split()[-1]) not in folded(text).text:  # far faster than a search
            return found
        for start, stop in folded(text).spans(_pattern(self.old, self.is_person)):
            there = text[start:stop]
            is_surname = self.is_person and " " in self.old and len(there.split()) == 1
            if there[0].islower() and len(there.split()) == 1:
                raise Rejected("also an ordinary word")
            if _before(text, start, is_surname):
                raise Rejected("surname of others" if is_surname else "part of a longer name")
            if len(self.old.split()) == 1 and _after(text, stop):
                raise Rejected("part of a longer name")
            new = self.new.split()[-1] if is_surname else self.new
            is_loud = len(there) > 3 and there.isupper() and not self.old.isupper()
            found.append(Edit(start, stop, new.upper() if is_loud else new))
        return found

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
    if match[1].endswith(".") and word not in _TITLES and len(word) > 1:
        return False  # the end of a sentence
    if word in _NAME_PARTS and not is_surname:
        return True
    return word not in _TITLES and word not in _FUNCTION_WORDS and word not in _words_of(text)


def _after(text: str, stop: int) -> bool:
    """Tell whether a name goes on after what was found."""
    match = re.match(r"\s([^\W\d_][\w'\u2019-]*)", text[stop : stop + 40])
    return bool(match and match[1][0].isupper() and match[1].lower() not in _words_of(text))


@lru_cache(maxsize=64)
def _words_of(text: str) -> frozenset[str]:
    """Return the words that stand in a text in lower case: no names."""
    return frozenset(word for word in re.findall(r"\w[\w'\u2019-]*", text) if word[0].islower())
