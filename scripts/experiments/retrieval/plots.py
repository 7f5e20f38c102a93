"""The retrieval experiment in pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from emt.errors import ConfigError
from experiments.drawing import figure
from experiments.retrieval.report import BINS, Record, bin_of, names, of, values, with_gains
from experiments.statistics import mean_interval

_MEASURES = (("right", "right, %", 100), ("preferred", "preferred, %", 100), ("gain", "gain", 1))


def draw(header: Mapping[str, Any], items: Mapping[str, Record], folder: Path | str) -> list[Path]:
    """Draw bars by split, and heat maps of split by how often the fact appears.

    Args:
        header: a results file's first line.
        items: its records.
        folder: gets `retrieval.png`, and `occurrences.png`.

    Returns:
        The files.

    Raises:
        ConfigError: matplotlib is not installed, or there is nothing to draw.
    """
    records = with_gains(items.values())
    if not records:
        raise ConfigError("there are no results to draw yet. Run the experiment first.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    title = f"Counterfactual retrieval, {header['settings']['model']}"
    seed = header["settings"].get("seed", 0)
    return [
        _bars(records, folder / "retrieval.png", title, seed),
        _heat_maps(records, folder / "occurrences.png", title),
    ]


def _bars(records: Sequence[Record], path: Path, title: str, seed: int) -> Path:
    splits, conditions = names(records, "split"), names(records, "condition")
    measures = [measure for measure in _MEASURES if values(records, measure[0])]
    drawing = figure(figsize=(9, 1 + 2.6 * len(measures)), layout="constrained")
    width = 0.8 / len(conditions)
    panels = drawing.subplots(len(measures), 1, squeeze=False)[:, 0]
    for axes, (name, label, scale) in zip(panels, measures, strict=True):
        for at, condition in enumerate(conditions):
            found = [
                mean_interval(values(of(records, condition, split), name), seed=seed)
                for split in splits
            ]
            means = np.array([scale * one.mean for one in found])
            ends = np.array([[scale * one.low, scale * one.high] for one in found]).T
            places = np.arange(len(splits)) + (at - (len(conditions) - 1) / 2) * width
            axes.bar(places, means, width, label=condition, color=f"C{at}")
            axes.errorbar(
                places, means, np.abs(ends - means), fmt="none", ecolor="black", elinewidth=0.8
            )
        axes.set_xticks(np.arange(len(splits)), splits)
        axes.set_ylabel(label)
        axes.axhline(0, color="black", linewidth=0.5)
    panels[0].set_title(title)
    drawing.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    drawing.savefig(path, dpi=150)
    return path


def cells(records: Sequence[Record], condition: str, name: str) -> np.ndarray[Any, Any]:
    """Return a value's mean (bins, splits) by how often the fact appears; NaN where none is."""
    splits = names(records, "split")
    found = np.full((len(BINS), len(splits)), np.nan)
    for row, (bin_name, *_) in enumerate(BINS):
        for column, split in enumerate(splits):
            chosen = [
                record
                for record in of(records, condition, split)
                if bin_of(record["occurrences"]) == bin_name
            ]
            found[row, column] = mean_interval(values(chosen, name)).mean
    return found


def _heat_maps(records: Sequence[Record], path: Path, title: str) -> Path:
    splits, conditions = names(records, "split"), names(records, "condition")
    measures = [measure for measure in _MEASURES[:2] if values(records, measure[0])]
    drawing = figure(
        figsize=(1.2 + 2.2 * len(conditions), 0.8 + 2.4 * len(measures)), layout="constrained"
    )
    panels = drawing.subplots(len(measures), len(conditions), squeeze=False, sharey=True)
    for axes_row, (name, label, scale) in zip(panels, measures, strict=True):
        for axes, condition in zip(axes_row, conditions, strict=True):
            shares = scale * cells(records, condition, name)
            image = axes.imshow(shares, vmin=0, vmax=100, aspect="auto", origin="lower")
            for (row, column), share in np.ndenumerate(shares):
                if not np.isnan(share):
                    color = "white" if share < 60 else "black"
                    axes.text(
                        column, row, f"{share:.0f}", ha="center", va="center", color=color, size=8
                    )
            axes.set_xticks(range(len(splits)), splits)
            axes.set_yticks(range(len(BINS)), [bin_name for bin_name, *_ in BINS])
            axes.set_title(condition, size=9)
        axes_row[0].set_ylabel("times in the document")
        drawing.colorbar(image, ax=axes_row[-1], label=label)
    drawing.suptitle(title, size=10)
    drawing.savefig(path, dpi=150)
    return path
