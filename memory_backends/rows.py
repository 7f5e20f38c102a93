"""Where rows live: `RowTensors` on a device, `RowFiles` in mapped files.

Both keep one array a layer of shape (M, Hkv, head_dim + value_head_dim): a token's keys and values
of all heads lie side by side, so a span of a document is one contiguous read and one memory's key
and value come with one access. Rows are only ever appended, and a row never moves: its position is
its id.

`append` puts rows after the published ones, where no reader looks; `flush` makes them durable and
tells their checksums; then the catalogue commits or does not, and `publish` shows as many rows as
the catalogue says, and forgets the others. A crash before the commit leaves bytes past the
published end, which the next append overwrites.
"""

from __future__ import annotations

import contextlib
import os
import warnings
import zlib
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import torch

from memory_backends.errors import StoreError
from memory_backends.layout import LayerLayout, MemoryLayout, Rows

_MIN_CAPACITY = 256


class RowStorage(Protocol):
    """An append-only array of rows for each layer."""

    @property
    def num_rows(self) -> int:
        """How many rows are published."""

    def append(self, rows: Rows) -> None:
        """Put rows after everything appended so far."""

    def flush(self) -> dict[int, int]:
        """Make appended rows durable; return layer -> crc32 of their bytes ({} without files)."""

    def publish(self, num_rows: int) -> None:
        """Show the first `num_rows` rows, and forget what was appended after them."""

    def layer(self, layer_idx: int) -> torch.Tensor:
        """Return all published rows of a layer, (M, Hkv, head_dim + value_head_dim), not a copy."""

    def close(self) -> None:
        """Let go of files and tensors."""


def interleave(rows: Rows, layer_idx: int) -> torch.Tensor:
    """Return one layer's keys and values as stored: (n, Hkv, head_dim + value_head_dim)."""
    joined = torch.cat([rows.keys[layer_idx], rows.values[layer_idx]], dim=-1)  # (Hkv, n, D + Dv)
    return joined.transpose(0, 1).contiguous()


class RowTensors:
    """Rows as tensors on one device, in buffers that double when full."""

    def __init__(self, layout: MemoryLayout, device: torch.device) -> None:
        self._device = device
        self._dtype = layout.dtype
        self._layout = layout
        self._buffers = {idx: self._empty(layer, 0) for idx, layer in layout.layers.items()}
        self._published = 0
        self._appended = 0

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

    def flush(self) -> dict[int, int]:
        """Do nothing: tensors are as durable as they get."""
        return {}

    def publish(self, num_rows: int) -> None:
        """Show the first `num_rows` rows, and forget what was appended after them."""
        self._published = self._appended = num_rows

    def layer(self, layer_idx: int) -> torch.Tensor:
        """Return all published rows of a layer, (M, Hkv, head_dim + value_head_dim), not a copy."""
        return self._buffers[layer_idx][: self._published]

    def close(self) -> None:
        """Let go of the tensors."""
        self._buffers.clear()

    def _empty(self, layer: LayerLayout, num_rows: int) -> torch.Tensor:
        shape = (num_rows, layer.num_key_value_heads, layer.row_dim)
        return torch.empty(shape, dtype=self._dtype, device=self._device)


