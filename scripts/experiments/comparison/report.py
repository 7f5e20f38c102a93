"""The comparison's tables, and its picture: conditions by question sets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from experiments.comparison.settings import BASELINE
from experiments.plots import heat_map, panels, save
from experiments.results import Header, Items
from experiments.tables import (
    COUNT,
    INTERVALS,
    Column,
    Record,
    average,
    difference,
    grouped,
    interval,
    origin,
    records_table,
    table,
    values,
)

SAME = ("size", "set", "id")
"""By which answers to one question are found under two conditions."""
_LEGEND = (
    "*Found*: the passages or chunks that are put before the question have all of the evidence; "
    "*first document*: the best of them is of a right document. *Right*: an answer is in the "
    "greedy tokens. *Preferred*: the answer is likelier than the one that is true in the world. "
    "*Nats*: the answer's log-probability per token. *Cited*: of right answers from memory, those "
    "whose first citation has the evidence. *Told*: nothing in the memory is found relevant; of "
    "answerable questions that is a mistake, but not once their documents are out of scope "
    f"(*told without document*). *Tokens*: put before the question. {INTERVALS}"
)


def summary(header: Header, items: Items) -> str:
    """Return the results in Markdown."""
    records = list(items.values())
    parts = ["# Comparison", origin(header, "model", "memory", "embedding_model"), _LEGEND]
    for (size,), of_size in grouped(records, "size").items():
        parts += [f"## Overview, memory size {size}", _overview(of_size)]
    for (name,), of_set in grouped(records, "set").items():
        parts += [f"## {name}", *_tables_of_set(of_set)]
    return "\n\n".join(parts) + "\n"


def differences(others: Sequence[Record]) -> list[Column]:
    """Return columns of differences to the records of another condition, question by question."""
    return [
        difference("found, points", "found", others, SAME, form="+.0f", scale=100),
        difference("right, points", "right", others, SAME, form="+.0f", scale=100),
        difference("preferred, points", "preferred", others, SAME, form="+.0f", scale=100),
        difference("nats", "log_prob", others, SAME, form="+.2f"),
    ]


def draw(header: Header, items: Items, folder: Path) -> list[Path]:
    """Draw the overview, a panel for each size: `comparison.png`."""
    sizes = grouped(items.values(), "size")
    widest = max(len(grouped(records, "set")) for records in sizes.values())
    tallest = max(len(grouped(records, "condition")) for records in sizes.values())
    figure, axes = panels(1, width=3 + 0.8 * widest, height=1.6 + 0.35 * tallest, rows=len(sizes))
    for panel, ((size,), records) in zip(axes, sizes.items(), strict=True):
        shares = _shares(records)
        ticks = [f"{one}\n({_counted(records, one)})" for one in _names(records, "set")]
        heat_map(panel, list(shares.values()), list(shares), ticks)
        name = Path(header["settings"]["model"]).name
        panel.set_title(f"{name}, memory size {size}: % of the questions")
    return [save(figure, folder / "comparison.png")]


def _tables_of_set(records: Sequence[Record]) -> list[str]:
    keys = ("size", "condition")
    columns = [
        COUNT,
        interval("found, %", "found", ".0f", 100),
        interval("first document, %", "first_document", ".0f", 100),
        interval("right, %", "right", ".0f", 100),
        interval("preferred, %", "preferred", ".0f", 100),
        interval("nats", "log_prob", "+.2f"),
        average("cited, %", "is_cited", ".0f", 100),
        interval("told, %", _told, ".0f", 100),
        interval("told without document, %", "told_without_document", ".0f", 100),
        average("tokens", "recalled", ".0f"),
        average("bytes a token", "bytes_per_token", ",.0f"),
        average("s routing", "routing_seconds", ".2f"),
        average("s first token", "first_token_seconds", ".2f"),
    ]
    parts = [records_table(grouped(records, *keys), keys, _known(columns, records))]
    others = [record for record in records if record["condition"] == BASELINE]
    compared = [record for record in records if record["condition"] != BASELINE]
    if others and compared:
        columns = differences(others)
        groups = grouped(compared, *keys)
        parts += [
            f"Less {BASELINE}, question by question:",
            records_table(groups, keys, _known(columns, compared)),
        ]
    return parts


def _known(columns: Sequence[Column], records: Sequence[Record]) -> list[Column]:
    """Return the columns that say something of any of the groups."""
    groups = grouped(records, "size", "condition").values()
    return [column for column in columns if any(column.cell(group) for group in groups)]


def _overview(records: Sequence[Record]) -> str:
    """Return a table of percentages: a row a condition, a column a set."""
    sets = _names(records, "set")
    head = ["condition", *(f"{one}: {_counted(records, one)}, %" for one in sets)]
    rows = [
        [condition, *("" if share is None else f"{share:.0f}" for share in shares)]
        for condition, shares in _shares(records).items()
    ]
    return table(head, rows)


def _shares(records: Sequence[Record]) -> dict[str, list[float | None]]:
    """Return condition -> what is counted of each set, in percent; None where it was not asked."""
    sets, groups = _names(records, "set"), grouped(records, "condition", "set")

    def share(condition: str, name: str) -> float | None:
        counted = _counted(records, name)
        measure = _told if counted == "told" else counted
        known = values(groups.get((condition, name), []), measure)
        return 100 * sum(known) / len(known) if known else None

    return {
        condition: [share(condition, name) for name in sets]
        for condition in _names(records, "condition")
    }


def _counted(records: Sequence[Record], name: str) -> str:
    """Return what is counted of a set: right answers, evidence found, or that nothing answers."""
    of_set = [record for record in records if record["set"] == name]
    for measure in ("right", "found"):
        if values(of_set, measure):
            return measure
    return "told"


def _names(records: Sequence[Record], key: str) -> list[str]:
    return [name for (name,) in grouped(records, key)]


def _told(record: Record) -> bool | None:
    return None if record["is_relevant"] is None else not record["is_relevant"]
