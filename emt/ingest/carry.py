"""Carried context: each token of a document is read once, after rows of the tokens before it.

A window of new tokens attends to a context: the document's first `SINK_ROWS` rows and its last
ones, as many as `max_length` leaves room for. Rows are kept at position 0, so the context is placed
anew for every window: its keys are turned to positions 0, 1, 2, ... by the model's own rotation,
the new tokens follow, and no position is beyond `max_length`, however long the document is. A
document of up to `max_length` tokens is one plain forward.

The cosines and sines are those the model handed to its layers when it read the first window, which
has every position that a context can take. (A model that adds learned positions to its embeddings
rotates nothing; its keys say where they were when they were read.)

Source: Xiao et al., Efficient Streaming Language Models with Attention Sinks (arXiv 2309.17453):
sections 3.1 and 3.2, keep the first rows, which four are enough for, and count positions in the
cache, not in the text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from emt.errors import ConfigError, UnsupportedModelError
from emt.ingest.rows import SINK_ROWS, Reader, Reading
from emt.model.rope import PositionEmbeddings, Unrotation
from memory_backends import Rows

_SAME = 1e-2  # cosines of equal positions, in any dtype; other frequencies differ far more


def check_carry(config: PreTrainedConfig, stride: int, max_length: int) -> None:
    """Refuse what cannot be encoded with carried context.

    Raises:
        ConfigError: a window of `stride` tokens leaves no room for sinks and one row more.
        UnsupportedModelError: layers that keep something else between tokens than keys and values.
    """
    if max_length - stride <= SINK_ROWS:
        raise ConfigError(
            f"with carry_context, max_length ({max_length}) must be at least stride ({stride}) + "
            f"{SINK_ROWS + 1}, so that there is context to carry. Lower stride, or set "
            "carry_context to false."
        )
    other = [
        f"{idx} ({type(layer).__name__})"
        for idx, layer in enumerate(DynamicCache(config=config).layers)
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer)
    ]
    if other:
        raise UnsupportedModelError(
            f"{config.model_type}: carry_context needs layers that keep keys and values "
            f"and nothing else; layers {', '.join(other)} do not. Set carry_context to false."
        )


def _check_cache(config: PreTrainedConfig, cache: DynamicCache, reading: Reading) -> None:
    """Refuse a model whose cache cannot be made of rows.

    Latent attention caches what it makes keys and values from, and some layers repeat KV heads
    before they attend.

    Args:
        config: names the model.
        cache: of a window.
        reading: of the same window.

    Raises:
        UnsupportedModelError: a layer caches something else than the keys and values it attends to.
    """
    for idx, value in reading.values.items():
        layer = cache.layers[idx] if idx < len(cache.layers) else None
        kept_key, kept = getattr(layer, "keys", None), getattr(layer, "values", None)
        if kept_key is not None and kept is not None:
            recent = value[:, :, value.shape[2] - kept.shape[2] :]  # all a sliding window keeps
            group = max(kept.shape[1] // value.shape[1], 1)  # Falcon caches KV heads repeated
            is_key_wide = kept_key.shape[3] == reading.keys[idx].shape[3]
            if is_key_wide and torch.equal(kept[:, ::group], recent):
                continue
        raise UnsupportedModelError(
            f"{config.model_type}: carry_context needs layers that keep the keys and values they "
            f"attend to; layer {idx} keeps something else. Set carry_context to false."
        )


def read_carrying(
    reader: Reader,
    token_ids: Tensor,
    *,
    stride: int,
    max_length: int,
    first_length: int | None = None,
) -> Iterator[Rows]:
    """Read one document, each token once.

    Args:
        reader: the model.
        token_ids: (T,) int64, on any device.
        stride: tokens in a window, after the first.
        max_length: tokens in a window and its context.
        first_length: tokens in the first window; `max_length` if None.

    Yields:
        The rows of one window, in order.

    Raises:
        As `check_carry`, if there is more than one window; UnsupportedModelError also if a layer
            caches something else than what it attends to, or the model rotates equal positions
            differently from window to window.
    """
    num_tokens, stop = len(token_ids), 0
    context = _Context(reader.unrotations)
    if num_tokens > (first_length or max_length):
        check_carry(reader.decoder.config, stride, max_length)
    while stop < num_tokens:
        length = stride if stop else first_length or max_length
        start, stop = stop, min(stop + length, num_tokens)
        new = token_ids[start:stop]
        num_before = 0
        if start:
            context.make_room(max_length - len(new))
            cache = context.cache(reader.decoder)
            num_before = len(context)
            reading = reader.read(new[None], past_key_values=cache, use_cache=True)
            del cache
        elif stop < num_tokens:
            cache = DynamicCache(config=reader.decoder.config)
            reading = reader.read(new[None], past_key_values=cache, use_cache=True)
            _check_cache(reader.decoder.config, cache, reading)
            del cache
        else:
            reading = reader.read(new[None])
        rows = reader.rows(reading, new, first_token=start, num_before=num_before)
        if stop < num_tokens:
            context.add(reading)
        del reading  # before the next one is made
        yield rows


@dataclass
class _Context:
    """Rows that the next window attends to, layer by layer.

    Attributes:
        unrotations: layer -> how its keys are turned.
        keys: (1, Hkv, C, D), at position 0.
        values: (1, Hkv, C, Dv).
        embeddings: cos and sin of positions 0, 1, 2, ... of layers that rotate their keys.
    """

    unrotations: Mapping[int, Unrotation | None]
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    embeddings: dict[int, PositionEmbeddings] = field(default_factory=dict)

    def __len__(self) -> int:
        return next((key.shape[2] for key in self.keys.values()), 0)

    def make_room(self, most: int) -> None:
        """Evict rows after the sinks until `most` are left."""
        if len(self) <= most:
            return
        for part in (self.keys, self.values):
            for idx, tensor in part.items():
                recent = tensor[:, :, SINK_ROWS - most :]
                part[idx] = torch.cat([tensor[:, :, :SINK_ROWS], recent], dim=2)

    def cache(self, decoder: PreTrainedModel) -> DynamicCache:
        """Return the model's cache as if it had just read this context."""
        cache = DynamicCache(config=decoder.config)
        for idx, key in self.keys.items():
            unrotate = self.unrotations[idx]
            if unrotate is not None:
                cos, sin = self.embeddings[idx]
                length = key.shape[2]
                key = unrotate.redo(key, (cos[..., :length, :], sin[..., :length, :]))
            cache.update(key, self.values[idx], idx)
        return cache

    def add(self, reading: Reading) -> None:
        """Take in a window that has just been read after this context."""
        for idx, embeddings in reading.embeddings.items():
            self.embeddings[idx] = self._with(idx, embeddings)
        for mine, new in ((self.keys, reading.keys), (self.values, reading.values)):
            for idx, tensor in new.items():
                mine[idx] = torch.cat([mine[idx], tensor], dim=2) if idx in mine else tensor

    def _with(self, layer_idx: int, new: PositionEmbeddings) -> PositionEmbeddings:
        """Return a layer's embeddings, those of the positions after the context included.

        Raises:
            UnsupportedModelError: they are known already, and not the same.
        """
        if layer_idx not in self.embeddings:
            return new
        known, start = self.embeddings[layer_idx], len(self)
        length = new[0].shape[-2]
        overlap = min(known[0].shape[-2] - start, length)
        for old_part, new_part in zip(known, new, strict=True):
            before, now = old_part[..., start : start + overlap, :], new_part[..., :overlap, :]
            if not torch.allclose(before, now, rtol=0, atol=_SAME):
                raise UnsupportedModelError(
                    f"layer {layer_idx} rotates positions {start} to {start + overlap - 1} "
                    "differently than in the window before, so its context cannot be carried. "
                    "Set carry_context to false."
                )
        if overlap == length:
            return known
        cos, sin = (
            torch.cat([old_part, new_part[..., overlap:, :]], dim=-2)
            for old_part, new_part in zip(known, new, strict=True)
        )
        return cos, sin
