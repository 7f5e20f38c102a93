"""Join what heads, words and values say of runs of rows, by adding their shares.

Every voice says how much of what it could find is in a run, as a share from 0 to 1; so a voice that
finds little of a question anywhere says little. A rank would not tell.

Source: sums of scores do better than ranks in Bruch et al., An Analysis of Fusion Functions for
Hybrid Retrieval (arXiv 2210.11934).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from emt.routing.evidence import Hits, Window, largest_of_pairs
from emt.routing.runs import Runs
from memory_backends.layout import Float32Array

_MANY = 32  # runs


def fuse_rankings(
    rankings: Sequence[Sequence[Window]], count: int, *, min_distance: int
) -> list[Window]:
    """Join several rankings of windows, each best first, into one.

    A window adds 1 / (2 + rank) to the nearest place of its document less than `min_distance` rows
    away, or begins a new place. In a ranking whose best window hardly stands above the mean of the
    others, it adds as much less: where all are nearly alike, their order says little.

    Args:
        rankings: of at most `count` windows; in one that has fewer, others have a score of 0.
        count: of windows in a ranking, 2 or more.
        min_distance: rows that two places of a document are apart.

    Returns:
        Windows with the best score that a ranking gives their place.

    Source:
        Cormack et al., Reciprocal Rank Fusion (SIGIR 2009), with a smaller constant, for the lists
        are short. The weights are ours.
    """
    places: list[Window] = []
    fused_scores: list[float] = []
    for ranking in rankings:
        others = sum(window.score for window in ranking[1:]) / (count - 1)
        for rank, window in enumerate(ranking):
            near = [i for i, place in enumerate(places) if place.is_near(window, min_distance)]
            if near:
                nearest = min(near, key=lambda i: abs(places[i].peak - window.peak))
            else:
                nearest = len(places)
                places.append(window)
                fused_scores.append(0.0)
            fused_scores[nearest] += (1 - others / ranking[0].score) / (2 + rank)
            best = max(places[nearest].score, window.score)
            places[nearest] = replace(places[nearest], score=best)
    order = np.argsort(-np.array(fused_scores), kind="stable")
    return [places[i] for i in order]


def evidence_of_runs(hits: Hits, runs: Runs) -> Float32Array:
    """Return the evidence in each run, as its share of the largest that there could be: (r,)."""
    row, run = runs.of_rows(hits.rows)
    of_run, _, best = largest_of_pairs(run, hits.queries[row], hits.excess[row], hits.num_queries)
    evidence = np.bincount(of_run, best, len(runs.starts)) / max(hits.max_evidence, 1e-9)
    return evidence.astype(np.float32)


def fused_scores(voices: Sequence[tuple[Runs, Float32Array]]) -> tuple[Runs, Float32Array]:
    """Return the runs of the first voice, and the sum of what all say of them, (r,) float32.

    What a voice says of a run is its score less that of the 33rd best run: a voice that finds many
    runs nearly alike says little, however much it finds.

    Args:
        voices: runs, and the score of each. A run that a voice does not have counts 0 there: its
            document was written or removed meanwhile.
    """
    runs = voices[0][0]
    total = np.zeros(len(runs.starts), dtype=np.float32)
    for own, scores in voices:
        at, is_there = own.places_of(runs)
        total[is_there] += _excess(scores)[at[is_there]]
    return runs, total


def _excess(scores: Float32Array) -> Float32Array:
    """Return how far scores stand above the 33rd best of them, 0 for the others."""
    if len(scores) <= _MANY:
        return scores
    level = np.partition(scores, -_MANY - 1)[-_MANY - 1]
    excess: Float32Array = (scores - level).clip(min=0)
    return excess