class RowFiles:
    """Rows in one file a layer, `rows/layer-000.bin`: raw little-endian values, no header.

    Published rows are mapped read-only, so opening reads nothing and memory is the page cache's. A
    store without rows needs no files: the first `append` makes them.
    """

    def __init__(self, layout: MemoryLayout, directory: Path, num_rows: int) -> None:
        """Map the files of a store.

        Raises:
            StoreError: a file is missing or shorter than the catalogue says.
        """
        self._layout = layout
        self._directory = directory / "rows"
        self._num_rows = num_rows
        self._maps: dict[int, torch.Tensor] = {}
        self._open_files: dict[int, BinaryIO] = {}
        self._crc32: dict[int, int] = {}
        self._appended = num_rows
        for idx in layout.layers:
            self._check_size(idx)

    @property
    def num_rows(self) -> int:
        """How many rows are published."""
        return self._num_rows

    def append(self, rows: Rows) -> None:
        """Put rows after everything appended so far; they reach the disk at `flush`."""
        for idx in self._layout.layers:
            data = _bytes_of(interleave(rows, idx))
            self._file_for_append(idx).write(data)
            self._crc32[idx] = zlib.crc32(data, self._crc32.get(idx, 0))
        self._appended += len(rows)

    def flush(self) -> dict[int, int]:
        """Force appended rows to the disk; return layer -> crc32 of their bytes."""
        for file in self._open_files.values():
            file.flush()
            os.fsync(file.fileno())
        return dict(self._crc32)

    def publish(self, num_rows: int) -> None:
        """Show the first `num_rows` rows; forget what was appended after them, give space back."""
        touched = list(self._open_files)
        self._close_files()
        if num_rows != self._num_rows:
            self._maps.clear()
        self._num_rows = self._appended = num_rows
        for idx in touched:
            with contextlib.suppress(OSError):  # no reader looks there; the next append cuts it off
                os.truncate(_file(self._directory, idx), self._size(idx))

    def layer(self, layer_idx: int) -> torch.Tensor:
        """Return all published rows of a layer, (M, Hkv, head_dim + value_head_dim), mapped."""
        if layer_idx not in self._maps:
            self._maps[layer_idx] = self._map(layer_idx)
        return self._maps[layer_idx]

    def close(self) -> None:
        """Let go of the files; tensors handed out stay valid."""
        self.publish(self._num_rows)
        self._maps.clear()

    def _map(self, layer_idx: int) -> torch.Tensor:
        layer = self._layout.layers[layer_idx]
        shape = (self._num_rows, layer.num_key_value_heads, layer.row_dim)
        if self._num_rows == 0:
            return torch.empty(shape, dtype=self._layout.dtype)
        self._check_size(layer_idx)
        path, dtype = _file(self._directory, layer_idx), _NUMPY[self._layout.dtype]
        raw = np.memmap(path, dtype=dtype, mode="r", shape=shape)
        with (
            warnings.catch_warnings()
        ):  # torch has no read-only tensors; nothing writes to this one
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return torch.from_numpy(raw).view(self._layout.dtype)

    def _file_for_append(self, layer_idx: int) -> BinaryIO:
        if layer_idx not in self._open_files:
            path = _file(self._directory, layer_idx)
            self._check_size(layer_idx)
            if self._num_rows == 0:
                self._directory.mkdir(exist_ok=True)
                path.touch()
            file = path.open("r+b")
            file.truncate(self._size(layer_idx))  # what an interrupted write left behind
            file.seek(0, os.SEEK_END)
            self._open_files[layer_idx] = file
        return self._open_files[layer_idx]

    def _close_files(self) -> None:
        for file in self._open_files.values():
            with contextlib.suppress(OSError):  # a full disk was reported by `append` or `flush`
                file.close()
        self._open_files.clear()
        self._crc32.clear()

    def _size(self, layer_idx: int) -> int:
        layer = self._layout.layers[layer_idx]
        itemsize = self._layout.dtype.itemsize
        return self._num_rows * layer.num_key_value_heads * layer.row_dim * itemsize

    def _check_size(self, layer_idx: int) -> None:
        path = _file(self._directory, layer_idx)
        expected = self._size(layer_idx)
        found = path.stat().st_size if path.is_file() else None
        if expected and (found is None or found < expected):
            state = "is missing" if found is None else f"is truncated to {found} bytes"
            raise StoreError(
                f"'{path}' {state}; expected at least {expected} bytes for {self._num_rows} rows. "
                "Restore the file from a copy, or index the documents again."
            )


_NUMPY = {torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: np.int16}


def _file(directory: Path, layer_idx: int) -> Path:
    return directory / f"layer-{layer_idx:03d}.bin"


def _bytes_of(rows: torch.Tensor) -> bytes:
    rows = rows.cpu()
    return (rows.view(torch.int16) if rows.dtype == torch.bfloat16 else rows).numpy().tobytes()
