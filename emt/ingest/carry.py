"""Carried context: each token of a document is run once, after rows of the tokens before it.

A window of new tokens attends to a context: the document's first `FIRST_ROWS` rows and its last
ones, as many as `max_length` leaves room for. The context is placed anew for every window: its keys
are rotated to positions 0, 1, 2, ... and the new tokens follow, so no position is beyond
`max_length`. A document of up to `max_length` tokens is one plain forward. Keys of models that add
learned positions to their embeddings are not rotated: they keep the positions they were read at.

Source: Xiao et al., Efficient Streaming Language Models with Attention Sinks (arXiv 2309.17453),
sections 3.1 and 3.2: keep the first rows, of which four are enough, and count positions in the
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
from emt.ingest.rows import LayerStates, RowReader
from emt.ingest.sinks import SinkFinder
from emt.ingest.windows import Windows
from emt.model.rope import PositionEmbeddings, Unrotation
from memory_backends import Rows

FIRST_ROWS = 4  # kept of every document: nearly all heads park their attention on one of them
_TOLERANCE = 1e-2  # between cosines of equal positions, in any dtype; others differ far more


def check_carry(config: PreTrainedConfig, windows: Windows) -> None:
    """Refuse windows and models that cannot carry context.

    Raises:
        ConfigError: a window of `stride` tokens leaves no room for sinks and one row more.
        UnsupportedModelError: a layer keeps something else between tokens than keys and values.
    """
    if windows.max_length - windows.stride <= FIRST_ROWS:
        raise ConfigError(
            f"with carry_context, max_length ({windows.max_length}) must be at least stride "
            f"({windows.stride}) + {FIRST_ROWS + 1}, so that there is context to carry. Lower "
            "stride, or set carry_context to false."
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


def can_carry(config: PreTrainedConfig, windows: Windows) -> bool:
    """Tell whether context can be carried, as far as a model's config says; see `check_carry`."""
    try:
        check_carry(config, windows)
    except (ConfigError, UnsupportedModelError):
        return False
    return rotates_alike(config)


