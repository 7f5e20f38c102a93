"""The interpretability experiment's tables and pictures, from its results."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from emt.errors import ConfigError
from experiments.drawing import figure
from experiments.statistics import Estimate, mean_interval, paired_difference

Record = Mapping[str, Any]
Items = Mapping[str, Record]

_MAPS = {
    "memory": "all memories",
    "content": "attention sinks left out",
    "answer": "tokens of the answer",
}


def summary(header: Mapping[str, Any], items: Items) -> str:
    """Return the results in Markdown.

    Args:
        header: a results file's first line.
        items: its records.

    Raises:
        ConfigError: there are none yet.
    """
    by_condition, settings = _by_condition(items), header["settings"]
    num_items = len({record["item"] for record in items.values()})
    heads = _with_maps(by_condition.get(settings["heat_map"], []))
    lines = [
        "# Interpretability",
        "",
        f"{settings['model']}; {num_items} items of `{Path(settings['items']).name}`, each with "
        "its document as the only memory. Memory settings: "
        f"{_named(settings['memory']) or 'as published'}. 95 % bootstrap intervals over items.",
        "",
        f"Measured on {header['machine']}, revision {header['revision']}.",
        *_answers(by_condition, settings["seed"]),
        *_citations(by_condition, settings["seed"]),
        *_stability(by_condition, _topk_names(header), settings["seed"]),
        *(_heads(settings["heat_map"], heads) if heads else []),
    ]
    return "\n".join([*lines, ""])


def _answers(by_condition: Mapping[str, Sequence[Record]], seed: int) -> list[str]:
    lines = [
        "",
        "## Answers, and what they cost",
        "",
        "Memories: how many a query retrieves for one generated token, at each layer and head; "
        "what a redone step had retrieved before counts, too. Preferred: the answer in the "
        "document is likelier than the original one. Log-probability: of the answer, nats a token.",
        "",
        "| condition | right, % | preferred, % | log-probability | memories | steps redone, % | "
        "right, points a memory | preferred, points a memory |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, records in by_condition.items():
        right = mean_interval([100.0 * r["right"] for r in records], seed=seed)
        preferred = mean_interval(_values(records, _preferred), seed=seed)
        log_prob = mean_interval([r["log_prob"] for r in records], seed=seed)
        memories = float(np.mean([memories_a_query(r) for r in records]))
        redone = 100 * float(np.mean([r["num_redone"] / len(r["token_ids"]) for r in records]))
        cells = [_shown(right, 0), _shown(preferred, 0), _shown(log_prob, 2)]
        cells += [f"{memories:.1f}", f"{redone:.0f}"]
        for part in (right, preferred):
            cells.append(f"{part.mean / memories:.2f}" if memories and part.count else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _citations(by_condition: Mapping[str, Sequence[Record]], seed: int) -> list[str]:
    lines = [
        "",
        "## Citations",
        "",
        "Precision: how often the passage that is cited first has the answer in it. Chance: of a "
        "passage taken at random.",
        "",
        "| condition | precision, % | chance, % | precision above chance |",
        "|---|---:|---:|---:|",
    ]
    for name, records in by_condition.items():
        cited = _values(records, _cited_answer)
        chance = [100.0 * r["chance"] for r in records]
        precision = mean_interval(cited, seed=seed)
        above = paired_difference(cited, chance, seed=seed)
        lines.append(
            f"| {name} | {_shown(precision, 0)} | {np.mean(chance):.1f} | {_shown(above, 0)} |"
        )
    return lines


def _stability(
    by_condition: Mapping[str, Sequence[Record]], by_topk: Sequence[str], seed: int
) -> list[str]:
    lines = [
        "",
        "## Stability over topk",
        "",
        "| from | to | same text, % | same first tokens | change of the log-probability |",
        "|---|---|---:|---:|---:|",
    ]
    for before, after in itertools.pairwise(name for name in by_topk if name in by_condition):
        pairs = _pairs(by_condition[before], by_condition[after])
        if not pairs:
            continue
        same = mean_interval([100.0 * _is_same(one, other) for one, other in pairs], seed=seed)
        first = mean_interval([_shared(one, other) for one, other in pairs], seed=seed)
        change = paired_difference(
            [other["log_prob"] for _, other in pairs], [one["log_prob"] for one, _ in pairs]
        )
        cells = [_shown(same, 0), _shown(first, 1), _shown(change, 2)]
        lines.append(f"| {before} | {after} | {' | '.join(cells)} |")
    return lines


def draw(header: Mapping[str, Any], items: Items, folder: Path | str) -> list[Path]:
    """Draw the heat maps of one condition, and what answers do over topk.

    Args:
        header: a results file's first line.
        items: its records.
        folder: gets `attention_mass.png` and `stability.png`.

    Returns:
        The files.

    Raises:
        ConfigError: matplotlib is not installed, or there is nothing to draw.
    """
    by_condition = _by_condition(items)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [_draw_stability(header, by_condition, folder / "stability.png")]
    name = header["settings"]["heat_map"]
    records = _with_maps(by_condition.get(name, []))
    if records:
        drawn.append(_draw_maps(name, records, folder / "attention_mass.png"))
    return drawn


def memories_a_query(record: Record) -> float:
    """Return how many memories a query retrieved for one generated token, on average."""
    num_queries = len(record["token_ids"]) * np.size(record["mass"]["memory"])
    return float(record["num_retrieved"]) / num_queries if num_queries else 0.0


def mean_map(records: Sequence[Record], name: str) -> npt.NDArray[np.float64]:
    """Return a heat map, (layers, heads), as the mean over items."""
    found: npt.NDArray[np.float64] = np.mean([record["mass"][name] for record in records], axis=0)
    return found


def _with_maps(records: Sequence[Record]) -> list[Record]:
    """Leave out answers for which no memory was read."""
    return [record for record in records if np.size(record["mass"]["memory"])]


def _by_condition(items: Items) -> dict[str, list[Record]]:
    if not items:
        raise ConfigError("there are no results yet. Run the experiment first.")
    found: dict[str, list[Record]] = {}
    for record in items.values():
        found.setdefault(record["condition"], []).append(record)
    return found


def _topk_names(header: Mapping[str, Any]) -> list[str]:
    return [f"topk {topk}" for topk in header["settings"]["topk"]]


def _pairs(before: Sequence[Record], after: Sequence[Record]) -> list[tuple[Record, Record]]:
    found = {record["item"]: record for record in after}
    return [(one, found[one["item"]]) for one in before if one["item"] in found]


def _is_same(one: Record, other: Record) -> bool:
    return bool(one["text"].casefold() == other["text"].casefold())


def _shared(one: Record, other: Record) -> int:
    """Return how many first tokens two answers share."""
    pairs = zip(one["token_ids"], other["token_ids"], strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), len(one["token_ids"]))


def _preferred(record: Record) -> float | None:
    """Return 100 if the answer is likelier than the original one, else 0; None without one."""
    original = record["original_log_prob"]
    return None if original is None else 100.0 * (record["log_prob"] > original)


def _cited_answer(record: Record) -> float:
    return 100.0 * float(record["cited_answer"])


def _log_prob(record: Record) -> float:
    return float(record["log_prob"])


def _values(records: Sequence[Record], measure: Callable[[Record], float | None]) -> list[float]:
    return [value for record in records if (value := measure(record)) is not None]


def _heads(name: str, records: Sequence[Record]) -> list[str]:
    """List the heads that attend most to the answer, of one condition."""
    found, layers = mean_map(records, "answer"), records[0]["layers"]
    best = np.argsort(-found, axis=None, kind="stable")[:5]
    lines = [
        "",
        "## Heads that attend to the answer",
        "",
        f"Share of the whole attention that memories of the answer's tokens get, {name}. "
        f"`attention_mass.png` shows all {found.size} heads; their mean is {found.mean():.2%}.",
        "",
        "| layer | head | share |",
        "|---:|---:|---:|",
    ]
    for at in best:
        layer, head = divmod(int(at), found.shape[1])
        lines.append(f"| {layers[layer]} | {head} | {found[layer, head]:.1%} |")
    return lines


def _draw_maps(name: str, records: Sequence[Record], path: Path) -> Path:
    layers = records[0]["layers"]
    drawing = figure(figsize=(10, 1.5 + 0.18 * len(layers)), layout="constrained")
    panels = drawing.subplots(1, len(_MAPS), sharey=True, squeeze=False)[0]
    for axes, (kind, title) in zip(panels, _MAPS.items(), strict=True):
        found = mean_map(records, kind)
        image = axes.imshow(found, aspect="auto", cmap="viridis", vmin=0)
        drawing.colorbar(image, ax=axes)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("query head")
        axes.set_xticks(range(found.shape[1]))
    panels[0].set_yticks(range(len(layers)), layers, fontsize=7)
    panels[0].set_ylabel("layer")
    drawing.suptitle(f"Share of attention that memories get, {name}, {len(records)} items")
    drawing.savefig(path, dpi=150)
    return path


def _draw_stability(
    header: Mapping[str, Any], by_condition: Mapping[str, Sequence[Record]], path: Path
) -> Path:
    seed, by_topk = header["settings"]["seed"], _topk_names(header)
    drawing = figure(figsize=(11, 3.6), layout="constrained")
    for axes, (label, measure) in zip(drawing.subplots(1, len(_MEASURES)), _MEASURES, strict=True):
        places: list[tuple[float, Estimate]] = []
        for name, records in by_condition.items():
            found = mean_interval(_values(records, measure), seed=seed)
            memories = float(np.mean([memories_a_query(record) for record in records]))
            if name in by_topk:
                places.append((memories, found))
                continue
            bars = [[found.mean - found.low], [found.high - found.mean]]
            axes.errorbar([memories], [found.mean], bars, fmt="s", label=name, capsize=3)
        places.sort(key=lambda place: place[0])
        x = [memories for memories, _ in places]
        axes.plot(x, [one.mean for _, one in places], marker="o", color="black", label="topk")
        axes.fill_between(
            x, [one.low for _, one in places], [one.high for _, one in places], alpha=0.12
        )
        axes.set_xlabel("memories a query")
        axes.set_ylabel(label)
    axes.legend(fontsize=8)
    drawing.savefig(path, dpi=150)
    return path


_MEASURES: list[tuple[str, Callable[[Record], float | None]]] = [
    ("preferred, %", _preferred),
    ("log-probability, nats a token", _log_prob),
    ("first citation has the answer, %", _cited_answer),
]


def _named(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings.items())


def _shown(estimate: Estimate, digits: int) -> str:
    if not estimate.count:
        return ""
    mean, low, high = (
        f"{part:.{digits}f}" for part in (estimate.mean, estimate.low, estimate.high)
    )
    return f"{mean} ({low} to {high})"
