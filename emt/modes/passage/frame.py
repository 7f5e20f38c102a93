"""One forward with passages in it: where its tokens and their rows stand, and what queries see.

The rows stand at positions at, at + 1, ..., as if the prompt had R more tokens there. Tokens from
`at` on are R positions further back and see the rows; those before neither move nor see them. A
window or a chunk of a layer is measured in these positions, too: what the model's own mask hides
stays hidden, and what the rows have pushed out of a window is hidden as well.

Shapes: **B** batch, or 1 where all sequences are alike; **Q** query length; **S** local key length;
**R** rows of passages.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from emt.attention.alibi import Alibi
from emt.attention.softmax import visible_to
from emt.model.attention_call import AttentionCall
from emt.model.forward import Forward
from emt.modes.passage.attend import attend_inline
from emt.modes.passage.reach import Reach
from emt.modes.passage.rows import PlacedRows, sequences_per_prompt


@dataclass
class Frame:
    """Where the tokens of one forward stand.

    Attributes:
        rows: the rows of the passages.
        index: (B, Q) int64, each query's token of the prompt, padding not counted.
        num_tokens: tokens of the cache and of this forward, padding counted.
        padding: (B, num_tokens), 0 where there is a token of padding; None if not known or none.
        is_unpadded: no sequence is padded: `index` is the same for all.
        sliding_offset: the first token that layers with a window still have.
    """

    rows: PlacedRows
    index: Tensor
    num_tokens: int
    padding: Tensor | None
    is_unpadded: bool
    sliding_offset: int = 0
    _masks: dict[Any, tuple[Tensor | None, Tensor | None]] = field(default_factory=dict)
    _scratch: dict[Any, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        device, rows = self.index.device, self.rows
        batch = len(self.index)
        self._at = self._of_sequences(rows.at, batch).to(device)[:, None]  # (B or 1, 1)
        self._lengths = self._of_sequences(rows.lengths, batch).to(device)[:, None]
        self._order = torch.arange(rows.ids.shape[1], device=device)
        self.positions = self._moved(self.index)

    @classmethod
    def of(cls, rows: PlacedRows, forward: Forward) -> Self:
        """Return the frame of a forward.

        Raises:
            ConfigError, UnsupportedModelError: as `NewTokens.of`.
            MemoryUseError: the batch is not a multiple of the prompts that have rows.
        """
        tokens, index = forward.tokens, forward.tokens.index
        if len(rows.ids) > 1:
            sequences_per_prompt(tokens.batch, len(rows.ids))
            index = index.expand(tokens.batch, -1)
        offset = _sliding_offset(forward.cache, tokens.num_new)
        return cls(rows, index, tokens.num_tokens, tokens.padding, tokens.is_unpadded, offset)

    @staticmethod
    def _of_sequences(part: Tensor, batch: int) -> Tensor:
        """Return what n prompts have, (n,), for each sequence, (B,); (1,) where all are alike."""
        return part if len(part) == 1 else part.repeat_interleave(batch // len(part), 0)

    @property
    def first_place(self) -> Tensor:
        """The token of each sequence that its rows are put before, (B or 1, 1) int64."""
        return self._at

    def _moved(self, index: Tensor) -> Tensor:
        """Return positions (B, n) of tokens (B, n)."""
        return index + self._lengths * (index >= self._at)

    @property
    def end(self) -> int:
        """One after the last position, or more: padding is counted."""
        return self.num_tokens + self.rows.ids.shape[1]

    def moved(self, forward: Forward) -> Forward:
        """Return the forward with its tokens at their positions behind the rows."""
        if not forward.takes_positions:
            return forward
        tokens = forward.tokens
        if not tokens.is_unpadded or tokens.num_new == 1:
            return forward.replacing(position_ids=self.positions)
        # Without a mask, positions with a gap are taken for several prompts in one.
        mask = self.index.new_ones(tokens.batch, tokens.num_tokens)
        return forward.replacing(position_ids=self.positions, attention_mask=mask)

    def place(self, call: AttentionCall, reach: Reach) -> AttentionCall:
        """Return a call with the rows before its local keys."""
        keys, values = self.rows.of_layer(call.layer_idx, call.key)
        if reach.size is not None and self.end <= reach.size:
            reach = Reach()  # nothing is out of it yet
        is_windowed = call.key.shape[2] < self.num_tokens
        offset = self.sliding_offset if is_windowed else 0
        kind = (reach, call.query.shape[2], call.key.shape[2], offset)
        given = call.attention_mask
        cached = self._masks.get(kind)
        if cached is None or cached[0] is not given:  # layers of a kind share one mask
            self._masks[kind] = cached = given, self._mask(call, reach, offset)
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

    def _joined(self, name: str, rows: Tensor, local: Tensor) -> Tensor:
        """Return rows and local ones, (B, Hkv, R + S, D), good until the next layer asks.

        All layers of a forward write to the same memory: it stays in the processor's caches, which
        is worth some percent of a decode step.
        """
        if torch.is_grad_enabled():
            return torch.cat([rows, local], dim=2)
        batch, num_heads, num_keys, dim = local.shape
        shape = (batch, num_heads, rows.shape[2] + num_keys, dim)
        buffer = (name, shape, local.dtype, local.device)
        if buffer not in self._scratch:
            self._scratch[buffer] = local.new_empty(shape)
        return torch.cat([rows, local], dim=2, out=self._scratch[buffer])

    def _row_positions(self) -> Tensor:
        positions = self._at + self._order  # (B or 1, R)
        return positions.expand(len(self.positions), -1) if len(positions) == 1 else positions

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
                is_token = (index >= 0) & self._is_token(place)
                local = ((place <= last) & is_token[:, None])[:, None]
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
            and self.is_unpadded
            and self.rows.are_full
            and self.num_tokens > self.rows.last_at
        )


def _bias(call: AttentionCall, alibi: Alibi | None) -> dict[str, Any]:
    return {**call.options, "bias": None if alibi is None else alibi.keys}


def _sliding_offset(cache: Any, num_queries: int) -> int:
    """Return the first token that layers with a window still have."""
    sliding = getattr(cache, "is_sliding", None)
    if not sliding or True not in sliding:
        return 0
    return int(cache.get_mask_sizes(num_queries, list(sliding).index(True))[1])