def rotates_alike(config: PreTrainedConfig) -> bool:
    """Tell whether a token is rotated alike, however many others are in its forward."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    return not any(kind.get("rope_type") in ("dynamic", "longrope") for kind in kinds)


def encode_carrying(
    reader: RowReader, token_ids: Tensor, windows: Windows, *, first_length: int | None = None
) -> Iterator[Rows]:
    """Yield the rows of one document, window by window, running each token once.

    Args:
        reader: the model.
        token_ids: (T,) int64, on any device.
        windows: `stride` new tokens in each window after the first, `max_length` with the context.
        first_length: tokens in the first window, if not `max_length`.

    Raises:
        As `check_carry`, if there is more than one window; UnsupportedModelError also if a layer
            caches something else than what it attends to, or the model rotates equal positions
            differently from window to window.
    """
    config, num_tokens, stop = reader.decoder.config, len(token_ids), 0
    first_length = first_length or windows.max_length
    context, sinks = _Context(reader.unrotations), SinkFinder()
    if num_tokens > first_length:
        check_carry(config, windows)
    while stop < num_tokens:
        start, stop = stop, min(stop + (windows.stride if stop else first_length), num_tokens)
        new = token_ids[start:stop]
        if stop - start == num_tokens:  # all of it fits into the first window
            yield reader.rows(reader.forward(new[None]), new, sinks=sinks)
            return
        context.make_room(windows.max_length - len(new))
        cache = context.cache(reader.decoder)
        states = reader.forward(new[None], past_key_values=cache, use_cache=True)
        if not start:
            _check_cache(config, cache, states)
        del cache
        rows = reader.rows(states, new, sinks=sinks, first_token=start)
        if stop < num_tokens:
            context.add(states)
        del states  # before the next ones are made
        yield rows


def _check_cache(config: PreTrainedConfig, cache: DynamicCache, states: LayerStates) -> None:
    """Refuse a model whose cache, after the first window, does not hold what was attended to.

    Latent attention caches what it makes keys and values from, and some layers repeat KV heads
    before they attend.
    """
    for idx, value in states.values.items():
        layer = cache.layers[idx] if idx < len(cache.layers) else None
        cached_key, cached_value = getattr(layer, "keys", None), getattr(layer, "values", None)
        if cached_key is not None and cached_value is not None:
            recent = value[:, :, value.shape[2] - cached_value.shape[2] :]  # of a sliding window
            group = max(cached_value.shape[1] // value.shape[1], 1)  # Falcon repeats KV heads
            is_key_wide = cached_key.shape[3] == states.keys[idx].shape[3]
            if is_key_wide and torch.equal(cached_value[:, ::group], recent):
                continue
        raise UnsupportedModelError(
            f"{config.model_type}: carry_context needs layers that keep the keys and values they "
            f"attend to; layer {idx} keeps something else. Set carry_context to false."
        )


@dataclass
class _Context:
    """Rows that the next window attends to, layer by layer.

    Keys are (1, Hkv, C, D), at position 0, and values (1, Hkv, C, Dv). Embeddings are the cos and
    sin of positions 0, 1, 2, ... of layers that rotate their keys.
    """

    unrotations: Mapping[int, Unrotation | None]
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    embeddings: dict[int, PositionEmbeddings] = field(default_factory=dict)

    def __len__(self) -> int:
        return next((key.shape[2] for key in self.keys.values()), 0)

    def make_room(self, num_rows: int) -> None:
        """Evict rows after the sinks until at most `num_rows` are left."""
        if len(self) <= num_rows:
            return
        for part in (self.keys, self.values):
            for idx, tensor in part.items():
                recent = tensor[:, :, FIRST_ROWS - num_rows :]
                part[idx] = torch.cat([tensor[:, :, :FIRST_ROWS], recent], dim=2)

    def cache(self, decoder: PreTrainedModel) -> DynamicCache:
        """Return the cache that the model would have after reading just this context."""
        cache = DynamicCache(config=decoder.config)
        for idx, key in self.keys.items():
            unrotate = self.unrotations[idx]
            if unrotate is not None:
                cos, sin = self.embeddings[idx]
                length = key.shape[2]
                key = unrotate.redo(key, (cos[..., :length, :], sin[..., :length, :]))
            cache.update(key, self.values[idx], idx)
        return cache

    def add(self, states: LayerStates) -> None:
        """Add a window that has been read after this context."""
        for idx, embeddings in states.embeddings.items():
            self.embeddings[idx] = self._extended(idx, embeddings)
        for part, new in ((self.keys, states.keys), (self.values, states.values)):
            for idx, tensor in new.items():
                part[idx] = torch.cat([part[idx], tensor], dim=2) if idx in part else tensor

    def _extended(self, layer_idx: int, new: PositionEmbeddings) -> PositionEmbeddings:
        """Return a layer's embeddings with those of the positions after the context."""
        if layer_idx not in self.embeddings:
            return new
        old, start = self.embeddings[layer_idx], len(self)
        length = new[0].shape[-2]
        overlap = min(old[0].shape[-2] - start, length)
        for old_part, new_part in zip(old, new, strict=True):
            before, now = old_part[..., start : start + overlap, :], new_part[..., :overlap, :]
            if not torch.allclose(before, now, rtol=0, atol=_TOLERANCE):
                raise UnsupportedModelError(
                    f"layer {layer_idx} rotates positions {start} to {start + overlap - 1} "
                    "differently than in the window before, so its context cannot be carried. "
                    "Set carry_context to false."
                )
        if overlap == length:
            return old
        cos, sin = (
            torch.cat([old_part, new_part[..., overlap:, :]], dim=-2)
            for old_part, new_part in zip(old, new, strict=True)
        )
        return cos, sin
