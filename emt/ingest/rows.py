"""One forward of a model: tokens in, the keys, values and queries of every layer out."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from emt.model.devices import input_device, no_autocast
from emt.model.hook import watching
from emt.model.rope import PositionEmbeddings, Unrotation, as_cos_sin
from memory_backends import Rows
from memory_backends.layout import Int32Array

SINK_ROWS = 4  # the first tokens a model sees; most heads park their attention there


@dataclass(frozen=True)
class Reader:
    """A model that reads, and what is kept of what it reads.

    Attributes:
        decoder: the model without its language-model head, attached or being attached.
        unrotations: layer -> how to bring its keys to position 0; None leaves them where they are.
        drop_ids: token ids whose rows are left out, after the others have attended to them.
    """

    decoder: PreTrainedModel
    unrotations: Mapping[int, Unrotation | None]
    drop_ids: Collection[int] = ()

    @torch.no_grad()
    def read(self, input_ids: Tensor, *, skip: int = 0, **options: Any) -> Reading:
        """Run the model over tokens, as if it had no memory.

        Args:
            input_ids: (B, Q) int64, on any device.
            skip: how many of the Q tokens, from the first, to return nothing of.
            **options: further arguments of the decoder; a cache may hold what came before.

        Returns:
            What the last n = Q - `skip` tokens have become.
        """
        device = input_device(self.decoder)
        with watching(self.decoder) as seen, no_autocast(device):
            self.decoder(
                input_ids=input_ids.to(device),
                **{"use_cache": False, **options},
            )
        reading = Reading({}, {}, {}, {})
        new = slice(skip - input_ids.shape[1], None)  # with a cache, keys have earlier ones first
        for call in seen.calls:
            layer_idx = call.layer_idx
            if layer_idx not in self.unrotations:
                continue
            unrotate, key = self.unrotations[layer_idx], call.key[:, :, new]
            if unrotate is not None:
                cos, sin = as_cos_sin(seen.position_embeddings[call.module])
                embeddings = cos[..., new, :], sin[..., new, :]
                key = unrotate(key, embeddings)
                reading.embeddings[layer_idx] = embeddings
            reading.keys[layer_idx] = key
            reading.values[layer_idx] = call.value[:, :, new]
            reading.queries[layer_idx] = call.query[:, :, new]
        return reading

    def rows(
        self,
        reading: Reading,
        token_ids: Tensor,
        *,
        first_token: int,
        num_before: int,
        sequence: int = 0,
    ) -> Rows:
        """Return the rows of tokens that were read; views, where no row in between is dropped.

        Args:
            reading: of at least these n tokens.
            token_ids: (n,) int64.
            first_token: where in its document the first of them stands.
            num_before: how many tokens the first of them could attend to.
            sequence: which of the B sequences.
        """
        is_kept = np.isin(token_ids.cpu().numpy(), sorted(self.drop_ids), invert=True)
        kept = np.flatnonzero(is_kept).astype(np.int32)
        keys, values, queries = (
            {idx: _picked(tensor[sequence], kept) for idx, tensor in part.items()}
            for part in (reading.keys, reading.values, reading.queries)
        )
        sinks = kept + num_before < SINK_ROWS
        return Rows(keys, values, kept + np.int32(first_token), sinks, queries)


class Reading(NamedTuple):
    """What one forward made of its last n tokens, layer by layer.

    Attributes:
        keys: (B, Hkv, n, D), at position 0.
        values: (B, Hkv, n, Dv).
        queries: (B, H, n, D), after norms and RoPE.
        embeddings: cos and sin of the tokens' positions, each (B or 1, n, rotary dims); of layers
            that rotate their keys.
    """

    keys: dict[int, Tensor]
    values: dict[int, Tensor]
    queries: dict[int, Tensor]
    embeddings: dict[int, PositionEmbeddings]


def _picked(tensor: Tensor, kept: Int32Array) -> Tensor:
    """Return tokens `kept` (m,) of (heads, n, dim): (heads, m, dim)."""
    if len(kept) and kept[-1] - kept[0] == len(kept) - 1:
        return tensor[:, kept[0] : kept[-1] + 1]
    return tensor.index_select(1, torch.from_numpy(kept).to(tensor.device))
