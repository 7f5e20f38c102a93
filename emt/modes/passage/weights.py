"""What a layer's queries gave to recalled rows: their shares of the softmax, for citations.

The layer's own attention function keeps its weights to itself, or gives them only as `eager`. So
they are computed beside it, for the queries that are recorded and no others: what citing costs is a
product of one query with the keys, and what the layer returns is what it always was.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from emt.citations.recording import Recording
from emt.model.devices import no_autocast
from emt.model.hook import AttentionCall
from emt.modes.passage.frame import Frame
from emt.modes.token.attend import chunk_length, scaling_of
from emt.passage import Retrieved


def record_recalled(
    call: AttentionCall,
    frame: Frame,
    recordings: Sequence[Recording],
    retrieved: Retrieved | None = None,
) -> None:
    """Let recordings know what a layer's queries gave to recalled rows.

    Args:
        call: the layer's, with the rows placed in it.
        frame: the forward that runs.
        recordings: those of this thread's calls.
        retrieved: what each query retrieved besides, if it did.
    """
    num_queries = call.query.shape[2]
    with no_autocast(call.query.device), torch.no_grad():
        found: dict[int, Retrieved] = {}
        for recording in recordings:
            first = 0 if recording.whole_prompt else num_queries - 1
            if first not in found:
                found[first] = joined(retrieved, recalled(call, frame, first), first)
            recording.add(found[first])


def recalled(call: AttentionCall, frame: Frame, first: int = 0) -> Retrieved:
    """Return the attention that queries give to the rows before the local keys.

    Args:
        call: the layer's, with the R rows placed in it.
        frame: the forward that runs.
        first: the first query that is asked about.

    Returns:
        Ids, scores and weights, (B, H, Q - `first`, R): the rows in the order they were put, for
        all queries alike; weight 0 where a query does not see a row.
    """
    batch, num_heads, num_queries, _ = call.query.shape
    step = chunk_length(call, 0)
    parts = [
        _of_queries(call, frame, start, min(start + step, num_queries))
        for start in range(first, num_queries, step)
    ]
    scores, weights = (
        found[0] if len(found) == 1 else torch.cat(found, dim=2)
        for found in zip(*parts, strict=True)
    )
    ids = frame.rows.of_batch(frame.rows.ids, batch)[:, None, None]  # (B, 1, 1, R)
    if not frame.rows.fills:
        scores = scores.masked_fill((ids < 0).to(scores.device), -torch.inf)
    ids = ids.expand(-1, num_heads, num_queries - first, -1)
    return Retrieved(call.layer_idx, ids, scores, weights)


def _of_queries(call: AttentionCall, frame: Frame, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Return cosines and shares of the rows, each (B, H, q, R) float32, for some queries."""
    rows, num_rows = frame.rows, frame.rows.ids.shape[1]
    query = call.query[:, :, start:stop].float()
    batch, num_heads, num_queries, dim = query.shape
    shape = (batch, num_heads, num_queries, -1)
    grouped = query.reshape(batch, call.key.shape[1], -1, dim)  # (B, Hkv, G * q, D)
    products = grouped @ call.key.float().transpose(-1, -2)  # (B, Hkv, G * q, R + S)
    lengths = rows.of_batch(rows.key_lengths(call.layer_idx), batch)[:, :, None].to(query.device)
    size = grouped.norm(dim=-1, keepdim=True) * lengths  # (B, Hkv, G * q, R)
    cosines = (products[..., :num_rows] / size.clamp(min=1e-12)).view(shape)
    logits = (products * scaling_of(call)).view(shape)
    softcap, sinks = call.options.get("softcap"), call.options.get("s_aux")
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    mask = call.attention_mask
    mask = None if mask is None else mask[:, :, start:stop]
    if call.alibi is not None:
        logits = logits + call.alibi.of_keys(mask)
    elif mask is not None and mask.dtype == torch.bool:
        logits = logits.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        logits = logits + mask
    if sinks is not None:
        nowhere = sinks.float().view(1, -1, 1, 1).expand(batch, -1, num_queries, 1)
        logits = torch.cat([logits, nowhere], dim=-1)
    weights = torch.softmax(logits, dim=-1)[..., :num_rows]
    if mask is not None:  # a query that sees nothing at all has its weights from nowhere
        mask = mask[..., :num_rows]
        seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        weights = weights.masked_fill(~seen, 0.0)
    return cosines, weights


def joined(retrieved: Retrieved | None, rows: Retrieved, first: int) -> Retrieved:
    """Join what queries retrieved with what was recalled for them, in the shares of one softmax.

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
