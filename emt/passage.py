"""The nouns that results are made of: passages, what a prompt is about, what queries retrieved."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from memory_backends.layout import Int64Array


@dataclass(frozen=True)
class Passage:
    """Consecutive rows of one document.

    Attributes:
        document: its name.
        first: the first row, counted from the document's own first row.
        stop: one after the last row.
    """

    document: str
    first: int
    stop: int


@dataclass(frozen=True)
class Recalled:
    """A passage that was put into a prompt.

    Attributes:
        passage: its rows.
        score: how much it was found to be what the prompt is about, 0 to 1; None where the caller
            chose it.
    """

    passage: Passage
    score: float | None = None


@dataclass(frozen=True)
class Question:
    """The part of a prompt that asks.

    Attributes:
        at: the token that passages are put before.
        first: the first token that asks.
        stop: one after the last token that asks.
    """

    at: int
    first: int
    stop: int


@dataclass(frozen=True)
class RoutedPassage:
    """A passage that a prompt is about.

    Attributes:
        passage: its rows.
        score: the largest share that a place in it has, 0 to 1: of the weight of the question's
            words or of the heads' evidence, or as a cosine of mean values.
    """

    passage: Passage
    score: float


@dataclass(frozen=True)
class Routed:
    """What a prompt is about.

    Attributes:
        question: where it asks.
        passages: best first; empty if nothing in the memory is relevant.
        score: the best such score of a place; even of what is not relevant.
        relevance: by how much a passage makes the question likelier, in nats a token (see the
            setting of that name); at most so much, of what is not relevant; None if no passage was
            judged.
    """

    question: Question
    passages: tuple[RoutedPassage, ...]
    score: float
    relevance: float | None = None


@dataclass(frozen=True)
class Retrieved:
    """What the queries of one attention call retrieved.

    Attributes:
        layer_idx: the layer.
        ids: (B, H, Q, k) int64 row ids, best first; -1 where there was nothing.
        scores: (B, H, Q, k) float32 cosine similarities; -inf where there was nothing.
        weights: (B, H, Q, k) float32 shares of the joint softmax; 0 for masked memories.
    """

    layer_idx: int
    ids: Tensor
    scores: Tensor
    weights: Tensor

    def of_sequence(self, row: int) -> Retrieved:
        """Return one batch row's part: tensors (H, Q, k)."""
        return Retrieved(self.layer_idx, self.ids[row], self.scores[row], self.weights[row])


Step = dict[int, Retrieved]  # layer -> what its queries retrieved in one forward


def are_among(ids: Int64Array, stored: Int64Array) -> npt.NDArray[np.bool_]:
    """Tell which ids (n,) are among others, ascending: there may be millions of those."""
    if not len(stored):
        return np.zeros(len(ids), dtype=bool)
    nearest = stored[np.searchsorted(stored, ids).clip(max=len(stored) - 1)]
    matches: npt.NDArray[np.bool_] = nearest == ids
    return matches
