"""The timing experiment's tables and picture, from its results."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.drawing import figure
from experiments.timing.break_even import Cost
from experiments.timing.settings import CACHED, PROMPT

Items = Mapping[str, Mapping[str, Any]]


def costs(items: Items) -> dict[int, dict[str, Cost]]:
    """Return document length -> condition -> medians over rounds; without what was left out."""
    found: dict[int, dict[str, list[Mapping[str, Any]]]] = {}
    for record in items.values():
        if "queries" in record:
            of_length = found.setdefault(record["length"], {})
            of_length.setdefault(record["condition"], []).append(record)
    return {
        length: {
            name: Cost(
                statistics.median(record["once"] for record in records),
                statistics.median(statistics.mean(record["queries"]) for record in records),
            )
            for name, records in of_length.items()
        }
        for length, of_length in sorted(found.items())
    }


def summary(header: Mapping[str, Any], items: Items) -> str:
    """Return the results in Markdown."""
    settings = header["settings"]
    versions = ", ".join(f"{name} {number}" for name, number in header["versions"].items())
    threads = sorted({record["threads"] for record in items.values() if "threads" in record})
    memory = ", ".join(f"{key} {value}" for key, value in settings["memory"].items())
    lines = [
        "# Time a query over the number of queries",
        "",
        f"{settings['model']}; a document of `{Path(settings['data']).name}`, queries of "
        f"{settings['query_tokens']} tokens, answers of {settings['new_tokens']} greedy tokens. "
        f"Seconds; medians of {settings['rounds']} rounds, in which every condition has its turn "
        f"with {settings['measured']} queries. *once*: computing the cache, or attaching, writing "
        "and indexing the memory. The mean time of n queries is once / n + each.",
        "",
        f"Memory settings: {memory or 'as published'}. Measured on {header['machine']}, "
        f"{'/'.join(map(str, threads))} torch threads, revision {header['revision']}; {versions}.",
    ]
    for length, found in costs(items).items():
        lines += ["", f"## A document of {length:,} tokens", "", *_table(settings, found)]
    missing = {
        f"* {record['length']:,} tokens: `{record['condition']}`, because {record['left_out']}"
        for record in items.values()
        if "left_out" in record
    }
    return "\n".join([*lines, "", *(["Left out:", "", *sorted(missing), ""] if missing else [])])


def draw(header: Mapping[str, Any], items: Items, folder: Path | str) -> list[Path]:
    """Draw the mean time a query over the number of queries, a panel a length: `timing.png`."""
    counts, found = header["settings"]["queries"], costs(items)
    drawing = figure(figsize=(4.5 * max(len(found), 1), 4), layout="constrained")
    for number, (length, conditions) in enumerate(found.items(), start=1):
        axes = drawing.add_subplot(1, len(found), number)
        for name, cost in conditions.items():
            axes.plot(counts, [cost.mean(n) for n in counts], marker="o", label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(counts, [str(n) for n in counts])
        axes.set_title(f"{length:,} tokens")
        axes.set_xlabel("queries on the document")
        axes.set_ylabel("mean seconds a query")
        axes.legend()
    path = Path(folder) / "timing.png"
    drawing.savefig(path, dpi=150)
    return [path]


def _table(settings: Mapping[str, Any], found: Mapping[str, Cost]) -> list[str]:
    """Return a line for each condition: cost, mean times, and from where on it is cheaper."""
    counts = settings["queries"]
    others = [name for name in (PROMPT, CACHED) if name in found]
    titles = [f"n = {n}" for n in counts] + [f"break-even with {name}" for name in others]
    lines = [
        "| | once | each | " + " | ".join(titles) + " |",
        "|---|---:|---:|" + "---:|" * len(titles),
    ]
    for name, cost in found.items():
        means = [f"{cost.mean(n):.3f}" for n in counts]
        ends = [
            "" if name == other else _queries(cost.break_even(found[other])) for other in others
        ]
        cells = [f"{cost.once:.2f}", f"{cost.each:.3f}", *means, *ends]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _queries(count: int | None) -> str:
    if count is None:
        return "never"
    return "1 query" if count == 1 else f"{count:,} queries"
