"""The routing experiment's tables and plot."""

from __future__ import annotations

from pathlib import Path

from experiments.plots import curve, panels, save
from experiments.results import Header, Items
from experiments.statistics import mean_interval
from experiments.tables import (
    INTERVALS,
    Column,
    Record,
    average,
    difference,
    grouped,
    interval,
    origin,
    records_table,
    values,
)

_KEYS = ("rows", "routing")


def summary(header: Header, items: Items) -> str:
    """Return the results in Markdown."""
    settings = header["settings"]
    about, unrelated = _split(items)
    columns = [
        interval("right document first, %", "document", ".0f", 100),
        interval("answer in the first passage, %", "first", ".0f", 100),
        interval("answer in a passage, %", "any", ".0f", 100),
        average("nothing relevant, %", _is_refused, ".0f", 100),
        average("rows recalled", "recalled", ".0f"),
        Column("median seconds", lambda records: f"{_median(records):.3f}"),
    ]
    parts = [
        "# Routing",
        origin(header, "model", "store", "data", "wording", "relevance"),
        f"{settings['questions']} questions ({settings['left_out']} of the file are about none of "
        f"the store's documents); passages of {settings['passage_rows']} rows together, at most "
        f"{settings['max_passages']}. {INTERVALS}",
        records_table(grouped(about, *_KEYS), _KEYS, columns),
    ]
    if unrelated:
        groups = grouped(unrelated, *_KEYS)
        parts += [
            f"{max(map(len, groups.values()))} prompts about nothing in the store "
            f"(`{settings['unrelated']}`), told so:",
            records_table(
                groups, _KEYS, [interval("nothing relevant, %", _is_refused, ".0f", 100)]
            ),
        ]
    words = [record for record in about if record["routing"] == "words"]
    others = [record for record in about if record["routing"] != "words"]
    if words and others:
        column = difference(
            "answer in a passage, points",
            "any",
            words,
            ("rows", "question"),
            form="+.0f",
            scale=100,
        )
        parts += [
            "Differences to words alone:",
            records_table(grouped(others, *_KEYS), _KEYS, [column]),
        ]
    return "\n\n".join(parts) + "\n"


def draw(header: Header, items: Items, folder: Path) -> list[Path]:
    """Draw the share of answers found over rows: `routing.png`."""
    figure, (axes,) = panels(1)
    about, _ = _split(items)
    for (routing,), records in grouped(about, "routing").items():
        points = {
            rows: mean_interval(values(of_size, "any"))
            for (rows,), of_size in grouped(records, "rows").items()
        }
        curve(axes, points, routing)
    axes.set_xscale("log")
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("rows")
    axes.set_ylabel("answer in a passage")
    axes.legend()
    return [save(figure, folder / "routing.png")]


def _split(items: Items) -> tuple[list[Record], list[Record]]:
    """Return the records of questions about the store, and those of unrelated prompts."""
    records = [{**record, "question": key.split("/", 2)[2]} for key, record in items.items()]
    about = [record for record in records if record["any"] is not None]
    return about, [record for record in records if record["any"] is None]


def _is_refused(record: Record) -> bool:
    return not record["is_relevant"]


def _median(records: list[Record]) -> float:
    return sorted(record["seconds"] for record in records)[len(records) // 2]
