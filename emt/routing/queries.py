"""What a model's heads ask about a text: their queries, as if from a fixed distance."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from emt.model.devices import input_device, no_autocast
from emt.model.hook import AttentionCall, watching
from emt.model.positions import Angles
from emt.model.rope import Unrotation, as_cos_sin


class _EnoughError(Exception):
    """Ends a forward whose later layers nobody needs."""


@torch.no_grad()
def unit_queries(
    decoder: PreTrainedModel,
    token_ids: Tensor,
    layers: Collection[int],
    *,
    unrotations: Mapping[int, Unrotation | None],
    angles: Angles,
    distance: int,
) -> dict[int, Tensor]:
    """Run a text as far as the deepest of some layers; return their queries.

    Args:
        decoder: the model without its language-model head; attached, but memories are not read.
        token_ids: (T,) int64.
        layers: whose queries.
        unrotations: layer -> how to bring its queries to position 0; None where nothing rotates.
        angles: the model's cosines and sines.
        distance: tokens; every query is turned to this position.

    Returns:
        layer -> (H, T, D) float32 of unit length, on the CPU.
    """
    wanted, deepest = frozenset(layers), max(layers)

    def compute(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        if call.layer_idx == deepest:
            raise _EnoughError
        return call.compute()

    device = input_device(decoder)
    enough = contextlib.suppress(_EnoughError)
    with watching(decoder, compute) as seen, no_autocast(device), enough:
        decoder(input_ids=token_ids[None].to(device), use_cache=False)
    turned = angles.at(torch.full((1, len(token_ids)), distance))
    found = {}
    for call in seen.calls:
        layer_idx = call.layer_idx
        if layer_idx not in wanted:
            continue
        query, unrotation = call.query.float(), unrotations[layer_idx]
        if unrotation is not None:
            given = as_cos_sin(seen.position_embeddings[call.module])
            query = unrotation.redo(unrotation(query, given), turned[layer_idx])
        query = query[0].to("cpu")  # (H, T, D)
        found[layer_idx] = query / query.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    return found
