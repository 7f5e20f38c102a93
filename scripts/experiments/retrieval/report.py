"""The retrieval experiment's tables and plots."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.plots import bars, panels, save
from experiments.results import Header, Items
from experiments.retrieval.settings import STANDARD
from experiments.statistics import mean_interval
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

SAME = ("split", "id")  # by which answers to one item are found under two conditions
ALL = "all"
BINS = {"1": (1, 1), "2": (2, 2), "3": (3, 3), "4-6": (4, 6), "7+": (7, math.inf)}
"""How often a fact appears in its document: name -> from, to."""

_COLUMNS = [
    COUNT,
    interval("right, %", "right", scale=100),
    interval("preferred, %", "preferred", scale=100),
    interval("log-prob", "log_prob", "+.2f"),
    interval("gain", "gain", "+.2f"),
    Column("cut", lambda records: _cut(records)),
    Column("has answer", lambda records: _share(records, "has_answer")),
    average("prompt tokens", "num_prompt_tokens", ".0f"),
    average("s / answer", "seconds", ".2f"),
    average("s / memory", "memory_seconds"),
]
_LEGEND = (
    "*Right*: the published score, the answer is in the greedy tokens. *Preferred*: the answer is "
    "likelier than the original one, by mean log-probability per token. *Log-prob*: of the answer, "
    "nats per token; *gain*: over closed book. *Cut*: prompts that lost text for want of "
    "positions; in brackets, how many of these still had the answer. *Has answer*: the text in the "
    f"prompt has it. {INTERVALS}"
)


def with_gains(items: Items) -> list[Record]:
    """Return records with `gain`: the answer's log-probability above closed book's; or None."""
    closed = {
        (record["split"], record["id"]): record["log_prob"]
        for record in items.values()
        if record["condition"] == "closed_book"
    }
    records = []
    for record in items.values():
        before, now = closed.get((record["split"], record["id"])), record["log_prob"]
        gain = now - before if None not in (before, now) else None
        records.append({**record, "gain": gain})
    return records


def summary(header: Header, items: Items) -> str:
    """Return the results in Markdown."""
    settings, records = header["settings"], with_gains(items)
    baseline = settings["baseline"]
    others = [record for record in records if record["condition"] == baseline]
    compared = [record for record in records if record["condition"] != baseline]
    parts = [
        "# Counterfactual retrieval",
        _origin(header),
        "## Results",
        _LEGEND,
        _by_condition(records, _COLUMNS),
        f"## Against {baseline}",
        "Mean differences over the same items.",
        _by_condition(compared, [COUNT, *differences(others)]),
    ]
    parts += [
        "## By how often the document has the answer",
        "Right, % (preferred, %), and the number of items, over all splits.",
        _occurrences_table(records),
    ]
    return "\n\n".join(parts) + "\n"


def differences(others: Sequence[Record]) -> list[Column]:
    """Return columns of differences to the records of another condition, item by item."""
    return [
        difference("right, points", "right", others, SAME, form="+.1f", scale=100),
        difference("preferred, points", "preferred", others, SAME, form="+.1f", scale=100),
        difference("log-prob", "log_prob", others, SAME, form="+.2f"),
    ]


def draw(header: Header, items: Items, folder: Path) -> list[Path]:
    """Draw bars by split: `retrieval.png`."""
    records = with_gains(items)
    scaled = {"right, %": ("right", 100), "preferred, %": ("preferred", 100), "gain": ("gain", 1)}
    measures = {label: shape for label, shape in scaled.items() if values(records, shape[0])}
    splits = list(dict.fromkeys(record["split"] for record in records))
    groups = grouped(records, "split", "condition")
    figure, axes = panels(1, width=9, height=2.8, rows=len(measures))
    for panel, (label, (name, scale)) in zip(axes, measures.items(), strict=True):
        series = {
            condition: [
                mean_interval(scale * np.array(values(groups.get((split, condition), []), name)))
                for split in splits
            ]
            for (condition,) in grouped(records, "condition")
        }
        bars(panel, series, splits)
        panel.set_ylabel(label)
    axes[0].set_title(f"Counterfactual retrieval, {header['settings']['model']}")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return [save(figure, folder / "retrieval.png")]


def _origin(header: Header) -> str:
    settings = header["settings"]
    lines = [origin(header, "model", "items", "items_sha256", "memory")]
    given = settings["conditions"]  # names alone in older files
    lines += [
        f"* {name}: {json.dumps(values)}"
        for name, values in (given.items() if isinstance(given, dict) else ())
        if values and values != {"memory": {}, **STANDARD.get(name, {})}
    ]
    return "\n".join(lines)


def _by_condition(records: Sequence[Record], columns: Sequence[Column]) -> str:
    """Return a table by split and condition, of several splits also over all of them."""
    by_condition = grouped(records, "condition")
    splits = dict.fromkeys(record["split"] for record in records)
    of_splits = grouped(records, "split", "condition")
    groups = {
        (split, *condition): of_splits[split, *condition]
        for split in splits
        for condition in by_condition
        if (split, *condition) in of_splits
    }
    if len(splits) > 1:
        groups |= {(ALL, *condition): of_all for condition, of_all in by_condition.items()}
    return records_table(groups, ["split", "condition"], columns)


def _occurrences_table(records: Sequence[Record]) -> str:
    bins = {
        name: inside
        for name, (low, high) in BINS.items()
        if (inside := [record for record in records if low <= record["occurrences"] <= high])
    }

    def cell(inside: Sequence[Record]) -> str:
        right, preferred = (values(inside, name) for name in ("right", "preferred"))
        shown = f" ({100 * np.mean(preferred):.0f})" if preferred else ""
        return f"{100 * np.mean(right):.0f}{shown}, {len(inside)}" if inside else ""

    rows = [
        [
            condition,
            *(cell([r for r in inside if r["condition"] == condition]) for inside in bins.values()),
        ]
        for (condition,) in grouped(records, "condition")
    ]
    return table(["condition", *(f"{name} times" for name in bins)], rows)


def _share(records: Sequence[Record], name: str) -> str:
    """Return how many of the records that have a value have a true one, as "k of n"."""
    known = values(records, name)
    return f"{sum(known):.0f} of {len(known)}" if known else ""


def _cut(records: Sequence[Record]) -> str:
    cut = [record for record in records if record["truncated"]]
    return f"{len(cut)} ({sum(bool(record['has_answer']) for record in cut)})" if cut else "0"
