"""Attention over rows of passages: beside the layer's own, for recordings, and instead of it.

The layer's own attention function keeps its weights to itself, or gives them only as `eager`. So
the rows' shares of the softmax are computed beside it, for the queries that are recorded and no
others: what the layer returns is what it always was.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emt.attention.softmax import capped, key_products, masked, masked_softmax, weighted_values
from emt.model.attention_call import AttentionCall, chunk_length
from emt.model.devices import no_autocast
from emt.modes.passage.rows import PlacedRows
from emt.passage import Retrieved


@torch.no_grad()
def shares_of_rows(call: AttentionCall, rows: PlacedRows, first: int = 0) -> Retrieved:
    """Return the attention that queries give to the rows before the local keys.

    Args:
        call: the layer's, with the R rows placed in it.
        rows: the rows.
        first: the first query that is asked about.

    Returns:
        Ids, scores and weights, (B, H, Q - `first`, R): the rows in the order they were put, for
        all queries alike; weight 0 where a query does not see a row.
    """
    batch, num_heads, num_queries, _ = call.query.shape
    step = chunk_length(call, 0)
    with no_autocast(call.query.device):
        chunks = [
            _of_queries(call, rows, start, min(start + step, num_queries))
            for start in range(first, num_queries, step)
        ]
    scores, weights = (
        parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
        for parts in zip(*chunks, strict=True)
    )
    ids = rows.of_batch(rows.ids, batch)[:, None, None]  # (B, 1, 1, R)
    if not rows.are_full:
        scores = scores.masked_fill((ids < 0).to(scores.device), -torch.inf)
    ids = ids.expand(-1, num_heads, num_queries - first, -1)
    return Retrieved(call.layer_idx, ids, scores, weights)


def _of_queries(
    call: AttentionCall, rows: PlacedRows, start: int, stop: int
) -> tuple[Tensor, Tensor]:
    """Return cosines and shares of the rows, each (B, H, q, R) float32, for some queries."""
    num_rows = rows.ids.shape[1]
    query = call.query[:, :, start:stop].float()
    batch, num_heads, num_queries, _ = query.shape
    products = key_products(query, call.key)  # (B, H, q, R + S)
    key_lengths = rows.of_batch(rows.key_lengths(call.layer_idx), batch)[:, :, None]
    lengths = query.norm(dim=-1, keepdim=True).view(batch, call.key.shape[1], -1, 1)
    lengths = (lengths * key_lengths.to(query.device)).view(batch, num_heads, num_queries, -1)
    cosines = products[..., :num_rows] / lengths.clamp(min=1e-12)
    mask = call.attention_mask
    mask = None if mask is None else mask[:, :, start:stop]
    if call.alibi is not None:
        mask = call.alibi.of_keys(mask)
    logits = masked(capped(products * call.scaling, call.softcap), mask)
    weights = masked_softmax(logits, sinks=call.sinks, sees_all=mask is None)
    return cosines, weights[..., :num_rows]


def joined(retrieved: Retrieved | None, rows: Retrieved, first: int) -> Retrieved:
    """Join what queries retrieved with the rows recalled for them, in the shares of one softmax.

    Args:
        retrieved: (B, H, Q, k), with shares of a softmax over memories, rows and local keys; None
            if nothing was retrieved.
        rows: (B, H, Q - `first`, R), with shares of a softmax over rows and local keys.
        first: the first query that is asked about.
    """
    if retrieved is None:
        return rows
    ids, scores, weights = (
        part[:, :, first:] for part in (retrieved.ids, retrieved.scores, retrieved.weights)
    )
    left = 1 - weights.sum(-1, keepdim=True)
    device = weights.device
    return Retrieved(
        rows.layer_idx,
        torch.cat([ids, rows.ids.to(ids.device)], dim=-1),
        torch.cat([scores, rows.scores.to(device)], dim=-1),
        torch.cat([weights, rows.weights.to(device) * left], dim=-1),
    )


def attend_inline(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    bias: Tensor | None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attend as families without transformers' attention functions do.

    Their own code has keys and biases of its own at hand and takes no others.

    Args:
        module: ignored.
        query: (B, H, Q, D).
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        attention_mask: (B or 1, 1, Q, S), bool (True is visible) or additive; None if all is seen.
        scaling: factor on logits.
        bias: (B or 1, H, 1, S) float32, added to logits; or None.

    Returns:
        Output (B, Q, H, Dv) and weights (B, H, Q, S), computed in float32.
    """
    logits = key_products(query.float() * scaling, key)
    if bias is not None:
        logits = logits + bias.to(logits.device)
    logits = masked(logits, attention_mask)
    weights = masked_softmax(logits, sinks=None, sees_all=attention_mask is None)
    output = weighted_values(weights, value)
    return output.transpose(1, 2).to(query.dtype), weights.to(query.dtype)
