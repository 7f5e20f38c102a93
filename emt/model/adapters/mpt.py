"""MPT: ALiBi, multi-head attention.

Source: `MptAttention.forward` in transformers' models/mpt/modeling_mpt.py.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from emt.attention.alibi import Alibi
from emt.model.adapters.common import attend, cached
from emt.model.attention_call import AttentionCall

ATTENTION = "transformers.models.mpt.modeling_mpt.MptAttention"


def forward(
    self: Any,
    hidden_states: Tensor,
    position_bias: Tensor,
    past_key_values: Cache | None = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute one layer's attention.

    `position_bias` is (H, 1, max_seq_len), 0 at the last key and falling before; `attention_mask`
    is (B, 1, Q, S) bool, True is hidden.
    """
    batch, num_queries, _ = hidden_states.shape
    mixed = self.Wqkv(hidden_states)
    if self.clip_qkv:
        mixed = mixed.clamp(min=-self.clip_qkv, max=self.clip_qkv)
    query, key, value = (
        part.reshape(batch, num_queries, self.n_heads, self.head_dim).transpose(1, 2)
        for part in mixed.chunk(3, dim=2)
    )
    key, value = cached(past_key_values, self, key, value)
    bias = position_bias[None, :, :, max(position_bias.shape[2] - key.shape[2], 0) :]
    output, weights = attend(
        AttentionCall(
            self,
            query,
            key,
            value,
            None if attention_mask is None else ~attention_mask,
            {"scaling": self.softmax_scale},
            functools.partial(_own, bias=bias),
            alibi=Alibi(bias, position_bias[:, 0, -1] - position_bias[:, 0, -2]),
        )
    )
    return self.out_proj(output), weights


def _own(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    bias: Tensor,
) -> tuple[Tensor, Tensor]:
    """Compute the family's own attention, bit for bit."""
    logits = query @ key.transpose(-1, -2) * scaling + bias
    if attention_mask is not None:
        logits = logits.masked_fill(~attention_mask, torch.finfo(query.dtype).min)
    weights = torch.softmax(logits.float(), dim=-1).to(value.dtype)
    weights = nn.functional.dropout(weights, p=module.attn_dropout_p, training=module.training)
    return (weights @ value).transpose(1, 2), weights
