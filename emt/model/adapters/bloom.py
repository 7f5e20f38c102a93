"""Bloom: ALiBi, multi-head attention.

Source: `BloomAttention.forward` in transformers' models/bloom/modeling_bloom.py.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from emt.attention.alibi import Alibi
from emt.errors import UnsupportedModelError
from emt.model.adapters.common import attend, cached, slopes_of
from emt.model.attention_call import AttentionCall

ATTENTION = "transformers.models.bloom.modeling_bloom.BloomAttention"


def forward(
    self: Any,
    hidden_states: Tensor,
    residual: Tensor,
    alibi: Tensor,
    attention_mask: Tensor,
    layer_past: Cache | None = None,
    use_cache: bool = False,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute one layer's attention and add the residual, (B, Q, hidden_size).

    `alibi` is (B * H, 1, S), 0 at the first visible key and rising; `attention_mask` is
    (B, 1, Q, S), additive.

    Raises:
        UnsupportedModelError: the output projection is to be computed in slices.
    """
    if self.pretraining_tp > 1 and self.slow_but_exact:
        raise UnsupportedModelError(
            f"bloom: slow_but_exact with pretraining_tp={self.pretraining_tp} cannot be combined "
            "with memories. Set slow_but_exact to false in the model's config."
        )
    batch, num_queries, _ = hidden_states.shape
    mixed = self.query_key_value(hidden_states)
    mixed = mixed.view(batch, num_queries, self.num_heads, 3, self.head_dim)
    query, key, value = (mixed[..., part, :].transpose(1, 2) for part in range(3))
    key, value = cached(layer_past, self, key, value)
    output, weights = attend(
        AttentionCall(
            self,
            query,
            key,
            value,
            attention_mask,
            {"scaling": self.inv_norm_factor, "output_attentions": output_attentions},
            functools.partial(_own, alibi=alibi),
            alibi=Alibi(alibi.view(batch, self.num_heads, 1, -1), slopes_of(self, alibi)),
        )
    )
    output = nn.functional.dropout(
        self.dense(output), p=self.hidden_dropout, training=self.training
    )
    return residual + output, weights


def _own(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    alibi: Tensor,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Compute the family's own attention, bit for bit."""
    batch, num_heads, num_queries, _ = query.shape
    flat = [part.reshape(batch * num_heads, -1, part.shape[-1]) for part in (query, key, value)]
    logits = alibi.baddbmm(flat[0], flat[1].transpose(1, 2), beta=module.beta, alpha=scaling)
    logits = logits.view(batch, num_heads, num_queries, -1)
    if attention_mask is not None:
        logits = logits + attention_mask
    weights = torch.softmax(logits, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = module.attention_dropout(weights)
    output = torch.bmm(weights.view(batch * num_heads, num_queries, -1), flat[2])
    return output.view(batch, num_heads, num_queries, -1).transpose(1, 2), weights
