"""Attention of GPT-J and CodeGen: heads rotated in pairs of dims, by a table in each layer."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from emt.model.adapters.common import attend, cached
from emt.model.attention_call import AttentionCall
from emt.model.rope import PositionEmbeddings


def embeddings_at(module: Any, position_ids: Tensor) -> PositionEmbeddings:
    """Return cos and sin, each (B or 1, Q, rotary dims / 2), from the module's table."""
    table = module.embed_positions.to(position_ids.device)
    sin, cos = table[position_ids].chunk(2, dim=-1)
    return cos, sin


def rotated_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embeddings: PositionEmbeddings,
    cache: Cache | None,
    attention_mask: Tensor | None,
    *,
    cache_dtype: torch.dtype,
    output_attentions: bool | None,
) -> tuple[Tensor, Tensor | None]:
    """Rotate queries and keys, each (B, Q, H, D) as values are, attend, and project.

    `embeddings` are the cos and sin of the tokens' positions, `cache_dtype` is the one in which the
    family caches keys, and `attention_mask` is (B, 1, Q, S), additive. Returns the layer's output,
    (B, Q, hidden_size), and attention weights.
    """
    cos, sin = embeddings
    query, key = (_rotated(module, part, cos, sin).transpose(1, 2) for part in (query, key))
    value = value.transpose(1, 2)
    if cache is not None:
        key, value = cached(cache, module, key.to(cache_dtype), value)
    output, weights = attend(
        AttentionCall(
            module,
            query.to(value.dtype),
            key.to(value.dtype),
            value,
            attention_mask,
            {"scaling": 1 / module.scale_attn, "output_attentions": output_attentions},
            functools.partial(_own, query, key),
            position_embeddings=embeddings,
            rotate=functools.partial(_rotate_both, _rotation_of(module)),
        )
    )
    return module.resid_dropout(module.out_proj(output)), weights


def _own(
    query: Tensor,
    key: Tensor,
    module: Any,
    _query: Tensor,
    _key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Compute the family's own attention, bit for bit, from queries and keys before rounding."""
    output, weights = module._attn(query, key, value, mask)
    return output.transpose(1, 2), weights


def _rotated(module: Any, part: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries or keys, (B, Q, H, D), in as many dims as the family does."""
    num_rotated = part.shape[-1] if module.rotary_dim is None else module.rotary_dim
    turned: Tensor = _rotation_of(module)(part[..., :num_rotated], sin, cos)
    return torch.cat([turned, part[..., num_rotated:]], dim=-1)


def _rotation_of(module: nn.Module) -> Callable[..., Tensor]:
    """Return `apply_rotary_pos_emb(tensor, sin, cos)`, tensor (B, Q, H, D), of a module's file."""
    rotation: Callable[..., Tensor] = vars(sys.modules[type(module).__module__])[
        "apply_rotary_pos_emb"
    ]
    return rotation


def _rotate_both(
    rotate: Callable[..., Tensor], query: Tensor, key: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys, (B, H, Q, D) and (B, Hkv, Q, D)."""
    both = (rotate(part.transpose(1, 2), sin, cos).transpose(1, 2) for part in (query, key))
    return next(both), next(both)
