"""Where rows live: `RowTensors` on a device, `RowFiles` in mapped files.

A layer is an array (M, Hkv, head_dim + value_head_dim): a token's keys and values of all heads lie
side by side, so a span of a document is one contiguous read and one memory's key and value come
with one access. Rows are only ever appended, and a row never moves: its position is its id.

A row's *record* is what its file has of it: `num_kv_heads * record_bytes_per_head` bytes, here its
raw little-endian values. `RowFiles._encode` and `_decode` are all that knows what is in a record.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch

from memory_backends.append_files import AppendFiles
from memory_backends.layout import LayerLayout, MemoryLayout, Rows

FOLDER = "rows"

_MIN_CAPACITY = 256


class RowStorage(Protocol):
    """An append-only array of rows for each layer."""

    @property
    def num_rows(self) -> int:
        """How many rows are published."""

    def append(self, rows: Rows) -> None:
        """Put rows after everything appended so far."""

    def seal(self) -> dict[int, int]:
        """End a document; return layer -> crc32 of its records ({} without files)."""

    def rewind(self) -> None:
        """Drop what was appended since the last seal."""

    def flush(self) -> None:
        """Make appended rows durable."""

    def publish(self, num_rows: int) -> None:
        """Show the first `num_rows` rows, and forget what was appended after them."""

    def reopen(self, num_rows: int) -> None:
        """Show the first `num_rows` rows of the files as they are now."""

    def gather(self, layer_idx: int, ids: torch.Tensor) -> torch.Tensor:
        """Return published rows by id: (Hkv, ...) int64 to (Hkv, ..., D + Dv); any for -1."""

    def take(self, layer_idx: int, places: torch.Tensor) -> torch.Tensor:
        """Return heads' rows by place, id * Hkv + head: (n,) int64 to (n, D + Dv)."""

    def span(self, layer_idx: int, first: int, stop: int) -> torch.Tensor:
        """Return consecutive published rows, (stop - first, Hkv, D + Dv)."""

    def records(self, layer_idx: int, first: int, stop: int) -> torch.Tensor:
        """Return consecutive published rows as a file has them, (n, record_bytes) uint8."""

    def close(self) -> None:
        """Let go of files and tensors."""


def interleave(rows: Rows, layer_idx: int) -> torch.Tensor:
    """Return one layer's keys and values as stored: (n, Hkv, head_dim + value_head_dim)."""
    joined = torch.cat([rows.keys[layer_idx], rows.values[layer_idx]], dim=-1)  # (Hkv, n, D + Dv)
    return joined.transpose(0, 1).contiguous()


