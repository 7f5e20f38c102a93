"""Steps that several adapters take: fill the cache, attend, measure the slopes of ALiBi."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from emt.model.attention_call import AttentionCall
from emt.model.hook import dispatch


def cached(cache: Cache | None, module: Any, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Add keys and values, (B, Hkv, Q, D), to a layer's cache; return all, (B, Hkv, S, D)."""
    if cache is None:
        return key, value
    keys, values = cache.update(key, value, module.layer_idx)
    return keys, values


def attend(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """Return the heads' joined outputs, (B, Q, H * Dv), and the attention weights or None."""
    output, weights = dispatch(call)
    return output.flatten(2), weights


def slopes_of(module: Any, alibi: Tensor) -> Tensor:
    """Return (H,), how much `alibi` rises from one key to the next, rounded as the family does."""
    build = vars(sys.modules[type(module).__module__])["build_alibi_tensor"]
    return _slopes(build, module.num_heads, alibi.dtype, alibi.device)


@functools.lru_cache(maxsize=8)  # all layers share them
def _slopes(
    build: Callable[..., Tensor], num_heads: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    with torch.inference_mode(False):  # a later step may want gradients
        two_keys = torch.ones(1, 2, dtype=torch.long, device=device)
        return build(two_keys, num_heads, dtype)[:, 0, 1]
