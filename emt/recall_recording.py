"""What a layer's queries gave to recalled rows: their shares of the softmax, for citations.

The layer's own attention function keeps its weights to itself, or gives them only as `eager`. So
they are computed beside it, for the queries that are recorded and no others: what citing costs is a
product of one query with the keys, and what the layer returns is what it always was.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from emt.hook import AttentionCall
from emt.precision import no_autocast
from emt.recall_frame import Frame
from emt.recording import Recording
from emt.retrieval import Retrieved, local_weights


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
    query = call.query[:, :, first:]
    batch, num_heads, num_queries, _ = query.shape
    ids = frame.rows.ids  # (n, R)
    ids = ids.expand(batch, -1) if len(ids) == 1 else ids.repeat_interleave(batch // len(ids), 0)
    num_rows = ids.shape[1]
    ids = ids[:, None, None].expand(-1, num_heads, num_queries, -1)
    weights = local_weights(call, first, num_columns=num_rows)
    mask = call.attention_mask
    if mask is not None:  # a query that sees nothing at all has its weights from nowhere
        mask = mask[:, :, first:, :num_rows]
        seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        weights = weights.masked_fill(~seen, 0.0)
    scores = _cosines(query, call.key[:, :, :num_rows])
    scores = scores.masked_fill((ids < 0).to(scores.device), -torch.inf)
    return Retrieved(call.layer_idx, ids, scores, weights)


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


def _cosines(query: Tensor, key: Tensor) -> Tensor:
    """Return the cosine of each query (B, H, Q, D) with keys (B, Hkv, R, D): (B, H, Q, R)."""
    batch, num_heads, num_queries, dim = query.shape
    grouped = query.float().reshape(batch, key.shape[1], -1, dim)  # (B, Hkv, G * Q, D)
    grouped = torch.nn.functional.normalize(grouped, dim=-1, eps=1e-12)
    key = torch.nn.functional.normalize(key.float(), dim=-1, eps=1e-12)
    return (grouped @ key.transpose(-1, -2)).view(batch, num_heads, num_queries, -1)