def gather_heads(rows: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Take each head's own rows.

    Args:
        rows: (M, Hkv, R), contiguous.
        ids: (Hkv, ...) int64 below M, on the same device; -1 takes any row.

    Returns:
        (Hkv, ..., R); zeros if there are no rows.
    """
    num_rows, num_heads, row_dim = rows.shape
    if not num_rows:
        return rows.new_zeros(*ids.shape, row_dim)
    heads = torch.arange(num_heads, device=rows.device).view(-1, *[1] * (ids.ndim - 1))
    flat = ids.clamp(min=0) * num_heads + heads
    return rows.flatten(0, 1).index_select(0, flat.flatten()).view(*ids.shape, row_dim)


class RowTensors:
    """Rows as tensors on one device, in buffers that double when full."""

    def __init__(self, layout: MemoryLayout, device: torch.device) -> None:
        self._device = device
        self._dtype = layout.dtype
        self._layout = layout
        self._buffers = {idx: self._empty(layer, 0) for idx, layer in layout.layers.items()}
        self._published = self._appended = self._sealed = 0

    @property
    def num_rows(self) -> int:
        """How many rows are published."""
        return self._published

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

    def seal(self) -> dict[int, int]:
        """End a document. Tensors need no checksums."""
        self._sealed = self._appended
        return {}

    def rewind(self) -> None:
        """Drop what was appended since the last seal."""
        self._appended = self._sealed

    def flush(self) -> None:
        """Do nothing: tensors are as durable as they get."""

    def publish(self, num_rows: int) -> None:
        """Show the first `num_rows` rows, and forget what was appended after them."""
        self._published = self._appended = self._sealed = num_rows

    def reopen(self, num_rows: int) -> None:
        """Show the first `num_rows` rows: nobody else writes to them."""
        self.publish(num_rows)

    def layer(self, layer_idx: int) -> torch.Tensor:
        """Return all published rows of a layer, (M, Hkv, D + Dv), not a copy."""
        return self._buffers[layer_idx][: self._published]

    def gather(self, layer_idx: int, ids: torch.Tensor) -> torch.Tensor:
        """Return published rows by id: (Hkv, ...) int64 to (Hkv, ..., D + Dv); any for -1."""
        return gather_heads(self.layer(layer_idx), ids.to(self._device))

    def take(self, layer_idx: int, places: torch.Tensor) -> torch.Tensor:
        """Return heads' rows by place, id * Hkv + head: (n,) int64 to (n, D + Dv)."""
        return self.layer(layer_idx).flatten(0, 1).index_select(0, places.to(self._device))

    def span(self, layer_idx: int, first: int, stop: int) -> torch.Tensor:
        """Return consecutive published rows, (stop - first, Hkv, D + Dv), not a copy."""
        return self.layer(layer_idx)[first:stop]

    def records(self, layer_idx: int, first: int, stop: int) -> torch.Tensor:
        """Return consecutive published rows as a file has them, (n, record_bytes) uint8."""
        return self.span(layer_idx, first, stop).cpu().flatten(1).view(torch.uint8)

    def close(self) -> None:
        """Let go of the tensors."""
        self._buffers.clear()

    def _empty(self, layer: LayerLayout, num_rows: int) -> torch.Tensor:
        shape = (num_rows, layer.num_key_value_heads, layer.row_dim)
        return torch.empty(shape, dtype=self._dtype, device=self._device)


class RowFiles:
    """Rows in one file a layer, `rows/layer-000.bin`: records one after another, no header.

    Published rows are mapped read-only, so opening reads nothing and memory is the page cache's.

    Raises:
        StoreError: a file is missing or shorter than the catalogue says.
    """

    def __init__(self, layout: MemoryLayout, directory: Path, num_rows: int) -> None:
        self._layout = layout
        self._num_rows = num_rows
        sizes = record_bytes(layout)
        self.files = AppendFiles(directory / FOLDER, sizes, dict.fromkeys(sizes, num_rows))

    @property
    def num_rows(self) -> int:
        """How many rows are published."""
        return self._num_rows

    def append(self, rows: Rows) -> None:
        """Put rows after everything appended so far; they reach the disk at `flush`."""
        for idx in self._layout.layers:
            self.append_records(idx, self._encode(interleave(rows, idx)))

    def append_records(self, layer_idx: int, records: torch.Tensor) -> None:
        """Put records (n, record_bytes) uint8 after everything appended to one layer so far."""
        if len(records):
            self.files[layer_idx].append(records.contiguous().numpy().data)

    def skip(self, num_rows: int) -> None:
        """Leave room for rows that nobody reads, without taking space on the disk."""
        for idx in self._layout.layers if num_rows else ():
            self.files[idx].skip(num_rows)

    def seal(self) -> dict[int, int]:
        """End a document; return layer -> crc32 of its records."""
        return self.files.seal()

    def rewind(self) -> None:
        """Drop what was appended since the last seal."""
        self.files.rewind()

    def flush(self) -> None:
        """Force appended rows to the disk."""
        self.files.flush()

    def publish(self, num_rows: int) -> None:
        """Show the first `num_rows` rows; forget what was appended after them, give space back."""
        self._num_rows = num_rows
        self.files.publish(dict.fromkeys(self._layout.layers, num_rows))

    def reopen(self, num_rows: int) -> None:
        """Show the first `num_rows` rows of the files as they are now."""
        self._num_rows = num_rows
        self.files.reopen(dict.fromkeys(self._layout.layers, num_rows))

    def gather(self, layer_idx: int, ids: torch.Tensor) -> torch.Tensor:
        """Return published rows by id: (Hkv, ...) int64 to (Hkv, ..., D + Dv); any for -1."""
        records = self._by_head(layer_idx, self.files[layer_idx].records)
        return self._decode(gather_heads(records, ids.cpu()))

    def take(self, layer_idx: int, places: torch.Tensor) -> torch.Tensor:
        """Return heads' rows by place, id * Hkv + head: (n,) int64 to (n, D + Dv)."""
        records = self._by_head(layer_idx, self.files[layer_idx].records)
        return self._decode(records.flatten(0, 1).index_select(0, places))

    def span(self, layer_idx: int, first: int, stop: int) -> torch.Tensor:
        """Return consecutive published rows, (stop - first, Hkv, D + Dv), mapped if not coded."""
        return self._decode(self._by_head(layer_idx, self.records(layer_idx, first, stop)))

    def records(self, layer_idx: int, first: int, stop: int) -> torch.Tensor:
        """Return consecutive published records, (stop - first, record_bytes) uint8, mapped."""
        return self.files[layer_idx].records[first:stop]

    def close(self) -> None:
        """Let go of the files; tensors handed out stay valid."""
        self.files.close()

    def _by_head(self, layer_idx: int, records: torch.Tensor) -> torch.Tensor:
        """Split records (n, record_bytes) into the heads' parts, (n, Hkv, record_bytes / Hkv)."""
        heads = self._layout.layers[layer_idx].num_key_value_heads
        return records.view(len(records), heads, records.shape[1] // heads)

    def _encode(self, rows: torch.Tensor) -> torch.Tensor:
        """Turn rows (n, Hkv, D + Dv) into records (n, Hkv * record_bytes_per_head) uint8."""
        return rows.cpu().flatten(1).view(torch.uint8)

    def _decode(self, records: torch.Tensor) -> torch.Tensor:
        """Turn parts of records (..., record_bytes_per_head) uint8 into rows (..., D + Dv)."""
        return records.view(self._layout.dtype)


def record_bytes(layout: MemoryLayout) -> dict[int, int]:
    """Return layer -> bytes of one row's record."""
    return {
        idx: layer.num_key_value_heads * layer.row_dim * layout.dtype.itemsize
        for idx, layer in layout.layers.items()
    }
