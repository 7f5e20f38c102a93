"""Rows as tensors on one device."""

from __future__ import annotations

import torch

from memory_backends.layout import Heads, LayerLayout, MemoryLayout, Rows
from memory_backends.rows.base import Flushed, gather_heads, interleave, take_heads

_MIN_CAPACITY = 256


class RowTensors:
    """Rows as tensors on one device, in buffers that double when full."""

    def __init__(self, layout: MemoryLayout, device: torch.device) -> None:
        self._device = device
        self._dtype = layout.dtype
        self._layout = layout
        self._buffers = {idx: self._empty(layer, 0) for idx, layer in layout.layers.items()}
        self.num_rows = self._appended = self._sealed = 0
        self._num_documents = 0  # sealed since the last `show`

    def append(self, rows: Rows) -> None:
        """Put rows after everything appended so far."""
        start, stop = self._appended, self._appended + len(rows)
        for idx, layer in self._layout.layers.items():
            buffer = self._buffers[idx]
            if stop > len(buffer):
                grown = self._empty(layer, max(stop, 2 * len(buffer), _MIN_CAPACITY))
                grown[:start] = buffer[:start]
                self._buffers[idx] = buffer = grown
            buffer[start:stop] = interleave(rows, idx).to(self._device)
        self._appended = stop

    def seal(self) -> None:
        """End a document."""
        self._sealed = self._appended
        self._num_documents += 1

    def rewind(self) -> None:
        """Drop what was appended since the last seal."""
        self._appended = self._sealed

    def flush(self) -> Flushed:
        """Do nothing: tensors need no checksums and no codec."""
        return Flushed([{}] * self._num_documents, {}, {})

    def show(self, num_rows: int, *, anew: bool = False) -> None:
        """Show the first `num_rows` rows, and forget what was appended after them."""
        self.num_rows = self._appended = self._sealed = num_rows
        self._num_documents = 0

    def layer(self, layer_idx: int) -> torch.Tensor:
        """Return all committed rows of a layer, (M, Hkv, D + Dv), not a copy."""
        return self._buffers[layer_idx][: self.num_rows]

    def gather(self, layer_idx: int, ids: torch.Tensor, heads: Heads = None) -> torch.Tensor:
        """Return committed rows by id: (h, ...) int64 to (h, ..., D + Dv); any for -1."""
        return gather_heads(self.layer(layer_idx), ids.to(self._device), heads)

    def take(self, layer_idx: int, places: torch.Tensor) -> torch.Tensor:
        """Return heads' rows by place, id * Hkv + head: (Hkv, ...) to (Hkv, ..., D + Dv)."""
        return take_heads(self.layer(layer_idx), places.to(self._device))

    def span(self, layer_idx: int, first: int, stop: int, heads: Heads = None) -> torch.Tensor:
        """Return consecutive committed rows, (stop - first, h, D + Dv), not a copy of all heads."""
        rows = self.layer(layer_idx)[first:stop]
        return rows if heads is None else rows[:, list(heads)]

    def close(self) -> None:
        """Let go of the tensors."""
        self._buffers.clear()

    def _empty(self, layer: LayerLayout, num_rows: int) -> torch.Tensor:
        shape = (num_rows, layer.num_key_value_heads, layer.row_dim)
        return torch.empty(shape, dtype=self._dtype, device=self._device)
