"""Exact search: inner products with unit keys, block by block, and the best of them."""

from __future__ import annotations

from collections.abc import Iterable

import torch

_SCORES_AT_ONCE = 2**26  # float32 scores in one matrix product: 256 MiB


def best_rows(
    queries: torch.Tensor, blocks: Iterable[torch.Tensor], k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the keys with the highest inner product.

    Args:
        queries: (Hkv, N, head_dim) float32.
        blocks: one after another, each (Hkv, n, head_dim) float32 on the queries' device.
        k: at most as many as there are keys.

    Returns:
        Inner products and positions, counted over all blocks, each (Hkv, N, k), best first.
    """
    scores = queries.new_empty(*queries.shape[:2], 0)
    positions = torch.empty(scores.shape, dtype=torch.int64, device=queries.device)
    first = 0
    for keys in blocks:
        step = max(_SCORES_AT_ONCE // max(keys.shape[0] * keys.shape[1], 1), 1)
        parts = [
            (chunk @ keys.transpose(1, 2)).topk(min(k, keys.shape[1]), dim=-1)  # of (Hkv, step, n)
            for chunk in torch.split(queries, step, dim=1)
        ]
        best = torch.cat([part.values for part in parts], dim=1)  # (Hkv, N, k)
        at = torch.cat([part.indices for part in parts], dim=1)
        if first:
            best, at = torch.cat([scores, best], -1), torch.cat([positions, at + first], -1)
            best, order = best.topk(min(k, best.shape[-1]), dim=-1)
            at = at.gather(-1, order)
        scores, positions = best, at
        first += keys.shape[1]
    return scores, positions
