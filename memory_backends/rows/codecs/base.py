"""The contract of a codec: rows of one layer to fixed-size records, and back.

A *record* is what one token's key and value of one KV head take on disk. All records of a layer
have the same size, so a row's place follows from its id. What a codec has to know of a layer, it
learns once from the first rows that a store gets, and keeps as a *state*: bytes for the store's
catalogue. Without its state a record cannot be read.
"""

from __future__ import annotations

from typing import Protocol

import torch

from memory_backends.layout import Heads, LayerLayout


class LayerCoder(Protocol):
    """Encodes and decodes the rows of one layer."""

    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the records of finite rows: (n, Hkv, D + Dv) to (n, Hkv, record_bytes) uint8.

        Raises:
            MemoryMismatchError: a number that the records cannot hold.
        """

    def decode(self, records: torch.Tensor, head_axis: int, heads: Heads = None) -> torch.Tensor:
        """Return the rows of records, of any bytes: (..., record_bytes) to (..., D + Dv).

        The KV heads, `heads` or all of them, are along `head_axis`: 0 after a gather (Hkv, ...), 1
        in a span (n, Hkv, record_bytes). Rows have the dtype of the codec's memory.
        """


class RowCodec(Protocol):
    """A way to keep rows, for all layers of a memory."""

    name: str
    learns: bool  # whether it has a state; one that has none takes b"" for it

    def record_bytes(self, layer: LayerLayout) -> int:
        """Return the size of one token's and KV head's record."""

    def learn(
        self, layer: LayerLayout, rows: torch.Tensor, queries: torch.Tensor | None = None
    ) -> bytes:
        """Return the state for a layer, which the same rows and queries give again.

        The rows are the first that the store gets, (n, Hkv, head_dim + value_head_dim), n >= 1;
        queries are some that keys are compared with, (Hkv, m, head_dim), or None.
        """

    def coder(self, layer: LayerLayout, state: bytes) -> LayerCoder:
        """Return what encodes and decodes with a state; raise a StoreError for a wrong one."""
