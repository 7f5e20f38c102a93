"""The perplexity experiment's tables and plot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from emt.errors import ConfigError
from experiments.perplexity.settings import FULL, WINDOW
from experiments.plots import curve, panels, save
from experiments.results import Header, Items
from experiments.statistics import Estimate, mean_interval
from experiments.tables import (
    COUNT,
    Column,
    Record,
    grouped,
    interval,
    origin,
    records_table,
    shown,
    values,
)

_ENOUGH = 10  # texts for an interval


def summary(header: Header, items: Items) -> str:
    """Return the results in Markdown."""
    settings, by_length = header["settings"], _by_length(items)
    conditions = conditions_of(items)
    parts = [
        "# Perplexity over length",
        origin(header, "model", "data", "memory"),
        f"The last {settings['scored']:,} tokens of each length are scored, from a local window of "
        f"{settings['window']:,} tokens. `{WINDOW}`: from the local window alone (truncation). "
        f"`memory`: with all tokens before it as memories. `{FULL}`: from the whole text in the "
        "prompt.",
        "Token-weighted perplexity, with 95 % bootstrap intervals over texts. Texts differ from "
        "length to length, so compare columns, not rows.",
        records_table(by_length, ["tokens"], [COUNT, *map(_perplexity, conditions)]),
        f"Nats a token above `{WINDOW}` on the same texts (below 0: better than truncation):",
        records_table(
            {length: records for length, records in by_length.items() if records[0]["older"]},
            ["tokens"],
            [
                interval(name, partial(_above_window, name), "+.4f")
                for name in conditions
                if name != WINDOW
            ],
        ),
    ]
    few = [f"{length:,}" for (length,), records in by_length.items() if len(records) < _ENOUGH]
    if few:
        parts.append(f"Fewer than {_ENOUGH} texts at {', '.join(few)} tokens: too few to trust.")
    return "\n\n".join([*parts, *_left_out(items)]) + "\n"


def conditions_of(items: Items) -> list[str]:
    """Return the names of the measured conditions, `full` last."""
    names = dict.fromkeys(name for record in items.values() for name in record["nats"])
    return sorted(names, key=lambda name: name == FULL)


def draw(header: Header, items: Items, folder: Path) -> list[Path]:
    """Draw perplexity over length, and paired differences to the window: `perplexity.png`.

    Raises:
        ConfigError: nothing was scored.
    """
    settings, by_length = header["settings"], _by_length(items)
    if not by_length:
        raise ConfigError("there is nothing to draw: no text was long enough.")
    figure, (perplexities, gains) = panels(2, width=5.5, height=4.5)
    lengths = [length for (length,) in by_length]
    for name in conditions_of(items):
        for axes, measure, scale in (
            (perplexities, _nats, math.exp),
            (gains, _above_window, float),
        ):
            points = {
                length: estimate
                for (length,), records in by_length.items()
                if (estimate := mean_interval(values(records, partial(measure, name)))).count
            }
            curve(axes, points, name, scale)
    perplexities.set_ylabel(f"perplexity of the last {settings['scored']:,} tokens")
    gains.set_ylabel(f"nats a token above {WINDOW}, same texts")
    for axes in (perplexities, gains):
        axes.axvline(settings["window"], color="grey", linestyle=":", label="local window")
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.set_xlabel("tokens of text")
    perplexities.legend()
    return [save(figure, folder / "perplexity.png")]


def _perplexity(condition: str) -> Column:
    def cell(records: Sequence[Record]) -> str:
        nats = mean_interval(values(records, partial(_nats, condition)))
        parts = (math.exp(part) for part in (nats.mean, nats.low, nats.high))
        return shown(Estimate(*parts, nats.count), ".2f")

    return Column(condition, cell)


def _by_length(items: Items) -> dict[tuple[int], list[Record]]:
    """Return the records with a score by length, ascending."""
    groups = grouped((record for record in items.values() if record["nats"]), "length")
    return dict(sorted(groups.items()))


def _nats(condition: str, record: Record) -> float | None:
    """Return nats a token; all texts score as many, so means over texts are over tokens."""
    nats = record["nats"].get(condition)
    return None if nats is None else nats / record["scored"]


def _above_window(condition: str, record: Record) -> float | None:
    nats, local = _nats(condition, record), _nats(WINDOW, record)
    return None if nats is None or local is None else nats - local


def _left_out(items: Items) -> list[str]:
    """Return what was left out and why, as a list in Markdown, if anything was."""
    lines = []
    for (length,), records in sorted(grouped(items.values(), "length").items()):
        short = sum("left_out" in record for record in records)
        if short:
            lines.append(f"* {length:,} tokens: {short} of {len(records)} texts, which are shorter")
        for reason in sorted({r["without_full"] for r in records if "without_full" in r}):
            lines.append(f"* {length:,} tokens: `{FULL}`, because {reason}")
    return ["Left out:", "\n".join(lines)] if lines else []
