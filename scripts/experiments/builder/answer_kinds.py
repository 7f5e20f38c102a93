"""What an answer is: a year, a date, a number, a name, and of which type.

The type comes from the answer's own form ("... River"), from a few lists, and from what the
question asks for ("Who ...", "In what city ..."). An answer that none of them types makes no item:
a wrong type would make a question that its context does not answer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from experiments.builder.changes import Edit, apply
from experiments.builder.folding import fold
from experiments.builder.numerals import Number, numbers_in
from experiments.builder.places import KNOWN, PEOPLES
from experiments.builder.quantities import MONTHS, Date, date_in, decade_in
from experiments.builder.vocabulary import words

_MOST_WORDS = 5
_SMALL_WORD = r"(?:of|the|de|von|van|der|da|di|la|le|du|del)"
_CAPITALISED = r"[^\W\d_a-z][\w'\u2019.-]*"
_NAME = re.compile(
    rf"(?!.*['\u2019]s?$){_CAPITALISED}(?:\s+(?:{_SMALL_WORD}\s+){{0,2}}{_CAPITALISED}){{0,4}}"
)
_PLAIN_PERSON = re.compile(r"[^\W\d_]+\.?(?:[\s-]+[^\W\d_]+\.?){1,3}")
_ROMAN = re.compile(r"[IVX]+")

# A name that ends, or begins, with one of these is that kind of thing whatever the question.
_LAST = frozenset(
    words("""
    academy act agreement airport army avenue bank basin bay bible bill bowl bridge building
    castle cathedral center centre church club college company conjecture constitution
    corporation council county court creek crusade dam department desert district dynasty empire
    exhibition festival formation gallery gate garden gardens government hall highway hill
    hospital hotel house institute institution island islands lab laboratory lake law league
    library line mountain mountains museum ocean office palace park parliament party place plain
    plant prize railway region regiment revolution river road room school sea square stadium
    station stone street synod theatre theorem theory tower town treaty tribe university valley
    village war way wing award awards society association foundation group hypothesis
    """)
)
_FIRST = frozenset(
    words("""
    battle bay cape council duchy duke fort gulf house kingdom lake mount port treaty university
    theory
    """)
)
_STYLED = frozenset(
    words("""
    king queen prince princess pope emperor duke count saint st sir lord lady madame mrs marquis
    colonel general dr
    """)
)
# Nouns whose answers have nothing in common.
_VAGUE = frozenset(
    words("""
    area aspect concept feature folks form forms group groups item items object other others
    part parts people's phrase section sections term terms thing things use word
    parts work works
    """)
)

_PERSON = frozenset(
    words("""
    actor actress alumni alumnus architect artist astronomer author bishop chairman character
    commander composer dean designer director economist emperor engineer explorer father founder
    general governor historian inventor journalist king leader man mathematician mayor minister
    monarch mother musician novelist painter person philosopher physicist player poet politician
    pope president producer professor queen ruler scholar scientist sculptor singer sociologist
    son theologian voyager wife woman writer brother friend successor theorist
    """)
)
_NOUNS = {
    **dict.fromkeys(_PERSON, "person"),
    **dict.fromkeys(("city", "town", "village", "capital", "settlement", "suburb"), "city"),
    **dict.fromkeys(("country", "nation"), "country"),
    **dict.fromkeys(("company", "corporation", "firm", "manufacturer", "business"), "company"),
    **dict.fromkeys(("tribe", "tribes", "clan", "people", "peoples"), "tribe"),
}
_NOT_NOUNS = frozenset(
    words("""
    and are as at be been by can could did do does for from had has have in is it kind many may
    might much name of on or percent percentage should sort than that the there these this those
    to type types under was were what which who will with would year years
    """)
)
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
        numbers: of a year, a span of years, or a number: in the answer.
        date: of a date.
        decade: of a decade, "1990".
        most: the highest value that makes sense, None if there is none.
    """

    kind: str
    type: str
    numbers: tuple[Number, ...] = ()
    date: Date | None = None
    decade: str | None = None
    most: int | None = None


def kind_of(question: str, answer: str) -> AnswerKind | None:
    """Return what an answer is; None if it has no known type."""
    parts = answer.split()
    if not parts or len(parts) > _MOST_WORDS:
        return None
    if re.search(r"\d", answer) or numbers_in(answer):
        return _quantity(fold(question), answer)
    if _NAME.fullmatch(answer) and not any(month in parts for month in MONTHS):
        found = _name_type(fold(question), answer)
        return AnswerKind("entity", found) if found else None
    return None


def _quantity(question: str, answer: str) -> AnswerKind | None:
    """Return the kind of an answer with a number in it."""
    if (date := date_in(answer)) is not None:
        return AnswerKind("number", "date", date=date)
    if (decade := decade_in(answer)) is not None:
        return None if numbers_in(answer) else AnswerKind("number", "decade", decade=decade)
    numbers = numbers_in(answer)
    # Digits outside of the numbers: a time, a fraction, part of a word.
    rest = apply(answer, [Edit(number.start, number.stop, " ") for number in numbers])
    if not numbers or re.search(r"\d", rest) or any(month in rest for month in MONTHS):
        return None
    if all(number.may_be_year for number in numbers) and not _ASKS_HOW_MANY.search(question):
        if len(numbers) == 2 and fold(rest).strip() in ("-", "to", "and", "until"):
            return AnswerKind("year", "span of years", tuple(numbers))
        if len(numbers) == 1 and not rest.strip(" ?.,()"):
            return AnswerKind("year", "year", tuple(numbers))
    if len(numbers) != 1 or re.search(r"[A-Z]", rest.replace("C", "")):
        return None
    (number,) = numbers
    if (number.value <= 1 and not number.decimals) or (number.ordinal and number.value <= 2):
        return None  # "one", "first" and "second" are mostly not numbers
    if re.search(r"century|centuries", f"{rest} {question}") and number.ordinal:
        return AnswerKind("number", "century", (number,), most=20)
    if re.search(r"%|per\s?cent", rest) or "percent" in question:
        return AnswerKind("number", "percent", (number,), most=99 if number.value < 100 else None)
    return AnswerKind("number", "ordinal" if number.ordinal else "quantity", (number,))


def _name_type(question: str, answer: str) -> str | None:
    """Return the type of a name."""
    if answer in KNOWN:
        return KNOWN[answer]
    parts = [word.lower().rstrip(".") for word in answer.split()]
    if len(parts) > 1 and parts[-1] in _LAST:
        return f"... {parts[-1]}"
    if len(parts) > 1 and parts[0] in _FIRST:
        return f"{parts[0]} ..."
    asked = _asked(question)
    if asked == "person":
        return _person_type(answer, parts)
    return None if asked in _VAGUE else asked


def _person_type(answer: str, parts: list[str]) -> str | None:
    """Tell apart names with a surname, names with a style, and single names; None for groups."""
    if parts[-1].endswith("s") or any(word in PEOPLES for word in answer.split()):
        return None
    if len(parts) == 1:
        return "person, one name"
    if parts[0] in _STYLED:
        return f"{parts[0]} ..."
    if (
        _ROMAN.fullmatch(answer.split()[-1])
        or re.search(rf"\s{_SMALL_WORD}\s", answer)
        or not _PLAIN_PERSON.fullmatch(answer)
    ):
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
        if word in _NOT_NOUNS or (noun and word.endswith(("ed", "ing", "s"))):
            break
        if word in _NOUNS or noun not in _NOUNS:
            noun = word
    if noun is None:
        return None
    bare: str = noun.removesuffix("'s")
    return _NOUNS.get(noun, bare)
