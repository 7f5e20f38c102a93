"""The retrieval experiment in tables: what was found, and how sure it is."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from experiments.statistics import Estimate, mean_interval, paired_difference

Record = Mapping[str, Any]
ALL = "all"
BINS = (("1", 1, 1), ("2", 2, 2), ("3", 3, 3), ("4-6", 4, 6), ("7+", 7, 10**9))
"""How often a fact appears: name, from, to."""


def with_gains(records: Iterable[Record]) -> list[dict[str, Any]]:
    """Return records with `gain`: the answer's log-probability above closed book's; or None."""
    found = [dict(record) for record in records]
    closed = {
        (record["split"], record["id"]): record["log_prob"]
        for record in found
        if record["condition"] == "closed_book"
    }
    for record in found:
        before = closed.get((record["split"], record["id"]))
        known = before is not None and record["log_prob"] is not None
        record["gain"] = record["log_prob"] - before if known else None
    return found


def of(records: Iterable[Record], condition: str, split: str = ALL) -> list[Record]:
    """Return the records of a condition, and of a split or of all."""
    return [
        record
        for record in records
        if record["condition"] == condition and split in (ALL, record["split"])
    ]


def values(records: Iterable[Record], name: str) -> list[float]:
    """Return a value of each record that has it; true counts as 1."""
    return [float(record[name]) for record in records if record.get(name) is not None]


def names(records: Iterable[Record], what: str) -> list[str]:
    """Return conditions or splits, in the order they come."""
    return list(dict.fromkeys(str(record[what]) for record in records))


def compare(
    records: Sequence[Record], one: str, other: str, name: str, split: str, *, seed: int = 0
) -> Estimate:
    """Return the mean difference of a value between two conditions, over items that both have."""
    theirs = {(r["split"], r["id"]): r[name] for r in of(records, other, split)}
    pairs = [
        (float(record[name]), float(theirs[at]))
        for record in of(records, one, split)
        if record[name] is not None
        and theirs.get(at := (record["split"], record["id"])) is not None
    ]
    return paired_difference([a for a, _ in pairs], [b for _, b in pairs], seed=seed)


def bin_of(occurrences: int) -> str:
    """Return the name of the bin of `BINS` that a number of occurrences is in."""
    return next(name for name, first, last in BINS if first <= occurrences <= last)


def summary(header: Mapping[str, Any], items: Mapping[str, Record]) -> str:
    """Return the results as Markdown.

    Args:
        header: a results file's first line.
        items: its records.
    """
    settings = header["settings"]
    records = with_gains(items.values())
    seed = settings.get("seed", 0)
    parts = [
        "# Counterfactual retrieval",
        _origin(header, records),
        "## Results",
        "Means with 95 % bootstrap intervals. *Right*: the published score, the answer is in the "
        "greedy tokens. *Preferred*: the answer is likelier than the original one, by mean "
        "log-probability per token. *Gain*: of the answer's log-probability (nats per token) over "
        "closed book. *Cut*: prompts that lost text for want of positions; in brackets, how many "
        "of these still had the answer. *Found*: the text in the prompt, or a recalled passage, "
        "has the answer. *Cited*: of the right answers given with passages, those whose first "
        "citation has the answer.",
        _results_table(records, seed),
        f"## Against {settings['baseline']}",
        "Mean differences over the same items, with 95 % bootstrap intervals.",
        _differences_table(records, settings["baseline"], seed),
    ]
    agreement = _agreement_table(records)
    if agreement:
        parts += ["## emt_vector_db and emt_manual, the same items", agreement]
    parts += [
        "## By how often the document has the answer",
        "Right (preferred), and the number of items, over all splits.",
        _occurrences_table(records),
    ]
    return "\n\n".join(parts) + "\n"


def _origin(header: Mapping[str, Any], records: Sequence[Record]) -> str:
    settings = header["settings"]
    versions = ", ".join(f"{name} {found}" for name, found in header["versions"].items())
    lines = [
        f"* model: {settings['model']}",
        f"* items: {len(names(records, 'id'))} of `{settings['items']}` "
        f"(sha256 {settings['items_sha256']})",
        f"* memory: {json.dumps(settings['memory']) if settings['memory'] else 'as published'}",
        f"* machine: {header['machine']}",
        f"* versions: {versions}; code {header['revision']}; seed {settings['seed']}",
    ]
    given = settings["conditions"]
    own = {name: found for name, found in given.items() if found} if isinstance(given, dict) else {}
    lines += [f"* {name}: {json.dumps(found)}" for name, found in own.items()]
    left_out = settings.get("left_out")
    if left_out:
        lines.append(
            f"* one memory of {', '.join(names(records, 'split'))} tokens; left out: "
            f"{left_out['same_article']} items whose change does not fit their article's other "
            f"changes, {left_out['no_room']} for which the smallest memory has no room"
        )
    return "\n".join(lines)


def _results_table(records: Sequence[Record], seed: int) -> str:
    rows = []
    for split, condition in _cells(records):
        found = of(records, condition, split)
        if not found:
            continue

        def interval(name: str, form: Callable[[Estimate], str], found: Any = found) -> str:
            return form(mean_interval(values(found, name), seed=seed))

        cut = [record for record in found if record["truncated"]]
        rows.append(
            [
                split,
                condition,
                str(len(found)),
                interval("right", percent),
                interval("preferred", percent),
                interval("log_prob", nats),
                interval("gain", nats),
                f"{len(cut)} ({sum(bool(record['has_answer']) for record in cut)})" if cut else "0",
                _share(found, "has_answer"),
                _share(found, "is_cited"),
                _mean(found, "num_prompt_tokens", ".0f"),
                _mean(found, "seconds", ".2f"),
                _mean(found, "memory_seconds", ".1f"),
            ]
        )
    head = ["split", "condition", "n", "right", "preferred", "log-prob", "gain", "cut"]
    return table([*head, "found", "cited", "prompt tokens", "s / answer", "s / memory"], rows)


def _share(records: Sequence[Record], name: str) -> str:
    """Return how many of the records that have a value have a true one, as "k of n"."""
    found = values(records, name)
    return f"{sum(found):.0f} of {len(found)}" if found else ""


def _differences_table(records: Sequence[Record], baseline: str, seed: int) -> str:
    rows = []
    for split, condition in _cells(records):
        if condition == baseline or not of(records, condition, split):
            continue
        found = {
            name: compare(records, condition, baseline, name, split, seed=seed)
            for name in ("right", "preferred", "log_prob")
        }
        rows.append(
            [
                split,
                condition,
                str(found["right"].count),
                percent(found["right"], signed=True),
                percent(found["preferred"], signed=True),
                nats(found["log_prob"]),
            ]
        )
    return table(["split", "condition", "n", "right", "preferred", "log-prob"], rows)


def _agreement_table(records: Sequence[Record]) -> str:
    rows = []
    for split in [*names(records, "split"), ALL]:
        manual = {(r["split"], r["id"]): r for r in of(records, "emt_manual", split)}
        pairs = [
            (record, manual[at])
            for record in of(records, "emt_vector_db", split)
            if (at := (record["split"], record["id"])) in manual
        ]
        if not pairs:
            continue
        apart = [
            abs(one["log_prob"] - other["log_prob"])
            for one, other in pairs
            if one["log_prob"] is not None
        ]
        right = compare(records, "emt_vector_db", "emt_manual", "right", split).mean
        preferred = compare(records, "emt_vector_db", "emt_manual", "preferred", split).mean
        same = sum(one["text"] == other["text"] for one, other in pairs)
        rows.append(
            [
                split,
                str(len(pairs)),
                f"{100 * right:+.1f}",
                "" if math.isnan(preferred) else f"{100 * preferred:+.1f}",
                f"{100 * same / len(pairs):.0f} %",
                f"{max(apart):.2g}" if apart else "",
            ]
        )
    head = ["split", "n", "right, points", "preferred, points", "same text"]
    return table([*head, "largest log-prob difference"], rows) if rows else ""


def _occurrences_table(records: Sequence[Record]) -> str:
    used = [name for name, *_ in BINS if any(bin_of(r["occurrences"]) == name for r in records)]
    rows = []
    for condition in names(records, "condition"):
        cells = []
        for name in used:
            found = [r for r in of(records, condition) if bin_of(r["occurrences"]) == name]
            right = mean_interval(values(found, "right")).mean
            preferred = mean_interval(values(found, "preferred")).mean
            shown = "" if math.isnan(preferred) else f" ({100 * preferred:.0f} %)"
            cells.append(f"{100 * right:.0f} %{shown}, {len(found)}" if found else "")
        rows.append([condition, *cells])
    return table(["condition", *(f"{name} times" for name in used)], rows)


def _cells(records: Sequence[Record]) -> list[tuple[str, str]]:
    splits = names(records, "split")
    over = [*splits, ALL] if len(splits) > 1 else splits
    return [(split, condition) for split in over for condition in names(records, "condition")]


def percent(found: Estimate, *, signed: bool = False) -> str:
    """Return a share with its interval, in per cent."""
    if not found.count:
        return ""
    mean, low, high = (100 * value for value in (found.mean, found.low, found.high))
    if signed:
        return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"
    return f"{mean:.1f} [{low:.1f}, {high:.1f}]"


def nats(found: Estimate) -> str:
    """Return a log-probability, or a difference of two, with its interval."""
    if not found.count:
        return ""
    return f"{found.mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _mean(records: Sequence[Record], name: str, form: str) -> str:
    found = values(records, name)
    return format(sum(found) / len(found), form) if found else ""
