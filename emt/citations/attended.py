"""What each generated token of one sequence attended to: row ids and their attention mass.

A recorded step has the softmax weights of every layer and head. Summed over layers and heads, they
are a row's *mass* for the generated token that a query chose.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
import numpy as np

from emt.citations.generated import ChoosingQuery
from emt.errors import MemoryUseError
from emt.passage import Retrieved


@dataclass(frozen=True)
class Attended:
    """The rows that the generated tokens of one sequence attended to, in n pairs (token, row).

    Attributes:
        tokens: (n,) int64, numbers of generated tokens, ascending.
        rows: (n,) int64, row ids, ascending for each token.
        mass: (n,) float64, softmax shares summed over layers and heads.
        num_heads: (T,) int64, the query heads of all counted layers, for each generated token.
    """

    tokens: np.ndarray
    rows: np.ndarray
    mass: np.ndarray
    num_heads: np.ndarray


def batch_rows(
    queries: Sequence[ChoosingQuery],
    sequence: int,
    beam_indices: Sequence[int] | torch.Tensor | None,
) -> list[int]:
    """Return the batch row that each generated token came from.

    Args:
        queries: those that chose the tokens.
        sequence: the row of the batch, without beams.
        beam_indices: (T,) of one sequence, as `generate` returns them; -1 after its end.

    Raises:
        MemoryUseError: the recorded batch has no such row.
    """
    if beam_indices is None:
        rows = [sequence] * len(queries)
    else:
        rows = [int(row) for row in beam_indices if int(row) >= 0]
    batch = min((len(layer.ids) for step, _ in queries for layer in step.values()), default=None)
    if batch is not None:
        wrong = [row for row in rows if not 0 <= row < batch]
        if wrong:
            name = "sequence" if beam_indices is None else "beam_indices"
            raise MemoryUseError(
                f"{name} must be 0 to {batch - 1}, the recorded batch; got {wrong[0]}. "
                "For beams, pass one row of the beam_indices that generate() returns."
            )
    return rows


def sum_mass(
    queries: Sequence[ChoosingQuery],
    rows: Sequence[int],
    layers: Collection[int] | None,
    default_layers: Collection[int],
) -> Attended:
    """Sum what each generated token gave to rows.

    Args:
        queries: those that chose the tokens.
        rows: the batch row of each generated token.
        layers: whose attention counts; None for the default.
        default_layers: where a step has none of these, all of its layers count.
    """
    counted_layers = default_layers if layers is None else layers
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    num_heads: list[int] = []
    for (step, query), row in zip(queries, rows, strict=False):
        counted = [step[idx] for idx in step if idx in counted_layers]
        if layers is None and not counted:
            counted = list(step.values())
        of_sequence = [retrieved.of_sequence(row) for retrieved in counted]
        parts.append(_mass_of(of_sequence, query))
        num_heads.append(sum(len(retrieved.ids) for retrieved in of_sequence))
    lengths = [len(ids) for ids, _ in parts]
    return Attended(
        tokens=np.repeat(np.arange(len(parts)), lengths),
        rows=np.concatenate([np.empty(0, dtype=np.int64), *(ids for ids, _ in parts)]),
        mass=np.concatenate([np.empty(0), *(mass for _, mass in parts)]),
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
