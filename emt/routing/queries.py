"""The queries of a model's heads for a text, as if all stood at the same position."""

from __future__ import annotations

import contextlib
from collections.abc import Collection

import torch
from torch import Tensor
from torch.nn import functional

from emt.errors import ConfigError
from emt.model.attached import AttachedModel
from emt.model.attention_call import AttentionCall
from emt.model.devices import input_device, no_autocast
from emt.model.positions import max_positions
from emt.model.references import alive
from emt.model.rope import as_cos_sin
from emt.model.watch import watching


class _StopForwardError(Exception):
    """Ends a forward whose later layers are not needed."""


@torch.no_grad()
def unit_queries(
    model: AttachedModel, token_ids: Tensor, layers: Collection[int], *, distance: int
) -> dict[int, Tensor]:
    """Run a text as far as the deepest of some layers; return these layers' queries.

    Args:
        model: its memories are not read.
        token_ids: (T,) int64; or (B, T), texts that may be padded on the right.
        layers: whose queries are returned.
        distance: tokens; every query is rotated to this position.

    Returns:
        layer -> (H, T, D), or (B, H, T, D), float32 of unit length, on the CPU.

    Raises:
        ConfigError: the text is longer than the table of the model's learned positions.
        MemoryUseError: the model is gone.
    """
    positions = max_positions(model.config)
    is_rotated = any(unrotation is not None for unrotation in model.unrotations.values())
    num_tokens = token_ids.shape[-1]
    if positions is not None and num_tokens > positions and not is_rotated:
        raise ConfigError(
            f"passages cannot be found by heads: the prompt's {num_tokens:,} tokens must fit "
            f"the model's {positions:,} positions. Shorten the prompt."
        )
    decoder, deepest = alive(model.decoder, "route"), max(layers)

    def compute(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        if call.layer_idx == deepest:
            raise _StopForwardError
        return call.compute()

    device = input_device(decoder)
    stopping = contextlib.suppress(_StopForwardError)
    with watching(decoder, compute) as seen, no_autocast(device), stopping:
        decoder(input_ids=token_ids.view(-1, num_tokens).to(device), use_cache=False)
    at_distance = model.angles.at(torch.full((1, num_tokens), distance))
    queries = {}
    for call in seen.calls:
        layer_idx = call.layer_idx
        if layer_idx not in layers:
            continue
        query, unrotation = call.query.float(), model.unrotations[layer_idx]
        if unrotation is not None:
            rotated_by = as_cos_sin(seen.position_embeddings[call.module])
            query = unrotation.redo(unrotation(query, rotated_by), at_distance[layer_idx])
        query = query.view(*token_ids.shape[:-1], *query.shape[1:]).to("cpu")
        queries[layer_idx] = functional.normalize(query, dim=-1)
    return queries
