"""Join several rankings of windows into one: that of the heads and that of the words."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from emt.routing.evidence import Window


def fuse_rankings(rankings: Sequence[Sequence[Window]], *, min_distance: int) -> list[Window]:
    """Join several rankings of windows, each best first, into one.

    A window adds 1 / (2 + rank) to the nearest place less than `min_distance` rows away, or begins
    a new place. Windows of the result have the scores of the first ranking, or 0.

    Source:
        Cormack et al., Reciprocal Rank Fusion (SIGIR 2009), with a smaller constant, for the lists
        are short.
    """
    places: list[Window] = []
    fused_scores: list[float] = []
    for number, ranking in enumerate(rankings):
        for rank, window in enumerate(ranking):
            distances = [abs(place.peak - window.peak) for place in places]
            nearest = min(range(len(places)), key=distances.__getitem__, default=-1)
            if nearest < 0 or distances[nearest] >= min_distance:
                nearest = len(places)
                places.append(Window(window.peak, 0.0))
                fused_scores.append(0.0)
            fused_scores[nearest] += 1 / (2 + rank)
            if number == 0:
                places[nearest] = Window(places[nearest].peak, window.score)
    order = np.argsort(-np.array(fused_scores), kind="stable")
    return [places[i] for i in order]
