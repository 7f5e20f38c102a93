"""A batch of prompts taken apart: without padding, and which are the same prompt's beams."""

from __future__ import annotations

import torch
from torch import Tensor

from emt.model.forward import NewTokens


def unpadded(token_ids: Tensor, new: NewTokens) -> list[Tensor]:
    """Return the tokens of each prompt of a batch, (B, T), without padding.

    Args:
        token_ids: (B, T) int64, all tokens of the prompts, or the first T of them.
        new: what the forward says of them.
    """
    if new.padding is not None:
        is_token = new.padding[:, : token_ids.shape[1]].to(token_ids.device) != 0
        return [row[mask] for row, mask in zip(token_ids, is_token, strict=True)]
    # Padding stands on the left; the place of the last token tells how many there are.
    last = new.index[:, -1].expand(len(token_ids)).tolist()
    padded = [new.num_tokens - 1 - place for place in last]
    return [row[first:] for row, first in zip(token_ids, padded, strict=True)]


def same_runs(prompts: list[Tensor]) -> int:
    """Return how many equal prompts in a row each one has: beams and returned sequences."""
    for times in range(len(prompts), 0, -1):
        if len(prompts) % times:
            continue
        groups = [prompts[i : i + times] for i in range(0, len(prompts), times)]
        if all(torch.equal(group[0], other) for group in groups for other in group[1:]):
            return times
    return 1
