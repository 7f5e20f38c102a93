"""One call of a layer's attention: what transformers hands over, and what the family adds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from emt.attention.alibi import Alibi
from emt.errors import UnsupportedModelError

_CHUNK_BYTES = 64 * 2**20  # what one chunk of queries may take for its logits or its memories

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class AttentionCall:
    """One call of a layer's attention, as transformers makes it.

    Attributes:
        module: the attention module.
        query: (B, H, Q, D), after norms and RoPE.
        key: (B, Hkv, S, D), KV heads not repeated.
        value: (B, Hkv, S, Dv).
        attention_mask: (B, 1, Q, S) bool or additive; None for causal (Q > 1) or all visible
            (Q = 1).
        options: keywords: `scaling`, `softcap`, `sliding_window`, `s_aux` and what else the family
            passes.
        own: the model's own attention function.
        alibi: linear biases, of families with an adapter; not part of `attention_mask`.
        position_embeddings: cos and sin, from adapters of families that rotate their keys.
        rotate: `rotate(query, key, cos, sin)`, where the family's file has no such function.
        is_users_own: whether `own` is a function that the user registered, which does what nobody
            else knows.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    attention_mask: Tensor | None
    options: dict[str, Any]
    own: AttentionFunction
    alibi: Alibi | None = None
    position_embeddings: Any = None
    rotate: Callable[..., Any] | None = None
    is_users_own: bool = False

    def compute(self) -> tuple[Tensor, Tensor | None]:
        """Return the model's own attention, bit for bit."""
        return self.own(
            self.module, self.query, self.key, self.value, self.attention_mask, **self.options
        )

    @property
    def is_inline(self) -> bool:
        """Whether an adapter made it, whose `own` attention has keys and biases of its own."""
        return self.alibi is not None or self.position_embeddings is not None

    @property
    def layer_idx(self) -> int:
        """The layer, as the module itself numbers it."""
        layer_idx = getattr(self.module, "layer_idx", None)
        if not isinstance(layer_idx, int):
            raise UnsupportedModelError(
                f"{type(self.module).__name__} must have an integer layer_idx; got {layer_idx!r}. "
                "Its layers cannot be told apart."
            )
        return layer_idx

    @property
    def scaling(self) -> float:
        """The factor on the layer's logits."""
        scaling = self.options.get("scaling")
        return float(self.query.shape[-1] ** -0.5 if scaling is None else scaling)

    @property
    def softcap(self) -> float | None:
        """The layer's soft cap on logits."""
        return self.options.get("softcap")

    @property
    def sinks(self) -> Tensor | None:
        """Logits (H,) that take part in the softmax and carry no value (GPT-OSS)."""
        return self.options.get("s_aux")

    @property
    def mask(self) -> Tensor | None:
        """The mask of the keys that are there; a cache of fixed size may mask more."""
        mask = self.attention_mask
        return None if mask is None else mask[..., : self.key.shape[2]]


def check_options(call: AttentionCall) -> None:
    """Refuse a call that does more than attend.

    Raises:
        UnsupportedModelError: naming what it does.
    """
    for option in ("position_bias", "cache"):
        if call.options.get(option) is not None:
            raise UnsupportedModelError(
                f"memories cannot be read in a call with '{option}' (layer {call.layer_idx}). "
                "Detach the memory, or generate without continuous batching."
            )


def chunk_length(call: AttentionCall, topk: int) -> int:
    """Return how many queries to attend with at once, each to `topk` memories and its context."""
    batch, num_heads, num_queries, dim = call.query.shape
    memory_size = topk * (dim + call.value.shape[-1])
    per_query = 4 * batch * num_heads * max(call.key.shape[2], memory_size)
    return max(min(_CHUNK_BYTES // per_query, num_queries), 1)
