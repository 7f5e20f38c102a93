"""No rows at all: "text", for stores whose rows are read again from their tokens."""

from __future__ import annotations

import torch

from memory_backends.errors import StoreError
from memory_backends.layout import Heads, LayerLayout

NAME = "text"


class TextCodec:
    """Keep nothing of a row: its record is empty, and what is decoded is zeros of `dtype`.

    A store has the keys of its searched heads all the same, as fine heads (`records.py`).
    """

    name = NAME
    learns = False

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._row_dim = 0

    def record_bytes(self, layer: LayerLayout) -> int:
        """Return 0."""
        return 0

    def learn(
        self, layer: LayerLayout, rows: torch.Tensor, queries: torch.Tensor | None = None
    ) -> bytes:
        """Learn nothing."""
        return b""

    def coder(self, layer: LayerLayout, state: bytes) -> TextCodec:
        """Return what decodes the layer; raise a StoreError for a state that is not empty."""
        if state:
            raise StoreError(
                f"codec '{NAME}' has no state; got {len(state)} bytes of one. "
                "Restore the store's catalogue from a copy."
            )
        coder = TextCodec(self._dtype)
        coder._row_dim = layer.row_dim
        return coder

    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        """Return empty records."""
        return torch.empty(*rows.shape[:-1], 0, dtype=torch.uint8)

    def decode(self, records: torch.Tensor, head_axis: int, heads: Heads = None) -> torch.Tensor:
        """Return zeros."""
        return torch.zeros(*records.shape[:-1], self._row_dim, dtype=self._dtype)
