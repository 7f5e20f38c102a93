"""Join several rankings of windows into one: that of the heads and that of the words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from emt.routing.evidence import Window


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
