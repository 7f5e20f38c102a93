"""How much attention each layer and head gave to memories while an answer was generated."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from emt.citations.recording import Recording
from emt.citations.sentences import sentences_of
from memory_backends import StoredDocument

Map = npt.NDArray[np.float64]  # (layers that read memories, query heads)


@dataclass(frozen=True)
class AttentionMass:
    """Shares of the joint softmax, means over the queries that chose the tokens of an answer.

    Attributes:
        memory: (L, H) of all memories; the rest is local attention.
        content: (L, H) of memories that are no attention sinks.
        answer: (L, H) of memories of tokens that say the answer.
    """

    memory: Map
    content: Map
    answer: Map

    def to_json(self) -> dict[str, Any]:
        """Return the maps as nested lists, rounded to five places."""
        return {name: np.round(part, 5).tolist() for name, part in asdict(self).items()}


def attention_mass(recording: Recording, document: StoredDocument, answer: str) -> AttentionMass:
    """Sum what was retrieved from a memory that holds one document.

    Args:
        recording: of one generated text; the first sequence of the batch is looked at.
        document: the document.
        answer: what was to be found in it.
    """
    sinks = document.first_row + document.sink_rows
    in_answer = np.isin(document.row_tokens, tokens_of(document, answer))
    rows = document.first_row + np.flatnonzero(in_answer)
    if not len(recording):
        return AttentionMass(*(np.zeros((0, 0)) for _ in range(3)))
    sums = []
    for step in recording:
        maps = []
        for layer in sorted(step):
            retrieved = step[layer].of_sequence(0)
            ids = retrieved.ids[:, -1].numpy()  # (H, k), -1 for none
            weights = retrieved.weights[:, -1].numpy().astype(np.float64)
            counted = np.stack([ids >= 0, ~np.isin(ids, sinks), np.isin(ids, rows)]) & (ids >= 0)
            maps.append((weights * counted).sum(axis=-1))  # (3, H)
        sums.append(np.array(maps))  # (L, 3, H)
    return AttentionMass(*np.mean(sums, axis=0).swapaxes(0, 1))


def tokens_of(document: StoredDocument, answer: str) -> npt.NDArray[np.int64]:
    """Return the tokens of a document's text that say an answer, wherever it does."""
    if document.text is None or document.offsets is None:
        return np.empty(0, dtype=np.int64)
    pattern = rf"(?<!\w){re.escape(answer)}(?!\w)"
    starts, ends = document.offsets[:, 0], document.offsets[:, 1]
    is_said = np.zeros(len(starts), dtype=bool)
    for match in re.finditer(pattern, document.text, flags=re.IGNORECASE):
        is_said |= (starts < match.end()) & (ends > match.start()) & (ends > starts)
    return np.flatnonzero(is_said)


def share_of_passages_with(document: StoredDocument, answer: str) -> float:
    """Return how often a passage taken at random has the answer: chance, for citations."""
    passages = sentences_of(document)
    said = tokens_of(document, answer)
    at = np.searchsorted(passages[:, 0], said, side="right") - 1
    return len(np.unique(at)) / len(passages)
