"""Linear biases on logits (ALiBi): local keys and memories in the same frame.

A model with ALiBi adds `slope(head) * position of the key` to logits, from an origin of its own
choice. Memories and local keys meet in one softmax, so both must be counted from the same origin:
a memory stands one step before the first local key that can be seen.

Source: Press et al., Train Short, Test Long (arXiv 2108.12409). One step before the first local
token is where Extended Mind Transformers (arXiv 2406.02332) puts MPT's memories.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

HIDDEN = -1e4  # what additive masks put on hidden keys is below, in any dtype


@dataclass(frozen=True)
class Alibi:
    """The biases of one attention call.

    Attributes:
        keys: (B or 1, H, 1, S), what is added to the logits of local keys.
        slopes: (H,), how much a key's bias falls with each step back.
        distance: ids of memories, (B, H, Q, k) int64, to steps before the first visible local key,
            of the same shape; None for one step.
    """

    keys: Tensor
    slopes: Tensor
    distance: Callable[[Tensor], Tensor] | None = None

    def of_keys(self, attention_mask: Tensor | None) -> Tensor:
        """Return what is added to local logits, (B or 1, H, Q or 1, S) float32, the mask included.

        Args:
            attention_mask: (B or 1, 1 or H, Q, S), bool (True is visible) or additive.
        """
        bias = self.keys.float()
        if attention_mask is None:
            return bias
        if attention_mask.dtype == torch.bool:
            return torch.where(attention_mask, bias, -torch.inf)
        return bias + attention_mask.float()

    def of_memories(self, attention_mask: Tensor | None, ids: Tensor | None = None) -> Tensor:
        """Return what is added to memory logits, (B or 1, H, 1, 1) or (B, H, Q, k) float32.

        Args:
            attention_mask: (B or 1, 1 or H, Q, S) of all queries of the call, which tells each
                sequence's first visible key; None if that is the first of all.
            ids: (B, H, Q, k) int64, the memories; needed if `distance` is set.
        """
        first = self.keys.float()[..., :1]  # (B or 1, H, 1, 1)
        if attention_mask is not None:
            at = _first_visible(attention_mask)[:, None, None, None]  # (B or 1, 1, 1, 1)
            batch, num_heads = max(len(self.keys), len(at)), self.keys.shape[1]
            keys = self.keys.float().expand(batch, -1, -1, -1)
            first = keys.gather(-1, at.expand(batch, num_heads, 1, 1))
        slopes = self.slopes.float().view(1, -1, 1, 1)
        if self.distance is None:
            return first - slopes
        if ids is None:
            raise ValueError("memories are placed by their ids here; got none.")
        return first - slopes * self.distance(ids)


def _first_visible(attention_mask: Tensor) -> Tensor:
    """Return the first key that any query of a sequence sees, (B or 1,) int64."""
    mask = attention_mask[:, 0]  # (B or 1, Q, S)
    visible = mask if mask.dtype == torch.bool else mask > HIDDEN
    return visible.any(dim=1).int().argmax(dim=-1)  # the first of the largest
