"""The perplexity experiment's table and picture, from its results."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from emt.errors import ConfigError
from experiments.drawing import figure
from experiments.perplexity.settings import FULL, WINDOW
from experiments.statistics import Estimate, mean_interval, paired_difference

Items = Mapping[str, Mapping[str, Any]]
Curves = dict[str, dict[int, Estimate]]

_ENOUGH = 10


def nats_per_token(items: Items) -> Curves:
    """Return condition -> length -> nats a token, over the texts that have both.

    All texts score equally many tokens, so the mean over texts is the mean over tokens.
    """
    return {
        condition: {
            length: mean_interval(
                [record["nats"][condition] / record["scored"] for record in found]
            )
            for length in _lengths(items)
            if (found := _with(items, length, condition))
        }
        for condition in _conditions(items)
    }


def differences(items: Items, baseline: str = WINDOW) -> Curves:
    """Return condition -> length -> nats a token above `baseline`, paired by text.

    Lengths that the window holds are left out: there, all conditions are one.
    """
    return {
        condition: {
            length: paired_difference(_nats(found, condition), _nats(found, baseline))
            for length in _lengths(items)
            if (found := _with(items, length, condition, baseline)) and found[0]["older"]
        }
        for condition in _conditions(items)
        if condition != baseline
    }


def summary(header: Mapping[str, Any], items: Items) -> str:
    """Return the results in Markdown."""
    settings, curves, gains = header["settings"], nats_per_token(items), differences(items)
    lines = [
        "# Perplexity over length",
        "",
        f"{settings['model']}; texts of `{Path(settings['data']).name}`; the last "
        f"{settings['scored']:,} tokens of each length are scored, from a local window of "
        f"{settings['window']:,} tokens. Token-weighted perplexity, 95 % bootstrap intervals over "
        "texts. Texts differ from length to length, so compare columns, not rows.",
        "",
        f"`{WINDOW}`: from the local window alone (truncation). `memory`: with all tokens before "
        f"it as memories. `{FULL}`: from the whole text in the prompt.",
        "",
        f"Memory settings: {_named(settings['memory']) or 'as published'}. {_origin(header)}",
        "",
        "| tokens | texts | " + " | ".join(curves) + " |",
        "|---:|---:|" + "---:|" * len(curves),
    ]
    for length in _lengths(items):
        cells = [_perplexity(curve.get(length)) for curve in curves.values()]
        count = len(_with(items, length, WINDOW))
        lines.append(f"| {length:,} | {count} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"Nats a token above `{WINDOW}` on the same texts (below 0: better than truncation):",
        "",
        "| tokens | " + " | ".join(gains) + " |",
        "|---:|" + "---:|" * len(gains),
    ]
    for length in [n for n in _lengths(items) if any(n in curve for curve in gains.values())]:
        cells = [_difference(curve.get(length)) for curve in gains.values()]
        lines.append(f"| {length:,} | " + " | ".join(cells) + " |")
    few = [n for n in _lengths(items) if len(_with(items, n, WINDOW)) < _ENOUGH]
    if few:
        lines += [
            "",
            f"Fewer than {_ENOUGH} texts at {_numbers(few)} tokens: too few to trust an "
            "interval over texts.",
        ]
    missing = _missing(items)
    return "\n".join([*lines, "", *(["Left out:", "", *missing, ""] if missing else [])])


def draw(header: Mapping[str, Any], items: Items, folder: Path | str) -> list[Path]:
    """Draw perplexity over length, and paired differences with intervals: `perplexity.png`.

    Raises:
        ConfigError: matplotlib is not installed, or there is nothing to draw.
    """
    if not any(record["nats"] for record in items.values()):
        raise ConfigError("there are no results to draw yet. Run the experiment first.")
    settings, lengths = header["settings"], _lengths(items)
    drawing = figure(figsize=(11, 4.5), layout="constrained")
    perplexities, gains = drawing.subplots(1, 2)
    curves = nats_per_token(items)
    colours = {name: f"C{number}" for number, name in enumerate(curves)}
    for name, curve in curves.items():
        _draw(perplexities, name, colours[name], curve, math.exp)
    for name, curve in differences(items).items():
        _draw(gains, name, colours[name], curve, lambda nats: nats)
    gains.axhline(0, color=colours[WINDOW], label=WINDOW)
    perplexities.set_ylabel(f"perplexity of the last {settings['scored']:,} tokens")
    gains.set_ylabel(f"nats a token above {WINDOW}, same texts")
    for axes in (perplexities, gains):
        axes.axvline(settings["window"], color="grey", linestyle=":", label="local window")
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.set_xlabel("tokens of text")
    perplexities.legend()
    path = Path(folder) / "perplexity.png"
    drawing.savefig(path, dpi=150)
    return [path]


def _draw(
    axes: Any,
    name: str,
    colour: str,
    curve: Mapping[int, Estimate],
    scale: Callable[[float], float],
) -> None:
    middle, low, high = (
        [scale(getattr(estimate, part)) for estimate in curve.values()]
        for part in ("mean", "low", "high")
    )
    axes.plot(list(curve), middle, marker="o", color=colour, label=name)
    axes.fill_between(list(curve), low, high, color=colour, alpha=0.12)


def _lengths(items: Items) -> list[int]:
    return sorted({record["length"] for record in items.values()})


def _conditions(items: Items) -> list[str]:
    names = dict.fromkeys(name for record in items.values() for name in record["nats"])
    return [name for name in names if name != FULL] + [FULL] * (FULL in names)


def _with(items: Items, length: int, *conditions: str) -> list[Mapping[str, Any]]:
    """Return the records of a length that have all conditions."""
    return [
        record
        for record in items.values()
        if record["length"] == length and all(name in record["nats"] for name in conditions)
    ]


def _nats(records: list[Mapping[str, Any]], condition: str) -> list[float]:
    return [record["nats"][condition] / record["scored"] for record in records]


def _missing(items: Items) -> list[str]:
    lines = []
    for length in _lengths(items):
        records = [record for record in items.values() if record["length"] == length]
        short = sum("left_out" in record for record in records)
        if short:
            lines.append(f"* {length:,} tokens: {short} of {len(records)} texts, which are shorter")
        for why in sorted({r["without_full"] for r in records if "without_full" in r}):
            lines.append(f"* {length:,} tokens: `{FULL}`, because {why}")
    return lines


def _named(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings.items())


def _numbers(values: list[int]) -> str:
    return ", ".join(f"{value:,}" for value in values)


def _origin(header: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in header["versions"].items())
    return f"Measured on {header['machine']}, revision {header['revision']}; {versions}."


def _perplexity(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    mean, low, high = (math.exp(part) for part in (estimate.mean, estimate.low, estimate.high))
    return f"{mean:.2f} ({low:.2f} to {high:.2f})"


def _difference(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    return f"{estimate.mean:+.4f} ({estimate.low:+.4f} to {estimate.high:+.4f})"
