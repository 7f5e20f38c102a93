"""What an answer is: a year, a date, a number, a name, and of which type.

The type comes from the answer's own form ("... River"), from a few lists, and from what the
question asks for ("Who ...", "In what city ..."). An answer that none of them types makes no item:
a wrong type would make a question that its context does not answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from random import Random

from experiments.builder.edits import Change, Edit, apply
from experiments.builder.folded import fold
from experiments.builder.numerals import numbers_in
from experiments.builder.quantities import (
    date_in,
    decade_in,
    other_dates,
    other_decades,
    other_numbers,
    other_years,
)
from experiments.builder.vocabulary import MONTHS, PEOPLES, TYPE_OF_NAME, WORDS

_MOST_WORDS = 5
_SMALL_WORD = r"(?:of|the|de|von|van|der|da|di|la|le|du|del)"
_CAPITALISED = r"[^\W\d_a-z][\w'\u2019.-]*"
_NAME = re.compile(
    rf"(?!.*['\u2019]s?$){_CAPITALISED}(?:\s+(?:{_SMALL_WORD}\s+){{0,2}}{_CAPITALISED}){{0,4}}"
)
_PLAIN_PERSON = re.compile(r"[^\W\d_]+\.?(?:[\s-]+[^\W\d_]+\.?){1,3}")
_ROMAN = re.compile(r"[IVX]+")
_TYPE_OF_NOUN = {
    **dict.fromkeys(WORDS["person_nouns"], "person"),
    **dict.fromkeys(("city", "town", "village", "capital", "settlement", "suburb"), "city"),
    **dict.fromkeys(("country", "nation"), "country"),
    **dict.fromkeys(("company", "corporation", "firm", "manufacturer", "business"), "company"),
    **dict.fromkeys(("tribe", "tribes", "clan", "people", "peoples"), "tribe"),
}
_WH = re.compile(r"\b(?:what|which)\b(?P<after>.*)")
_NAME_OF = re.compile(r"\b(?:name|title) of (?:the|an?|one) (?P<after>.*)")
_ASKS_WHO = re.compile(r"^(?:\w+,? )?who\b|\b(?:by|to|with|for|from|of) whom\b|^whose\b|^who's\b")
_ASKS_WHERE = re.compile(r"\bwhere\b")
_ASKS_WHEN = re.compile(r"\bwhen\b|\b(?:what|which)\b[\w\s-]*\b(?:year|years|date)\b|\bhow late\b")
_ASKS_HOW_MANY = re.compile(r"\bhow (?:many|much|long|large|big|far|old|tall|high)\b")


@dataclass(frozen=True)
class AnswerKind:
    """What an answer is.

    Attributes:
        kind: "year", "number" (with dates and decades) or "entity".
        type: within it; names replace each other only within a type.
        changes: yields changes to other values; None for names, which come from a pool.
        number_stop: end of a number in the answer, its unit may follow; None for others.
    """

    kind: str
    type: str
    changes: Callable[[Random], Iterator[Change]] | None = None
    number_stop: int | None = None


def kind_of(question: str, answer: str) -> AnswerKind | None:
    """Return what an answer is; None if no type is certain."""
    parts = answer.split()
    if not parts or len(parts) > _MOST_WORDS:
        return None
    if re.search(r"\d", answer) or numbers_in(answer):
        return _quantity(fold(question), answer)
    if _NAME.fullmatch(answer) and not any(month in parts for month in MONTHS):
        type = _name_type(fold(question), answer)
        return AnswerKind("entity", type) if type else None
    return None


def _quantity(question: str, answer: str) -> AnswerKind | None:
    """Return the kind of an answer with a number in it."""
    if (date := date_in(answer)) is not None:
        return AnswerKind("number", "date", partial(other_dates, date))
    numbers = numbers_in(answer)
    if (decade := decade_in(answer)) is not None:
        return None if numbers else AnswerKind("number", "decade", partial(other_decades, decade))
    # Digits outside of the numbers: a time, a fraction, part of a word.
    rest = apply(answer, [Edit(number.start, number.stop, " ") for number in numbers])
    if not numbers or re.search(r"\d", rest) or any(month in rest for month in MONTHS):
        return None
    if all(number.may_be_year for number in numbers) and not _ASKS_HOW_MANY.search(question):
        years = partial(other_years, list(numbers))
        if len(numbers) == 2 and fold(rest).strip() in ("-", "to", "and", "until"):
            return AnswerKind("year", "span of years", years)
        if len(numbers) == 1 and not rest.strip(" ?.,()"):
            return AnswerKind("year", "year", years)
    if len(numbers) != 1 or re.search(r"[A-Z]", rest.replace("C", "")):
        return None
    (number,) = numbers
    if (number.value <= 1 and not number.decimals) or (number.ordinal and number.value <= 2):
        return None  # "one", "first" and "second" are mostly not numbers
    type, most = "ordinal" if number.ordinal else "quantity", None
    if re.search(r"century|centuries", f"{rest} {question}") and number.ordinal:
        type, most = "century", 20
    elif re.search(r"%|per\s?cent", rest) or "percent" in question:
        type, most = "percent", 99 if number.value < 100 else None
    return AnswerKind("number", type, partial(other_numbers, number, most=most), number.stop)


def _name_type(question: str, answer: str) -> str | None:
    """Return the type of a name."""
    if answer in TYPE_OF_NAME:
        return TYPE_OF_NAME[answer]
    parts = [word.lower().rstrip(".") for word in answer.split()]
    if len(parts) > 1 and parts[-1] in WORDS["last_words"]:
        return f"... {parts[-1]}"
    if len(parts) > 1 and parts[0] in WORDS["first_words"]:
        return f"{parts[0]} ..."
    asked = _asked(question)
    if asked == "person":
        return _person_type(answer, parts)
    return None if asked in WORDS["vague_nouns"] else asked


def _person_type(answer: str, parts: list[str]) -> str | None:
    """Tell apart names with a surname, names with a style, and single names; None for groups."""
    words = answer.split()
    if parts[-1].endswith("s") or PEOPLES.intersection(words):
        return None
    if len(parts) == 1:
        return "person, one name"
    if parts[0] in WORDS["styles"]:
        return f"{parts[0]} ..."
    has_particle = re.search(rf"\s{_SMALL_WORD}\s", answer) is not None
    if _ROMAN.fullmatch(words[-1]) or has_particle or not _PLAIN_PERSON.fullmatch(answer):
        return "person, styled"
    return "person"


def _asked(question: str) -> str | None:
    """Return the type of what a folded question asks for."""
    if _ASKS_WHO.search(question):
        return "person"
    if _ASKS_WHERE.search(question):
        return "place"
    match = _NAME_OF.search(question) or _WH.search(question)
    if match is None or _ASKS_WHEN.search(question):
        return None
    noun = None
    for word in re.findall(r"[\w'-]+", match["after"]):
        if word in WORDS["no_nouns"] or (noun and word.endswith(("ed", "ing", "s"))):
            break
        if word in _TYPE_OF_NOUN or noun not in _TYPE_OF_NOUN:
            noun = word
    return noun and _TYPE_OF_NOUN.get(noun, noun.removesuffix("'s"))
