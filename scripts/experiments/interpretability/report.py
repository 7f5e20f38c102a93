"""The interpretability experiment's tables and plots."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from experiments.plots import curve, panels, save
from experiments.results import Header, Items
from experiments.statistics import mean_interval, paired_difference
from experiments.tables import (
    INTERVALS,
    Record,
    average,
    grouped,
    interval,
    origin,
    records_table,
    shown,
    table,
    values,
)

_MAPS = {
    "memory": "all memories",
    "content": "attention sinks left out",
    "answer": "tokens of the answer",
}
_LEGEND = (
    "Each item has its document as the only memory. *Preferred*: the answer in the document is "
    "likelier than the original one. *Log-prob*: of the answer, nats a token. *Memories*: how many "
    "a query retrieves for one generated token, at each layer and head; what a redone step had "
    f"retrieved before counts, too. {INTERVALS}"
)


def preferred(record: Record) -> bool | None:
    """Tell whether the answer is likelier than the original one; None without one."""
    original = record["original_log_prob"]
    return None if original is None else record["log_prob"] > original


def memories_a_query(record: Record) -> float:
    """Return how many memories a query retrieved for one generated token, on average."""
    num_queries = len(record["token_ids"]) * np.size(record["mass"]["memory"])
    return float(record["num_retrieved"]) / num_queries if num_queries else 0.0


def summary(header: Header, items: Items) -> str:
    """Return the results in Markdown."""
    by_condition, settings = grouped(items.values(), "condition"), header["settings"]
    answers = [
        interval("right, %", "right", ".0f", 100),
        interval("preferred, %", preferred, ".0f", 100),
        interval("log-prob", "log_prob", ".2f"),
        average("memories", memories_a_query),
        average("steps redone, %", lambda r: r["num_redone"] / len(r["token_ids"]), ".0f", 100),
    ]
    citations = [
        interval("precision, %", "cited_answer", ".0f", 100),
        average("chance, %", "chance", scale=100),
        interval("above chance", lambda r: r["cited_answer"] - r["chance"], ".0f", 100),
    ]
    parts = [
        "# Interpretability",
        origin(header, "model", "items", "memory", "others"),
        "## Answers, and what they cost",
        _LEGEND,
        records_table(by_condition, ["condition"], answers),
        "## Citations",
        "Precision: how often the passage that is cited first has the answer in it. Chance: of a "
        "passage taken at random.",
        records_table(by_condition, ["condition"], citations),
        "## Stability over topk",
        _stability_table([by_condition.get((name,), []) for name in _topk_names(header)]),
    ]
    if with_maps := _with_maps(header, items):
        parts += ["## Heads that attend to the answer", _heads(settings["heat_map"], with_maps)]
    return "\n\n".join(parts) + "\n"


def draw(header: Header, items: Items, folder: Path) -> list[Path]:
    """Draw the heat maps of one condition, and what answers do over topk."""
    files = [_draw_stability(header, items, folder / "stability.png")]
    if with_maps := _with_maps(header, items):
        name = header["settings"]["heat_map"]
        files.append(_draw_maps(name, with_maps, folder / "attention_mass.png"))
    return files


def _stability_table(conditions: Sequence[Sequence[Record]]) -> str:
    """Compare the answers of each condition with those of the one before it."""
    rows = []
    for before, after in itertools.pairwise(filter(None, conditions)):
        partners = {record["item"]: record for record in after}
        pairs = [(one, partners[one["item"]]) for one in before if one["item"] in partners]
        if not pairs:
            continue
        same = [one["text"].casefold() == other["text"].casefold() for one, other in pairs]
        first = [_num_shared(one["token_ids"], other["token_ids"]) for one, other in pairs]
        change = paired_difference(
            [other["log_prob"] for _, other in pairs], [one["log_prob"] for one, _ in pairs]
        )
        cells = [shown(mean_interval(same), ".0f", 100), shown(mean_interval(first))]
        rows.append([before[0]["condition"], after[0]["condition"], *cells, shown(change, ".2f")])
    head = ["from", "to", "same text, %", "same first tokens", "change of the log-prob"]
    return table(head, rows)


def _num_shared(ids: Sequence[int], others: Sequence[int]) -> int:
    """Return the number of first tokens that two answers share."""
    pairs = zip(ids, others, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _heads(name: str, records: Sequence[Record]) -> str:
    """List the heads that attend most to the answer, of one condition."""
    mass, layers = _mean_map(records, "answer"), records[0]["layers"]
    best = np.argsort(-mass, axis=None, kind="stable")[:5]
    places = [divmod(int(at), mass.shape[1]) for at in best]
    rows = [[str(layers[row]), str(head), f"{mass[row, head]:.1%}"] for row, head in places]
    return (
        f"Share of the whole attention that memories of the answer's tokens get, {name}. "
        f"`attention_mass.png` shows all {mass.size} heads; their mean is {mass.mean():.2%}.\n\n"
        + table(["layer", "head", "share"], rows)
    )


def _mean_map(records: Sequence[Record], name: str) -> npt.NDArray[np.float64]:
    """Return a heat map, (layers, heads), as the mean over items."""
    return np.asarray(np.mean([record["mass"][name] for record in records], axis=0))


def _with_maps(header: Header, items: Items) -> list[Record]:
    """Return the records of the condition that is drawn, if memories were read."""
    name = header["settings"]["heat_map"]
    records = [record for record in items.values() if record["condition"] == name]
    return [record for record in records if np.size(record["mass"]["memory"])]


def _topk_names(header: Header) -> list[str]:
    return [f"topk {topk}" for topk in header["settings"]["topk"]]


def _draw_maps(name: str, records: Sequence[Record], path: Path) -> Path:
    layers = records[0]["layers"]
    figure, axes = panels(len(_MAPS), width=3.4, height=1.5 + 0.18 * len(layers))
    for panel, (kind, title) in zip(axes, _MAPS.items(), strict=True):
        image = panel.imshow(_mean_map(records, kind), aspect="auto", origin="lower", vmin=0)
        figure.colorbar(image, ax=panel)
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("query head")
        panel.set_yticks(range(len(layers)), layers, fontsize=7)
    axes[0].set_ylabel("layer")
    figure.suptitle(f"Share of attention that memories get, {name}, {len(records)} items")
    return save(figure, path)


def _draw_stability(header: Header, items: Items, path: Path) -> Path:
    """Draw three measures over the number of memories a query retrieves."""
    measures = {
        "preferred": preferred,
        "log-probability, nats a token": "log_prob",
        "first citation has the answer": "cited_answer",
    }
    by_topk = _topk_names(header)
    figure, axes = panels(len(measures), width=3.7, height=3.6)
    for panel, (label, measure) in zip(axes, measures.items(), strict=True):
        points = {}
        for (name,), records in grouped(items.values(), "condition").items():
            estimate = mean_interval(values(records, measure))
            memories = float(np.mean([memories_a_query(record) for record in records]))
            if name in by_topk:
                points[memories] = estimate
            else:
                ends = [[estimate.mean - estimate.low], [estimate.high - estimate.mean]]
                panel.errorbar([memories], [estimate.mean], ends, fmt="s", label=name, capsize=3)
        curve(panel, points, "topk", color="black")
        panel.set_xlabel("memories a query")
        panel.set_ylabel(label)
    axes[-1].legend(fontsize=8)
    return save(figure, path)
