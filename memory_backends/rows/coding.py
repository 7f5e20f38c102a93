"""How the rows of one store become records: its codec, with what that has learned of each layer.

A *record* is what a layer's file has of one row: its KV heads' parts, one after the other, each as
the codec makes it. What a codec learns from a store's first rows is committed together with their
records, in one transaction, and never changes; until then it is `new_states`, and can be forgotten.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from memory_backends.layout import MemoryLayout
from memory_backends.rows.codecs import LayerCoder, row_codec


def record_bytes(layout: MemoryLayout, codec_name: str) -> dict[int, int]:
    """Return layer -> bytes of one row's record in a store of that layout, of all KV heads."""
    codec = row_codec(codec_name, layout.dtype)
    return {
        idx: layer.num_key_value_heads * codec.record_bytes(layer)
        for idx, layer in layout.layers.items()
    }


class RowCoding:
    """The codec of a store, and a coder for each layer of it.

    Args:
        layout: the store's own.
        codec_name: of the store.
        read_state: gives a layer's committed state, or None if nothing has been committed yet.
        has_states: tells whether states have been committed.
        dtype: of the rows that are read and written; None for the store's own. Records are the
            same whatever it is.

    Attributes:
        record_bytes: layer -> bytes of one row's record.
        new_states: layer -> what was learned and waits to be committed.
    """

    def __init__(
        self,
        layout: MemoryLayout,
        codec_name: str,
        read_state: Callable[[int], bytes | None] = lambda layer_idx: None,
        has_states: Callable[[], bool] = lambda: False,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._layout = layout
        self._dtype = dtype
        self._codec = row_codec(codec_name, layout.dtype, dtype)
        self._read_state = read_state
        self._has_states = has_states
        self._coders: dict[int, LayerCoder] = {}
        self.record_bytes = record_bytes(layout, codec_name)
        self.new_states: dict[int, bytes] = {}

    def exactly(self) -> RowCoding:
        """Return the coding of the same store's rows as they are."""
        return RowCoding(self._layout, "exact", dtype=self._dtype)

    @property
    def layers_with_state(self) -> list[int]:
        """The layers of which something is learned: all, or none."""
        return list(self._layout.layers) if self._codec.learns else []

    @property
    def must_learn(self) -> bool:
        """Whether rows have to be learned from before any can be encoded."""
        return self._codec.learns and not self.new_states and not self._has_states()

    def learn(self, layer_idx: int, rows: torch.Tensor) -> None:
        """Learn from the first rows of a layer, (n, Hkv, D + Dv)."""
        self.new_states[layer_idx] = self._codec.learn(self._layout.layers[layer_idx], rows)

    def forget_new(self) -> None:
        """Forget what was learned; what is committed by now is read again."""
        if self.new_states:
            self.new_states = {}
            self._coders.clear()

    def coder(self, layer_idx: int) -> LayerCoder | None:
        """Return what encodes and decodes a layer; None if nothing was learned yet."""
        coder = self._coders.get(layer_idx)
        if coder is None:
            state = self._state(layer_idx)
            if state is None:
                return None
            coder = self._codec.coder(self._layout.layers[layer_idx], state)
            self._coders[layer_idx] = coder
        return coder

    def _state(self, layer_idx: int) -> bytes | None:
        if not self._codec.learns:
            return b""
        return self.new_states.get(layer_idx) or self._read_state(layer_idx)
