"""One forward of a model: tokens in, the keys, values and queries of every layer out."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from emt.ingest.sinks import SinkFinder
from emt.model.devices import input_device, no_autocast
from emt.model.rope import PositionEmbeddings, Unrotation, as_cos_sin
from emt.model.watch import watching
from memory_backends import Rows
from memory_backends.layout import Int32Array


class LayerStates(NamedTuple):
    """What each layer computed for the last n tokens of a forward.

    Attributes:
        keys: layer -> (B, Hkv, n, D), at position 0.
        values: layer -> (B, Hkv, n, Dv).
        queries: layer -> (B, H, n, D), after norms and RoPE.
        embeddings: layer -> cos and sin of the tokens' positions, each (B or 1, n, rotary dims);
            only of layers that rotate their keys.
        scaling: layer -> the factor of its attention logits.
    """

    keys: dict[int, Tensor]
    values: dict[int, Tensor]
    queries: dict[int, Tensor]
    embeddings: dict[int, PositionEmbeddings]
    scaling: dict[int, float]


@dataclass(frozen=True)
class RowReader:
    """Runs a decoder over tokens, and makes rows of its keys and values.

    Attributes:
        unrotations: layer -> how to bring its keys to position 0; None leaves them where they are.
        drop_ids: token ids that leave no rows; other tokens attend to them all the same.
    """

    decoder: PreTrainedModel
    unrotations: Mapping[int, Unrotation | None]
    drop_ids: Collection[int] = ()

    @torch.no_grad()
    def forward(self, input_ids: Tensor, *, skip: int = 0, **options: Any) -> LayerStates:
        """Run the model over tokens, as if it had no memory.

        Args:
            input_ids: (B, Q) int64, on any device.
            skip: how many of the first tokens to return nothing of.
            **options: further arguments of the decoder, such as a cache with earlier tokens.

        Returns:
            The states of the last n = Q - `skip` tokens.
        """
        device = input_device(self.decoder)
        with watching(self.decoder) as seen, no_autocast(device):
            self.decoder(input_ids=input_ids.to(device), **{"use_cache": False, **options})
        states = LayerStates({}, {}, {}, {}, {})
        last = slice(skip - input_ids.shape[1], None)  # keys of a cache come before them
        for call in seen.calls:
            layer_idx = call.layer_idx
            if layer_idx not in self.unrotations:
                continue
            unrotate, key = self.unrotations[layer_idx], call.key[:, :, last]
            if unrotate is not None:
                cos, sin = as_cos_sin(seen.position_embeddings[call.module])
                embeddings = cos[..., last, :], sin[..., last, :]
                key = unrotate(key, embeddings)
                states.embeddings[layer_idx] = embeddings
            states.keys[layer_idx] = key
            states.values[layer_idx] = call.value[:, :, last]
            states.queries[layer_idx] = call.query[:, :, last]
            states.scaling[layer_idx] = call.scaling
        return states

    def rows(
        self,
        states: LayerStates,
        token_ids: Tensor,
        *,
        sinks: SinkFinder,
        first_token: int = 0,
        sequence: int = 0,
    ) -> Rows:
        """Return the rows of tokens; views of the states, unless a token in between is dropped.

        Args:
            states: of at least these n tokens.
            token_ids: (n,) int64.
            sinks: of their document, which has seen the windows before this one.
            first_token: the place of the first of them in its document.
            sequence: which of the B sequences.
        """
        is_kept = np.isin(token_ids.cpu().numpy(), sorted(self.drop_ids), invert=True)
        kept = np.flatnonzero(is_kept).astype(np.int32)
        keys, values, queries = (
            {idx: _select(tensor[sequence], kept) for idx, tensor in part.items()}
            for part in (states.keys, states.values, states.queries)
        )
        is_sink = sinks.find(keys, queries, states.scaling)
        return Rows(keys, values, kept + np.int32(first_token), is_sink, queries)


def _select(tensor: Tensor, kept: Int32Array) -> Tensor:
    """Return tokens `kept` (m,) of (heads, n, dim): (heads, m, dim)."""
    if len(kept) and kept[-1] - kept[0] == len(kept) - 1:
        return tensor[:, kept[0] : kept[-1] + 1]
    return tensor.index_select(1, torch.from_numpy(kept).to(tensor.device))
