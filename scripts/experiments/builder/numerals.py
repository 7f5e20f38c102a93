"""Numbers in a text: digits, words and ordinals, found by value and written alike."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache

from experiments.builder.vocabulary import NUMBERS

_SCALES = {
    "hundred": 100,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}


def _words(kind: str) -> list[str]:
    """Return the cardinal or ordinal names of 0 to 99, at their index."""
    small = NUMBERS[kind]
    whole_tens = {"cardinal": str, "ordinal": lambda ten: ten[:-1] + "ieth"}[kind]
    tens = [
        f"{ten}-{small[unit]}" if unit else whole_tens(ten)
        for ten in NUMBERS["tens"]
        for unit in range(10)
    ]
    return [*small, *tens]


_CARDINALS, _ORDINALS = _words("cardinal"), _words("ordinal")
_VALUES = {word: value for value, word in enumerate(_CARDINALS)}
_RANKS = {word: value for value, word in enumerate(_ORDINALS)}
_ANY_WORD = "|".join(
    word.replace("-", r"[-\s]") for word in sorted([*_VALUES, *_RANKS], key=len, reverse=True)
)
_SPACES = "\u00a0\u202f\u2009"
_NUMBER = re.compile(
    rf"(?<![\w.,:/])(?P<digits>\d{{1,3}}(?:(?P<separator>[,{_SPACES}])\d{{3}})+(?:\.\d+)?"
    rf"|\d+(?:\.\d+)?|\.\d+)(?P<suffix>st|nd|rd|th)?(?![\w/]|[.,:]\d)"
    rf"|(?<![\w])(?<!\d\.)(?P<word>{_ANY_WORD})(?!\w)",
    re.IGNORECASE,
)
_SCALE = re.compile(rf"[-\s]({'|'.join(_SCALES)})(?!\w)", re.IGNORECASE)


@dataclass(frozen=True)
class Number:
    """One number of a text.

    Attributes:
        value: with its scale: 1.5 million is 1,500,000.
        start: its first character.
        stop: after its last, without the scale.
        text: as it stands there, without the scale.
        ordinal: "19th" or "nineteenth".
        scale: 10 ** 6 for "1.5 million"; 1 without one.
        separator: between thousands, "" for none.
    """

    value: Decimal
    start: int
    stop: int
    text: str
    ordinal: bool = False
    scale: int = 1
    separator: str = ""

    @property
    def is_word(self) -> bool:
        """Written in letters."""
        return self.text[0].isalpha()

    @property
    def decimals(self) -> int:
        """Digits after the point."""
        return len(self.text.partition(".")[2])

    @property
    def may_be_year(self) -> bool:
        """Four digits and nothing else, between 1000 and 2100."""
        return len(self.text) == 4 and self.text.isdigit() and 1000 <= self.value <= 2100

    def written(self, value: Decimal) -> str | None:
        """Write another value in this number's form; None if that form cannot say it."""
        mantissa = value / self.scale
        whole = mantissa == mantissa.to_integral_value()
        if self.is_word:
            if not whole or not 0 <= mantissa < 100:
                return None
            word = (_ORDINALS if self.ordinal else _CARDINALS)[int(mantissa)]
            if self.text.isupper():
                return word.upper()
            return word.capitalize() if self.text[0].isupper() else word
        if self.ordinal:
            return f"{int(mantissa)}{suffix_of(int(mantissa))}" if whole else None
        exact = round(mantissa, self.decimals)
        if exact != mantissa:
            return None
        text = f"{exact:,.{self.decimals}f}".replace(",", self.separator)
        return text.removeprefix("0") if self.text.startswith(".") else text


@lru_cache(maxsize=64)  # an article is searched for every answer that is tried
def numbers_in(text: str) -> tuple[Number, ...]:
    """Return the numbers of a text, in order.

    Digits that are part of a word ("A696", "1990s"), of a time or of a fraction are not numbers.
    """
    return tuple(_number(match, text) for match in _NUMBER.finditer(text))


def _number(match: re.Match[str], text: str) -> Number:
    scale_match = _SCALE.match(text, match.end())
    scale = _SCALES[scale_match[1].lower()] if scale_match else 1
    start, stop = match.span()
    if match["word"]:
        word = "-".join(re.split(r"[-\s]", match["word"].lower()))
        ordinal = word in _RANKS
        value = Decimal((_RANKS if ordinal else _VALUES)[word])
        scale = 1 if ordinal else scale
        return Number(value * scale, start, stop, match[0], ordinal, scale)
    separator = match["separator"] or ""
    digits = match["digits"].replace(separator, "") if separator else match["digits"]
    value = Decimal(digits)
    if match["suffix"]:
        return Number(value, start, stop, match[0], ordinal=True)
    return Number(value * scale, start, stop, match[0], False, scale, separator)


def suffix_of(value: int) -> str:
    """Return "st", "nd", "rd" or "th"."""
    if 10 < value % 100 < 14:
        return "th"
    return {1: "st", 2: "nd", 3: "rd"}.get(value % 10, "th")
