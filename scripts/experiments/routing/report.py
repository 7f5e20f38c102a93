"""What the routing experiment found, as a table and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.drawing import figure
from experiments.statistics import Estimate, mean_interval, paired_difference

Header = Mapping[str, Any]
Items = Mapping[str, Mapping[str, Any]]


def summary(header: Header, items: Items) -> str:
    """Return tables, in Markdown."""
    settings = header["settings"]
    seed = settings["seed"]
    lines = [
        "# Routing",
        "",
        f"{settings['questions']} questions ({settings['left_out']} of the file are about none of "
        f"the store's documents), {settings['model']}; passages of {settings['passage_rows']} rows "
        f"together, at most {settings['max_passages']}. {header.get('machine', '')}",
        "",
        "| rows | routing | right document first | answer in the first passage | answer in a "
        "passage | nothing relevant | rows recalled | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    every = items
    items = {key: one for key, one in items.items() if one["any"] is not None}
    for (rows, routing), found in _grouped(items).items():
        shares = [
            _percent(mean_interval([float(one[name]) for one in found], seed=seed))
            for name in ("document", "first", "any")
        ]
        refused = sum(not one["is_relevant"] for one in found) / len(found)
        recalled = sum(one["recalled"] for one in found) / len(found)
        seconds = sorted(one["seconds"] for one in found)[len(found) // 2]
        lines.append(
            f"| {rows:,} | {routing} | {' | '.join(shares)} | {refused:.0%} | {recalled:.0f} | "
            f"{seconds:.3f} |"
        )
    unrelated = _grouped({key: one for key, one in every.items() if one["any"] is None})
    if unrelated:
        count = max(map(len, unrelated.values()))
        lines += [
            "",
            f"{count} prompts about nothing in the store (`{settings['unrelated']}`), told so:",
            "",
            "| rows | routing | nothing relevant |",
            "|---|---|---|",
        ]
        for (rows, routing), found in unrelated.items():
            told = mean_interval([float(not one["is_relevant"]) for one in found], seed=seed)
            lines.append(f"| {rows:,} | {routing} | {_percent(told)} |")
    differences = _differences(items, seed)
    if differences:
        lines += [
            "",
            "| rows | difference of | answer in a passage, points |",
            "|---|---|---|",
            *differences,
        ]
    return "\n".join(lines) + "\n"


def draw(header: Header, items: Items, folder: Path) -> Sequence[Path]:
    """Draw the share of answers found over rows; returns the picture's path, if any was drawn."""
    groups = _grouped({key: one for key, one in items.items() if one["any"] is not None})
    picture = figure(figsize=(5, 3.2), layout="constrained")
    axes = picture.subplots()
    for routing in dict.fromkeys(routing for _, routing in groups):
        points = [
            (rows, mean_interval([float(one["any"]) for one in found]).mean)
            for (rows, kind), found in groups.items()
            if kind == routing
        ]
        axes.plot(*zip(*points, strict=True), marker="o", label=routing)
    axes.set_xscale("log")
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("rows")
    axes.set_ylabel("answer in a passage")
    axes.legend()
    path = folder / "routing.png"
    picture.savefig(path, dpi=120)
    return [path]


def _grouped(items: Items) -> dict[tuple[int, str], list[Mapping[str, Any]]]:
    groups: dict[tuple[int, str], list[Mapping[str, Any]]] = {}
    for one in items.values():
        groups.setdefault((one["rows"], one["routing"]), []).append(one)
    return groups


def _differences(items: Items, seed: int) -> list[str]:
    """Return lines that compare the other routings with words, question by question."""
    by_question: dict[tuple[int, str], dict[str, bool]] = {}
    for key, one in items.items():
        question = key.split("/", 2)[2]
        by_question.setdefault((one["rows"], question), {})[one["routing"]] = one["any"]
    lines = []
    for rows in dict.fromkeys(rows for rows, _ in by_question):
        for routing in ("heads", "both"):
            pairs = [
                (float(found[routing]), float(found["words"]))
                for (size, _), found in by_question.items()
                if size == rows and routing in found and "words" in found
            ]
            if pairs:
                mine, words = zip(*pairs, strict=True)
                found = paired_difference(mine, words, seed=seed)
                text = (
                    f"{100 * found.mean:+.0f} ({100 * found.low:+.0f} to {100 * found.high:+.0f})"
                )
                lines.append(f"| {rows:,} | {routing} and words | {text} |")
    return lines


def _percent(found: Estimate) -> str:
    return f"{found.mean:.0%} ({found.low:.0%} to {found.high:.0%})"
