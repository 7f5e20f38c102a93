"""Numbers, years, decades and dates that take the place of others."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal

from experiments.builder.edits import Edit, apply
from experiments.builder.numerals import Number, numbers_in, suffix_of
from experiments.builder.vocabulary import MONTHS

_MONTH = "|".join(MONTHS)
_YEAR = r"1\d{3}|20\d{2}"
_DATE = re.compile(
    rf"(?<!\w)(?:(?P<d1>\d{{1,2}})(?P<s1>st|nd|rd|th)?\s+(?:of\s+)?(?P<m1>{_MONTH})(?:,?\s+(?P<y1>{_YEAR}))?"
    rf"|(?P<m2>{_MONTH})\s+(?P<d2>\d{{1,2}})(?P<s2>st|nd|rd|th)?(?:,?\s+(?P<y2>{_YEAR}))?"
    rf"|(?P<m3>{_MONTH}),?\s+(?:of\s+)?(?P<y3>{_YEAR}))(?!\w)"
)
_DECADE = re.compile(r"(?<!\w)(\d{3}0)(?='?s(?!\w)|\u2019s(?!\w))")
_LATEST_YEAR = 2020
_DRAWS = 200  # of which some are no sensible value


@dataclass(frozen=True)
class NumberChange:
    """Values that become others, however they are written.

    Attributes:
        values: (old, new) pairs.
        ordinal: of ordinals, "19th" and "nineteenth"; else of plain numbers.
    """

    values: tuple[tuple[Decimal, Decimal], ...]
    ordinal: bool = False

    def edits(self, text: str) -> list[Edit]:
        """Return each number of these values, written anew in its own form."""
        new = dict(self.values)
        edits = []
        for number in numbers_in(text):
            if number.ordinal == self.ordinal and number.value in new:
                written = number.written(new[number.value])
                # A form that cannot say the new value takes that of plain digits.
                plain = written if written is not None else _plain(number, new[number.value])
                edits.append(Edit(number.start, number.stop, plain))
        return edits

    def back(self) -> NumberChange:
        """Return the opposite change."""
        return NumberChange(tuple((new, old) for old, new in self.values), self.ordinal)


@dataclass(frozen=True)
class DecadeChange:
    """A decade, "1990s", that becomes another; the year 1990 stays."""

    old: str
    new: str

    def edits(self, text: str) -> list[Edit]:
        """Return each naming of the decade."""
        return [
            Edit(match.start(1), match.end(1), self.new)
            for match in _DECADE.finditer(text)
            if match[1] == self.old
        ]

    def back(self) -> DecadeChange:
        """Return the opposite change."""
        return DecadeChange(self.new, self.old)


@dataclass(frozen=True)
class Date:
    """A day of a month, a month of a year, or both; None for what is not said."""

    day: int | None
    month: str
    year: str | None


@dataclass(frozen=True)
class DateChange:
    """A date that becomes another of the same year, in every order it is written.

    Of a day with a year, occurrences without the year change too; those of another year do not.
    """

    old: Date
    new: Date

    def edits(self, text: str) -> list[Edit]:
        """Return each occurrence, from its day to its month."""
        day = self.new.day or 0
        changed = {**dict.fromkeys(("m1", "m2", "m3"), self.new.month)}
        if self.old.day is not None:
            changed |= dict.fromkeys(("d1", "d2"), str(day))
            changed |= dict.fromkeys(("s1", "s2"), suffix_of(day))
        edits = []
        for match in _DATE.finditer(text):
            if self._is_old(_date(match)):
                parts = sorted(
                    Edit(*match.span(group), part)
                    for group, part in changed.items()
                    if match[group] is not None
                )
                start, stop = parts[0].start, parts[-1].stop  # the year after them stays
                edits.append(Edit(start, stop, apply(text[:stop], parts)[start:]))
        return edits

    def _is_old(self, date: Date) -> bool:
        old = self.old
        is_same_year = old.year in (None, date.year) or (old.day and not date.year)
        return bool(
            is_same_year and date.month == old.month and (not old.day or date.day == old.day)
        )

    def back(self) -> DateChange:
        """Return the opposite change."""
        return DateChange(self.new, self.old)


def date_in(text: str) -> Date | None:
    """Return the one date of a text; None if there is none, or more than one."""
    matches = list(_DATE.finditer(text))
    return _date(matches[0]) if len(matches) == 1 else None


def decade_in(text: str) -> str | None:
    """Return the one decade of a text, "1990" for "the 1990s"."""
    decades = _DECADE.findall(text)
    return decades[0] if len(decades) == 1 else None


def other_dates(old: Date, draw: random.Random) -> Iterator[DateChange]:
    """Yield changes to other dates of the same year."""
    for _ in range(_DRAWS):
        day = None if old.day is None else draw.randint(1, 28)
        month = draw.choice(MONTHS)
        if (month != old.month and day != old.day) or (day is None and month != old.month):
            yield DateChange(old, Date(day, month, old.year))


def other_decades(old: str, draw: random.Random) -> Iterator[DecadeChange]:
    """Yield changes to decades up to fifty years away."""
    for _ in range(_DRAWS):
        new = int(old) + 10 * draw.choice([-5, -4, -3, -2, -1, 1, 2, 3, 4, 5])
        if 1000 <= new <= max(_LATEST_YEAR, int(old)):
            yield DecadeChange(old, str(new))


def other_years(old: list[Number], draw: random.Random) -> Iterator[NumberChange]:
    """Yield changes of one year, or of both ends of a span, by 2 to 30 years."""
    latest = max(_LATEST_YEAR, *(int(year.value) for year in old))
    for _ in range(_DRAWS):
        shift = draw.choice([-1, 1]) * draw.randint(2, 30)
        values = tuple((year.value, year.value + shift) for year in old)
        if all(100 <= new <= latest for _, new in values):
            yield NumberChange(values)


def other_numbers(
    old: Number, draw: random.Random, most: int | None = None
) -> Iterator[NumberChange]:
    """Yield changes to numbers of half to twice the size that look alike.

    As many digits, as many decimals, and as many zeros at the end: 45,000 becomes 62,000.

    Args:
        old: the number that they replace.
        draw: the source of randomness.
        most: the highest that makes sense, for percent and centuries.
    """
    power = Decimal(old.scale) / 10**old.decimals
    count = int(old.value / power)
    while count % 10 == 0 and count:
        count, power = count // 10, power * 10
    digits = len(str(count))
    low = max((count + 1) // 2, 10 ** (digits - 1), 2)
    high = min(2 * count + 1, 10**digits - 1)
    if old.is_word or old.ordinal:
        low, high = max(count * 2 // 3, 2), max(count + 3, count * 3 // 2)
    for _ in range(_DRAWS):
        new = draw.randint(low, high)
        value = new * power
        if new != count and (new % 10 or new < 10 or old.is_word) and (not most or value <= most):
            yield NumberChange(((old.value, value),), old.ordinal)


def _plain(number: Number, value: Decimal) -> str:
    return f"{(value / number.scale).normalize():f}"


def _date(match: re.Match[str]) -> Date:
    day = match["d1"] or match["d2"]
    return Date(
        None if day is None else int(day),
        match["m1"] or match["m2"] or match["m3"],
        match["y1"] or match["y2"] or match["y3"],
    )
