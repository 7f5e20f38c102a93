"""Which memory tokens were retrieved, in the layout of the published implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from emt.passage import Step
from memory_backends import StoredDocument

LayerIndices = tuple[Tensor | None, ...]


def memory_indices(step: Step, document: StoredDocument, num_layers: int) -> LayerIndices:
    """Translate what one forward's queries retrieved, in a recording of whole prompts.

    `document` is what was written as `memory_ids`.

    Returns:
        For each layer None, if it read no memories, or (B, H, Q * k) int64: entry `q * k + j` is
        the j-th best memory of query q, as a position in `memory_ids`. -1 where nothing was found,
        and for rows of other documents.

    The published implementation counts *stored* memories instead, without those of special ids:
    the position of stored memory i is `document.row_tokens[i]`.

    Source:
        `output_retrieved_memory_idx` of the published implementation.
    """
    positions = torch.tensor(document.row_tokens, dtype=torch.int64)
    indices: list[Tensor | None] = []
    for layer_idx in range(num_layers):
        retrieved = step.get(layer_idx)
        if retrieved is None:
            indices.append(None)
            continue
        at = retrieved.ids - document.first_row  # (B, H, Q, k)
        is_own = (retrieved.ids >= 0) & (at >= 0) & (at < len(positions))
        own_positions = torch.full_like(at, -1)
        own_positions[is_own] = positions[at[is_own]]
        indices.append(own_positions.flatten(start_dim=2))  # (B, H, Q * k)
    return tuple(indices)
