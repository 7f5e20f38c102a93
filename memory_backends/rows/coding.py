"""How the rows of one store become records: its codec, with what that has learned of each layer.

A *record* is what a layer's file has of one row: its KV heads' parts, one after the other, each as
the codec makes it, then the rest of some heads' keys (`records.py`). What a codec learns from a
store's first rows is committed together with their records, in one transaction, and never changes;
until then it is `new_states`, and can be forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from memory_backends.errors import MemoryMismatchError
from memory_backends.layout import MemoryLayout
from memory_backends.rows.codecs import TEXT, row_codec
from memory_backends.rows.records import LayerRecords, rest_bytes

FineHeads = Mapping[int, Sequence[int]]  # layer -> ascending KV heads, of some layers

# Of codecs beside these: "exact" and "float16" have nothing to add, the others are as they were.
# "text" has nothing else: the rest of a key is the key, in 8 bits a number.
CODECS_WITH_FINE_HEADS = ("int5.5", TEXT)


def record_bytes(
    layout: MemoryLayout, codec_name: str, fine_heads: FineHeads | None = None
) -> dict[int, int]:
    """Return layer -> bytes of one row's record in a store of that layout, of all KV heads."""
    codec, sizes = row_codec(codec_name, layout.dtype), {}
    for idx, layer in layout.layers.items():
        num_fine = len((fine_heads or {}).get(idx, ()))
        sizes[idx] = layer.num_key_value_heads * codec.record_bytes(layer)
        sizes[idx] += num_fine * rest_bytes(layer)
    return sizes


def fine_heads_of(layout: MemoryLayout, codec_name: str, chosen: object) -> FineHeads:
    """Return the fine heads that a store's setting names, {"17": [1]}; None are of no setting.

    Raises:
        MemoryMismatchError: they are not heads of the layout, or the codec has none.
    """
    if chosen is None:
        return {}
    allowed = {str(idx): layer.num_key_value_heads for idx, layer in layout.layers.items()}
    if (
        codec_name not in CODECS_WITH_FINE_HEADS
        or not isinstance(chosen, dict)
        or not all(
            key in allowed
            and isinstance(heads, list)
            and all(type(head) is int and 0 <= head < allowed[key] for head in heads)
            and heads == sorted(set(heads))
            for key, heads in chosen.items()
        )
    ):
        raise MemoryMismatchError(
            "fine_heads must be ascending KV heads by layer, and the codec one of "
            f"{CODECS_WITH_FINE_HEADS}; got {chosen!r:.200} and '{codec_name}'."
        )
    return {int(key): tuple(heads) for key, heads in chosen.items()}


class RowCoding:
    """The codec of a store, and a coder for each layer of it.

    Args:
        layout: the store's own.
        codec_name: of the store.
        read_state: gives a layer's committed state, or None if nothing has been committed yet.
        has_states: tells whether states have been committed.
        dtype: of the rows that are read and written; None for the store's own. Records are the
            same whatever it is.
        fine_heads: of the store.

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
        fine_heads: FineHeads | None = None,
    ) -> None:
        self._layout = layout
        self._dtype = dtype
        self._codec = row_codec(codec_name, layout.dtype, dtype)
        # A rest is added to what is not yet rounded to the dtype of who reads.
        self._codec_of_fine = row_codec(codec_name, layout.dtype, torch.float32)
        self._read_state = read_state
        self._has_states = has_states
        self._fine_heads = fine_heads or {}
        self._records: dict[int, LayerRecords] = {}
        self.record_bytes = record_bytes(layout, codec_name, fine_heads)
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

    def learn(
        self, layer_idx: int, rows: torch.Tensor, queries: torch.Tensor | None = None
    ) -> None:
        """Learn from the first rows of a layer, (n, Hkv, D + Dv), and queries, (H, m, D)."""
        layer = self._layout.layers[layer_idx]
        if queries is not None:  # by KV head
            queries = queries.reshape(layer.num_key_value_heads, -1, layer.head_dim)
        self.new_states[layer_idx] = self._codec.learn(layer, rows, queries)

    def forget_new(self) -> None:
        """Forget what was learned; what is committed by now is read again."""
        if self.new_states:
            self.new_states = {}
            self._records.clear()

    def records(self, layer_idx: int) -> LayerRecords | None:
        """Return what encodes and decodes a layer; None if nothing was learned yet."""
        records = self._records.get(layer_idx)
        if records is None:
            state = self._state(layer_idx)
            if state is None:
                return None
            layer, fine = self._layout.layers[layer_idx], self._fine_heads.get(layer_idx, ())
            codec = self._codec_of_fine if fine else self._codec
            coder, dtype = codec.coder(layer, state), self._dtype or self._layout.dtype
            records = LayerRecords(coder, layer, codec.record_bytes(layer), fine, dtype)
            self._records[layer_idx] = records
        return records

    def _state(self, layer_idx: int) -> bytes | None:
        if not self._codec.learns:
            return b""
        return self.new_states.get(layer_idx) or self._read_state(layer_idx)
