"""Where rows live: the contract that `RowTensors` and `RowFiles` fulfil.

A layer is an array (M, Hkv, head_dim + value_head_dim): a token's keys and values of all heads lie
side by side, so a span of a document is one contiguous read and one memory's key and value come
with one access. Rows are only ever appended, and a row never moves: its position is its id.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch

from memory_backends.layout import Heads, MemoryLayout, Rows

_ROWS_AT_ONCE = 4096  # decoded between file and device


class Flushed(NamedTuple):
    """What the catalogue has to know of rows that are durable now."""

    # Of each document sealed since the last `show`: layer -> of its records; {} without files.
    row_crc32: Sequence[Mapping[int, int]]
    # Layer -> what the codec has learned; {} if it has not, or had before.
    codec_states: Mapping[int, bytes]
    # Of documents committed before, which were encoded now: name -> layer -> as in `row_crc32`.
    moved_crc32: Mapping[str, Mapping[int, int]]


class RowStorage(Protocol):
    """An append-only array of rows for each layer, of which the first `num_rows` are committed."""

    num_rows: int

    def append(self, rows: Rows) -> None:
        """Put rows after everything appended so far."""

    def seal(self) -> None:
        """End a document."""

    def rewind(self) -> None:
        """Drop what was appended since the last seal."""

    def flush(self) -> Flushed:
        """Make appended rows durable."""

    def show(self, num_rows: int, *, anew: bool = False) -> None:
        """Show the first `num_rows` rows, and forget what was appended after them.

        With `anew`, of the files as they are now, which another process may have replaced.
        """

    def gather(self, layer_idx: int, ids: torch.Tensor, heads: Heads = None) -> torch.Tensor:
        """Return committed rows by id: (h, ...) int64 to (h, ..., D + Dv); any for -1.

        The h heads are `heads`, all Hkv of them if None.
        """

    def take(self, layer_idx: int, places: torch.Tensor) -> torch.Tensor:
        """Return heads' rows by place, id * Hkv + head: (Hkv, ...) to (Hkv, ..., D + Dv)."""

    def span(self, layer_idx: int, first: int, stop: int, heads: Heads = None) -> torch.Tensor:
        """Return consecutive committed rows, (stop - first, h, D + Dv), of `heads` or all Hkv."""

    def close(self) -> None:
        """Let go of files and tensors."""


def interleave(rows: Rows, layer_idx: int) -> torch.Tensor:
    """Return one layer's keys and values as stored: (n, Hkv, head_dim + value_head_dim)."""
    joined = torch.cat([rows.keys[layer_idx], rows.values[layer_idx]], dim=-1)  # (Hkv, n, D + Dv)
    return joined.transpose(0, 1).contiguous()


def gather_heads(rows: torch.Tensor, ids: torch.Tensor, heads: Heads = None) -> torch.Tensor:
    """Take each head's own rows: of (M, Hkv, R), by ids (h, ...) of `heads` or all, (h, ..., R).

    -1 takes any row; if there are none, zeros.
    """
    num_rows, num_heads, row_dim = rows.shape
    if not num_rows:
        return rows.new_zeros(*ids.shape, row_dim)
    if heads is None:
        offsets = torch.arange(num_heads, device=rows.device)
    else:
        offsets = torch.tensor(list(heads), device=rows.device)
    places = ids.clamp(min=0) * num_heads + offsets.view(-1, *[1] * (ids.ndim - 1))
    return take_heads(rows, places)


def take_heads(rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Take heads' rows by place, id * Hkv + head: of (M, Hkv, R), (Hkv, ...) to (Hkv, ..., R)."""
    flat = rows.flatten(0, 1).index_select(0, places.flatten())
    return flat.view(*places.shape, rows.shape[-1])


def loaded(
    rows: RowStorage, layout: MemoryLayout, layer_idx: int, device: torch.device
) -> torch.Tensor:
    """Return a copy of all committed rows of a layer on a device, (M, Hkv, D + Dv)."""
    layer = layout.layers[layer_idx]
    shape = (rows.num_rows, layer.num_key_value_heads, layer.row_dim)
    copy = torch.empty(shape, dtype=layout.dtype, device=device)
    for first in range(0, rows.num_rows, _ROWS_AT_ONCE):
        stop = min(first + _ROWS_AT_ONCE, rows.num_rows)
        copy[first:stop] = rows.span(layer_idx, first, stop)
    return copy
