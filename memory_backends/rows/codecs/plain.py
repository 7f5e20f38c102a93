"""Rows as floating-point numbers: "exact", "float16", "bfloat16"."""

from __future__ import annotations

import torch

from memory_backends.errors import MemoryMismatchError, StoreError
from memory_backends.layout import Heads, LayerLayout


class PlainCodec:
    """Keep the numbers in one floating-point dtype; little-endian, key before value.

    They are `stored` on disk, and decoded to `dtype`, that of the rows of who reads them.
    """

    learns = False

    def __init__(self, name: str, stored: torch.dtype, dtype: torch.dtype) -> None:
        self.name = name
        self._stored = stored
        self._dtype = dtype

    def record_bytes(self, layer: LayerLayout) -> int:
        """Return the size of one token's and KV head's record."""
        return layer.row_dim * self._stored.itemsize

    def learn(
        self, layer: LayerLayout, rows: torch.Tensor, queries: torch.Tensor | None = None
    ) -> bytes:
        """Learn nothing."""
        return b""

    def coder(self, layer: LayerLayout, state: bytes) -> PlainCodec:
        """Return itself; raise a StoreError for a state that is not empty."""
        if state:
            raise StoreError(
                f"codec '{self.name}' has no state; got {len(state)} bytes of one. "
                "Restore the store's catalogue from a copy."
            )
        return self

    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the records of rows; a MemoryMismatchError if the dtype cannot hold a number."""
        stored = rows.to(self._stored)
        if not stored.isfinite().all():
            limit = torch.finfo(self._stored).max
            raise MemoryMismatchError(
                f"this memory keeps rows as {self._stored}, with numbers up to {limit:g}; got "
                f"{rows.abs().max().item():g}. Index the documents in another store, with "
                "row_codec 'bfloat16', or 'exact' and this model."
            )
        return stored.contiguous().view(torch.uint8)

    def decode(self, records: torch.Tensor, head_axis: int, heads: Heads = None) -> torch.Tensor:
        """Return the rows of records."""
        records = records.contiguous()
        size = self._stored.itemsize
        if records.storage_offset() % size or records.data_ptr() % size:
            records = records.clone()  # only aligned bytes can be seen as numbers
        rows = records.view(self._stored)
        if self._stored is self._dtype:
            return rows
        rows = rows.to(self._dtype)
        limit = torch.finfo(self._dtype).max
        if limit < torch.finfo(self._stored).max:  # an infinite value would spoil all others
            rows.clamp_(-limit, limit)
        return rows
