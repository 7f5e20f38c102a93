"""The timing experiment's tables and plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.plots import panels, save
from experiments.results import Header, Items
from experiments.tables import grouped, origin, table
from experiments.timing.cost import Cost
from experiments.timing.settings import CACHED, PROMPT


def costs(items: Items) -> dict[int, dict[str, Cost]]:
    """Return document length -> condition -> cost, without what was left out."""
    timed = [record for record in items.values() if "queries" in record]
    lengths: dict[int, dict[str, Cost]] = {}
    for (length, name), records in sorted(
        grouped(timed, "length", "condition").items(), key=lambda group: group[0][0]
    ):
        lengths.setdefault(length, {})[name] = Cost.of(records)
    return lengths


def summary(header: Header, items: Items) -> str:
    """Return the results in Markdown."""
    settings = header["settings"]
    threads = sorted({record["threads"] for record in items.values() if "threads" in record})
    parts = [
        "# Time a query over the number of queries",
        origin(header, "model", "data", "memory", "memories"),
        f"Queries of {settings['query_tokens']} tokens, answers of {settings['new_tokens']} greedy "
        f"tokens. Seconds; medians of {settings['rounds']} rounds, in which every condition has "
        f"its turn with {settings['measured']} queries, on {'/'.join(map(str, threads))} torch "
        "threads. *once*: computing the cache, or attaching, writing and indexing the memory. The "
        "mean time of n queries is once / n + each.",
    ]
    for length, by_condition in costs(items).items():
        parts += [f"## A document of {length:,} tokens", _table(settings["queries"], by_condition)]
    missing = {
        f"* {record['length']:,} tokens: `{record['condition']}`, because {record['left_out']}"
        for record in items.values()
        if "left_out" in record
    }
    parts += ["Left out:", "\n".join(sorted(missing))] if missing else []
    return "\n\n".join(parts) + "\n"


def draw(header: Header, items: Items, folder: Path) -> list[Path]:
    """Draw the mean time a query over the number of queries, a panel a length: `timing.png`."""
    counts, lengths = header["settings"]["queries"], costs(items)
    figure, axes = panels(max(len(lengths), 1), width=4.5, height=4)
    for panel, (length, by_condition) in zip(axes, lengths.items(), strict=False):
        for name, cost in by_condition.items():
            panel.plot(counts, [cost.mean(n) for n in counts], marker="o", label=name)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(counts, [str(n) for n in counts])
        panel.set_title(f"{length:,} tokens")
        panel.set_xlabel("queries on the document")
        panel.set_ylabel("mean seconds a query")
        panel.legend()
    return [save(figure, folder / "timing.png")]


def _table(counts: Sequence[int], by_condition: Mapping[str, Cost]) -> str:
    """Return a row for each condition: cost, mean times, and from where on it is cheaper."""
    others = [name for name in (PROMPT, CACHED) if name in by_condition]
    rows = []
    for name, cost in by_condition.items():
        means = [f"{cost.mean(n):.3f}" for n in counts]
        ends = ["" if name == other else _ahead(cost, by_condition[other]) for other in others]
        rows.append([name, f"{cost.once:.2f}", f"{cost.each:.3f}", *means, *ends])
    titles = [f"n = {n}" for n in counts] + [f"break-even with {name}" for name in others]
    return table(["condition", "once", "each", *titles], rows)


def _ahead(cost: Cost, other: Cost) -> str:
    count = cost.break_even(other)
    if count is None:
        return "never"
    return "1 query" if count == 1 else f"{count:,} queries"
