"""Join several rankings of windows into one: those of words, values and heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from emt.routing.evidence import Window


@dataclass(frozen=True)
class Place:
    """A place of a memory that a question may be about.

    Attributes:
        window: where it is, with the best score that a ranking gives it.
        prior: the sum, over the rankings that have it, of 1 / (2 + rank).
    """

    window: Window
    prior: float


def fuse_rankings(rankings: Sequence[Sequence[Window]], *, min_distance: int) -> list[Place]:
    """Join several rankings of windows, each best first, into one of places, best first.

    A window counts for the nearest place of its document that is less than `min_distance` rows
    away, or begins a new place.

    Source:
        Cormack et al., Reciprocal Rank Fusion (SIGIR 2009), with a smaller constant, for the lists
        are short.
    """
    places: list[Place] = []
    for ranking in rankings:
        for rank, window in enumerate(ranking):
            near = [i for i, each in enumerate(places) if each.window.is_near(window, min_distance)]
            if not near:
                places.append(Place(window, 1 / (2 + rank)))
                continue
            nearest = min(near, key=lambda i: abs(places[i].window.peak - window.peak))
            place = places[nearest].window
            best = replace(place, score=max(place.score, window.score))
            places[nearest] = Place(best, places[nearest].prior + 1 / (2 + rank))
    return sorted(places, key=lambda place: -place.prior)
