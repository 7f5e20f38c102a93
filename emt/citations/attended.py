"""What each generated token of one sequence attended to: row ids and their attention mass.

A recorded step has the softmax weights of every layer and head. Summed over layers and heads, they
are a row's *mass* for the generated token that a query chose. Which token that is stands beside it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
import numpy as np

from emt.citations.generated import ChoosingQuery, GeneratedText
from emt.errors import MemoryUseError
from emt.passage import Retrieved


@dataclass(frozen=True)
class Attended:
    """The rows that the generated tokens of one sequence attended to, in n pairs (token, row).

    Attributes:
        tokens: (n,) int64, numbers of generated tokens, ascending.
        rows: (n,) int64, row ids, ascending for each token.
        mass: (n,) float64, softmax shares summed over layers and heads.
        said: (T,) int64, the id of each generated token; -1 where it is not known.
        num_heads: (T,) int64, the query heads of all counted layers, for each generated token.
    """

    tokens: np.ndarray
    rows: np.ndarray
    mass: np.ndarray
    said: np.ndarray
    num_heads: np.ndarray


@dataclass(frozen=True)
class Chosen:
    """The generated tokens of one sequence, in order, with what chose them.

    Attributes:
        queries: (T,) that chose the tokens.
        rows: (T,) the batch row that each of them came from.
        said: (T,) ids of the tokens; -1 where it is not known: in forwards by hand, in a call that
            was broken off, and among beams unless the call returned `beam_indices`.
    """

    queries: Sequence[ChoosingQuery]
    rows: Sequence[int]
    said: Sequence[int]


def of_sequence(
    queries: Sequence[ChoosingQuery],
    sequence: int,
    beam_indices: Sequence[int] | torch.Tensor | None,
) -> Chosen:
    """Return the tokens of one sequence of a batch.

    Args:
        queries: those that chose the tokens.
        sequence: the row of the batch, without beams.
        beam_indices: (T,) of one sequence, as `generate` returns them; -1 after its end.

    Raises:
        MemoryUseError: the recorded batch has no such row.
    """
    beams = None
    if beam_indices is not None:
        beams = [int(row) for row in beam_indices if int(row) >= 0]
        queries = queries[: len(beams)]
    rows = [sequence] * len(queries) if beams is None else beams[: len(queries)]
    batches: dict[GeneratedText | None, int] = {}  # the smallest, of forwards by hand
    for query in queries:
        for layer in query.step.values():
            batches[query.text] = min(len(layer.ids), batches.get(query.text, len(layer.ids)))
    batch = min(batches.values(), default=0)
    wrong = [row for row in rows if batch and not 0 <= row < batch]
    if wrong:
        name = "sequence" if beam_indices is None else "beam_indices"
        raise MemoryUseError(
            f"{name} must be 0 to {batch - 1}, the recorded batch; got {wrong[0]}. "
            "For beams, pass one row of the beam_indices that generate() returns."
        )
    texts = {
        text: text.sequence(sequence, batch, beams)
        for text, batch in batches.items()
        if text is not None
    }
    said = []
    for query in queries:
        token_ids = None if query.text is None else texts.get(query.text)
        said.append(-1 if token_ids is None else token_ids[query.number])
    return Chosen(queries, rows, said)


def sum_mass(
    chosen: Chosen,
    layers: Collection[int] | None,
    default_layers: Collection[int],
) -> Attended:
    """Sum what each generated token gave to rows.

    Args:
        chosen: the tokens, and the queries that chose them.
        layers: whose attention counts; None for the default.
        default_layers: where a step has none of these, all of its layers count.
    """
    counted_layers = default_layers if layers is None else layers
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    num_heads: list[int] = []
    for query, row in zip(chosen.queries, chosen.rows, strict=True):
        counted = [layer for idx, layer in query.step.items() if idx in counted_layers]
        if layers is None and not counted:
            counted = list(query.step.values())
        retrievals = [retrieved.of_sequence(row) for retrieved in counted]
        parts.append(_mass_of(retrievals, query.query))
        num_heads.append(sum(len(retrieved.ids) for retrieved in retrievals))
    lengths = [len(ids) for ids, _ in parts]
    return Attended(
        tokens=np.repeat(np.arange(len(parts)), lengths),
        rows=np.concatenate([np.empty(0, dtype=np.int64), *(ids for ids, _ in parts)]),
        mass=np.concatenate([np.empty(0), *(mass for _, mass in parts)]),
        said=np.array(chosen.said, dtype=np.int64),
        num_heads=np.array(num_heads, dtype=np.int64),
    )


def _mass_of(retrievals: Sequence[Retrieved], query: int) -> tuple[np.ndarray, np.ndarray]:
    """Sum the weights of each row over layers, tensors (H, Q, k), and heads, for one query.

    Returns:
        (m,) int64 row ids, ascending, and (m,) float64, their mass.
    """
    ids, weights = [np.empty(0, dtype=np.int64)], [np.empty(0)]
    for retrieved in retrievals:
        layer_ids, layer_weights = retrieved.ids[:, query], retrieved.weights[:, query]  # (H, k)
        if layer_ids.stride(0) == 0:  # recalled: the same rows for all heads
            layer_ids, layer_weights = layer_ids[:1], layer_weights.sum(0, dtype=torch.float64)
        ids.append(layer_ids.flatten().numpy())
        weights.append(layer_weights.flatten().numpy())
    all_ids, all_weights = np.concatenate(ids), np.concatenate(weights)
    is_row = all_ids >= 0
    unique, inverse = np.unique(all_ids[is_row], return_inverse=True)
    return unique, np.bincount(inverse, weights=all_weights[is_row], minlength=len(unique))
