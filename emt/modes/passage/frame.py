"""One forward with recalled rows: where its tokens stand, and what they see.

Rows stand at positions at, at + 1, ..., as if the prompt had R more tokens there. Tokens from `at`
on are R positions further back and see the rows; those before neither move nor see them. A window
or a chunk of a layer is measured in these positions, too: what the model's own mask hides stays
hidden, and what the rows have pushed out of a window is hidden as well.

Shapes: **B** batch, or 1 where all sequences are alike; **Q** query length; **S** local key length;
**R** recalled rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from emt.attention.alibi import Alibi
from emt.attention.softmax import visible_to
from emt.errors import UnsupportedModelError
from emt.model.hook import AttentionCall
from emt.modes.passage.rows import RecalledRows


@dataclass(frozen=True)
class Reach:
    """How far the queries of a layer see.

    Attributes:
        size: positions; None for all.
        is_chunked: they see those of their own chunk of `size` positions, not the last `size`.
    """

    size: int | None = None
    is_chunked: bool = False


def reach_of(config: PreTrainedConfig, call: AttentionCall) -> Reach:
    """Return how far a layer sees.

    Raises:
        UnsupportedModelError: it does not see everything, and nothing says how far.
    """
    kinds = getattr(config, "layer_types", None)
    kind = kinds[call.layer_idx] if kinds and call.layer_idx < len(kinds) else ""
    size: Any
    if "chunked" in kind:
        size = getattr(config, "attention_chunk_size", None)
    elif "sliding" in kind or not kind:
        size = call.options.get("sliding_window")
        size = getattr(config, "sliding_window", None) if size is None and kind else size
    elif "window" in kind:
        size = None
    else:
        return Reach()
    if size is None and kind:
        raise UnsupportedModelError(
            f"{config.model_type}: layer {call.layer_idx} is of the kind '{kind}' and does not say "
            "how many tokens it sees, so passages cannot be put into its context."
        )
    return Reach(size, "chunked" in kind)


@dataclass
class Frame:
    """Where the tokens of one forward stand.

    Attributes:
        rows: what is recalled.
        index: (B, Q) int64, each query's token of the prompt, padding not counted.
        num_tokens: tokens of the cache and of this forward, padding counted.
        padding: (B, num_tokens), 0 where there is a token of padding; None if not known or none.
        is_bare: no sequence is padded: `index` is the same for all.
        sliding_offset: the first token that layers with a window still have.
    """

    rows: RecalledRows
    index: Tensor
    num_tokens: int
    padding: Tensor | None
    is_bare: bool
    sliding_offset: int = 0
    _masks: dict[Any, tuple[Tensor | None, Tensor | None]] = field(default_factory=dict)
    _scratch: dict[Any, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        device, (n, num_rows) = self.index.device, self.rows.ids.shape
        self._at = self.rows.at.to(device)[:, None]  # (n, 1)
        self._lengths = self.rows.lengths.to(device)[:, None]
        if n > 1:
            times = len(self.index) // n
            self._at = self._at.repeat_interleave(times, 0)
            self._lengths = self._lengths.repeat_interleave(times, 0)
        self._order = torch.arange(num_rows, device=device)
        self.positions = self._moved(self.index)

    def _moved(self, index: Tensor) -> Tensor:
        """Return positions (B, n) of tokens (B, n)."""
        return index + self._lengths * (index >= self._at)

    @property
    def end(self) -> int:
        """One after the last position, or more: padding is counted."""
        return self.num_tokens + self.rows.ids.shape[1]

    def place(self, call: AttentionCall, reach: Reach) -> AttentionCall:
        """Return a call with the rows before its local keys."""
        keys, values = self.rows.of_layer(call.layer_idx, call.key)
        if reach.size is not None and self.end <= reach.size:
            reach = Reach()  # nothing is out of it yet
        is_windowed = call.key.shape[2] < self.num_tokens
        offset = self.sliding_offset if is_windowed else 0
        known = (reach, call.query.shape[2], call.key.shape[2], offset)
        given = call.attention_mask
        cached = self._masks.get(known)
        if cached is None or cached[0] is not given:  # layers of a kind share one
            mask = self._mask(call, reach, offset)
            self._masks[known] = cached = given, mask
        placed = replace(
            call,
            key=self._joined("keys", keys, call.key),
            value=self._joined("values", values, call.value),
            attention_mask=cached[1],
        )
        if not call.is_inline:
            return placed
        alibi = call.alibi
        if alibi is not None:
            stand = torch.cat(
                [self._row_positions(), self._moved(self._key_index(call, offset))], dim=1
            )
            from_last = (stand - self.positions[:, -1:]).float()[:, None, None]  # (B, 1, 1, R + S)
            slopes = alibi.slopes.float()
            alibi = Alibi(from_last * slopes.view(1, -1, 1, 1), slopes)
        return replace(placed, own=attend_inline, alibi=alibi, options=_bias(call, alibi))

    def _joined(self, what: str, rows: Tensor, local: Tensor) -> Tensor:
        """Return rows and local ones, (B, Hkv, R + S, D), good until the next layer asks.

        All layers of a forward write to the same memory: it stays in the processor's caches, which
        is worth some percent of a decode step.
        """
        if torch.is_grad_enabled():
            return torch.cat([rows, local], dim=2)
        batch, num_heads, num_keys, dim = local.shape
        shape = (batch, num_heads, rows.shape[2] + num_keys, dim)
        known = (what, shape, local.dtype, local.device)
        if known not in self._scratch:
            self._scratch[known] = local.new_empty(shape)
        return torch.cat([rows, local], dim=2, out=self._scratch[known])

    def _row_positions(self) -> Tensor:
        found = self._at + self._order  # (n, R)
        return found.expand(len(self.positions), -1) if len(found) == 1 else found

    def _key_index(self, call: AttentionCall, offset: int) -> Tensor:
        """Return each local key's token of the prompt, (B, S); beyond the last, any number."""
        num_keys, device = call.key.shape[2], self.index.device
        place = torch.arange(offset, offset + num_keys, device=device)
        if self.padding is None:
            padded = self.num_tokens - 1 - self.index[:, -1:]  # on the left
            return place - padded
        index = self.padding.long().cumsum(-1) - 1  # (B, num_tokens)
        return index[:, place.clamp(max=self.num_tokens - 1)]

    def _mask(self, call: AttentionCall, reach: Reach, offset: int) -> Tensor | None:
        """Return what the queries see, (B, 1, Q, R + S), of the kind that the call was given."""
        given, num_queries, num_keys = call.attention_mask, call.query.shape[2], call.key.shape[2]
        if self._sees_everything(call, reach):
            return None
        if given is not None:
            given = given[..., :num_keys]  # a cache of fixed size may mask more
            local = given if given.dtype == torch.bool else given > torch.finfo(given.dtype).min / 2
        elif num_queries == 1:
            local = torch.ones(1, 1, 1, num_keys, dtype=torch.bool, device=self.index.device)
        else:  # as in transformers' sdpa
            local = visible_to(0, num_queries, num_keys, self.index.device)[None, None]
        local = local.to(self.index.device)
        # Where the last layers keep no keys, a prompt's last token may be their only query.
        queries = self.positions[:, -num_queries:, None]  # (B, Q, 1)
        rows = self._row_positions()[:, None]  # (B, 1, R)
        follows = self.index[:, -num_queries:] >= self._at  # (B, Q)
        remembered = follows[:, :, None] & (self._order < self._lengths)[:, None]
        if reach.size is not None:
            index = self._key_index(call, offset)
            keys = self._moved(index)[:, None]  # (B, 1, S)
            if reach.is_chunked:
                # The model's own chunks are counted without the rows: see them all, then cut anew.
                place = torch.arange(offset, offset + num_keys, device=self.index.device)
                last = torch.arange(num_queries, device=self.index.device)[:, None]
                last = last + (self.num_tokens - num_queries)
                there = (index >= 0) & self._is_token(place)
                local = ((place <= last) & there[:, None])[:, None]
                local = local & (keys // reach.size == queries // reach.size)[:, None]
                remembered = remembered & (rows // reach.size == queries // reach.size)
            else:
                local = local & (queries - keys < reach.size)[:, None]
                remembered = remembered & (queries - rows < reach.size)
        batch = max(len(local), len(remembered))
        visible = torch.cat(
            [
                remembered[:, None].expand(batch, local.shape[1], -1, -1),
                local.expand(batch, -1, -1, -1),
            ],
            dim=-1,
        ).to(call.key.device)
        if given is None and (call.is_inline or call.own is sdpa_attention_forward):
            return visible
        if given is not None and given.dtype == torch.bool:
            return visible
        dtype = call.query.dtype if given is None else given.dtype
        added = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        if given is not None and not reach.is_chunked:  # it may hold more than yes and no
            added[..., -num_keys:] += given
        return added.masked_fill(~visible, torch.finfo(dtype).min)

    def _is_token(self, place: Tensor) -> Tensor:
        """Tell which places of local keys are not padding, (B, S) or (1, S)."""
        within = place < self.num_tokens
        if self.padding is None:
            return within[None]
        return (self.padding[:, place.clamp(max=self.num_tokens - 1)] != 0) & within

    def _sees_everything(self, call: AttentionCall, reach: Reach) -> bool:
        """Tell whether one query, of each sequence, sees all rows and keys: no mask is needed."""
        return (
            call.attention_mask is None
            and call.query.shape[2] == 1
            and reach.size is None
            and self.is_bare
            and self.rows.fills
            and self.num_tokens > self.rows.last_at
        )


def _bias(call: AttentionCall, alibi: Alibi | None) -> dict[str, Any]:
    return {**call.options, "bias": None if alibi is None else alibi.keys}


def attend_inline(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    bias: Tensor | None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attend as families without transformers' attention functions do.

    Their own code has keys and biases of its own at hand and takes no others.

    Args:
        module: ignored.
        query: (B, H, Q, D).
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        attention_mask: (B or 1, 1, Q, S), bool (True is visible) or additive; None if all is seen.
        scaling: factor on logits.
        bias: (B or 1, H, 1, S) float32, added to logits; or None.

    Returns:
        Output (B, Q, H, Dv) and weights (B, H, Q, S), computed in float32.
    """
    batch, num_heads, num_queries, dim = query.shape
    grouped = (query.float() * scaling).reshape(batch, key.shape[1], -1, dim)  # (B, Hkv, G * Q, D)
    logits = (grouped @ key.float().transpose(-1, -2)).view(batch, num_heads, num_queries, -1)
    if bias is not None:
        logits = logits + bias.to(logits.device)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        logits = logits.masked_fill(~attention_mask, torch.finfo(logits.dtype).min)
    elif attention_mask is not None:
        logits = logits + attention_mask.float()
    weights = torch.softmax(logits, dim=-1)
    spread = weights.view(batch, key.shape[1], -1, weights.shape[-1])  # (B, Hkv, G * Q, S)
    output = (spread @ value.float()).view(batch, num_heads, num_queries, -1)
    return output.transpose(1, 2).to(query.dtype), weights.to(query.dtype)
