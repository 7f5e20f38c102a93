"""Tables of records in Markdown: one row a group of records, one column a measure of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.statistics import Estimate, mean_interval, paired_difference

Record = Mapping[str, Any]
Measure = str | Callable[[Record], Any]
"""A value of a record, by its key or computed; None where the record has none."""

INTERVALS = "Means are given with 95 % bootstrap intervals."


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        title: its heading.
        cell: makes a group's records into the cell's text.
    """

    title: str
    cell: Callable[[Sequence[Record]], str]


def interval(title: str, measure: Measure, form: str = ".1f", scale: float = 1) -> Column:
    """Return a column of means with their intervals."""
    return Column(
        title, lambda records: shown(mean_interval(values(records, measure)), form, scale)
    )


def average(title: str, measure: Measure, form: str = ".1f", scale: float = 1) -> Column:
    """Return a column of means alone."""

    def cell(records: Sequence[Record]) -> str:
        known = values(records, measure)
        return format(scale * sum(known) / len(known), form) if known else ""

    return Column(title, cell)


def difference(
    title: str, measure: Measure, others: Iterable[Record], same: Sequence[str], **shape: Any
) -> Column:
    """Return a column of mean differences to other records of the same items.

    Args:
        title: heading.
        measure: of both sides.
        others: are subtracted.
        same: keys by which a record finds its partner.
        **shape: `form` and `scale` of `shown`.
    """
    partners = {tuple(other[key] for key in same): other for other in others}
    return Column(title, lambda records: shown(paired(records, partners, measure, same), **shape))


COUNT = Column("n", lambda records: str(len(records)))


def paired(
    records: Iterable[Record],
    partners: Mapping[tuple[Any, ...], Record],
    measure: Measure,
    same: Sequence[str],
) -> Estimate:
    """Return the mean difference of records and their partners, where both have the measure."""
    pairs = [
        values((record, partner), measure)
        for record in records
        if (partner := partners.get(tuple(record[key] for key in same))) is not None
    ]
    complete = [pair for pair in pairs if len(pair) == 2]
    return paired_difference([pair[0] for pair in complete], [pair[1] for pair in complete])


def values(records: Iterable[Record], measure: Measure) -> list[float]:
    """Return the measure of the records that have it; True counts as 1."""
    take = measure if callable(measure) else lambda record: record.get(measure)
    return [float(value) for record in records if (value := take(record)) is not None]


def grouped(records: Iterable[Record], *keys: str) -> dict[tuple[Any, ...], list[Record]]:
    """Return the records by the values of some keys, in the order they come."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(record[key] for key in keys), []).append(record)
    return groups


def shown(estimate: Estimate, form: str = ".1f", scale: float = 1) -> str:
    """Return "mean [low, high]"; nothing without values."""
    if not estimate.count:
        return ""
    mean, low, high = (
        format(scale * part, form) for part in (estimate.mean, estimate.low, estimate.high)
    )
    return f"{mean} [{low}, {high}]"


def records_table(
    groups: Mapping[tuple[Any, ...], Sequence[Record]],
    keys: Sequence[str],
    columns: Sequence[Column],
) -> str:
    """Return a table with one row a group: what it was grouped by, then its columns."""
    rows = [
        [*map(_named, group), *(column.cell(records) for column in columns)]
        for group, records in groups.items()
    ]
    return table([*keys, *(column.title for column in columns)], rows)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def origin(header: Mapping[str, Any], *names: str) -> str:
    """Return where results come from, as a list: some settings, machine, versions and revision."""
    settings = header["settings"]
    lines = [f"* {name}: {_as_text(settings[name])}" for name in names if settings.get(name)]
    versions = ", ".join(f"{name} {version}" for name, version in header["versions"].items())
    lines += [f"* machine: {header['machine']}", f"* versions: {versions}"]
    return "\n".join([*lines, f"* code: {header['revision']}"])


def _named(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
