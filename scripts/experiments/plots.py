"""Plots of estimates, drawn into files without a window."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.statistics import Estimate


def panels(
    count: int, *, width: float = 5.0, height: float = 3.8, rows: int = 1
) -> tuple[Any, list[Any]]:
    """Return a figure and its axes: `count` panels in each of `rows` rows."""
    figure = Figure(figsize=(width * count, height * rows), layout="constrained")
    return figure, list(figure.subplots(rows, count, squeeze=False).flat)


def save(figure: Any, path: Path) -> Path:
    """Write a figure, and return where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


def curve(
    axes: Any,
    points: Mapping[float, Estimate],
    label: str,
    scale: Callable[[float], float] = float,
    **style: Any,
) -> None:
    """Draw means over x with a line, and their intervals with a band."""
    x = sorted(points)
    mean, low, high = (
        [scale(getattr(points[at], part)) for at in x] for part in ("mean", "low", "high")
    )
    (line,) = axes.plot(x, mean, marker="o", label=label, **style)
    axes.fill_between(x, low, high, alpha=0.12, color=line.get_color())


def bars(axes: Any, series: Mapping[str, Sequence[Estimate]], ticks: Sequence[str]) -> None:
    """Draw a group of bars at each tick, one bar for each of the series, with intervals."""
    width = 0.8 / len(series)
    for number, (label, estimates) in enumerate(series.items()):
        x = np.arange(len(ticks)) + (number - (len(series) - 1) / 2) * width
        mean, low, high = (
            np.array([getattr(estimate, part) for estimate in estimates])
            for part in ("mean", "low", "high")
        )
        axes.bar(x, mean, width, label=label)
        axes.errorbar(
            x, mean, (mean - low, high - mean), fmt="none", ecolor="black", elinewidth=0.8
        )
    axes.set_xticks(range(len(ticks)), ticks)
    axes.axhline(0, color="black", linewidth=0.5)


def heat_map(
    axes: Any, rows: Sequence[Sequence[float | None]], names: Sequence[str], ticks: Sequence[str]
) -> None:
    """Draw percentages as coloured cells with their numbers; None leaves a cell empty."""
    shares = np.array(rows, dtype=np.float64)  # None becomes NaN
    axes.imshow(shares, cmap="YlGn", vmin=0, vmax=100, aspect="auto")
    for (at, tick), share in np.ndenumerate(shares):
        if not np.isnan(share):
            color = "white" if share > 70 else "black"
            axes.text(tick, at, f"{share:.0f}", ha="center", va="center", color=color)
    axes.set_yticks(range(len(names)), names)
    axes.set_xticks(range(len(ticks)), ticks, rotation=30, ha="right")
