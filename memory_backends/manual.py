"""`memory_type="manual"`: rows as tensors on a device, searched exactly with one matrix product."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from memory_backends.base import MemoryBackend, SearchResult, Sinks
from memory_backends.exact import best_rows
from memory_backends.layout import MemoryLayout
from memory_backends.rows import RowTensors, gather_heads, loaded
from memory_backends.validation import usable_device

_SCOPED_KEY_BYTES = 2**30  # kept of scopes' keys; those of all rows are kept as well


class ManualBackend(MemoryBackend):
    """Exact search over tensors on `device`.

    Without a path the rows live on the device alone, exactly; `row_codec` is that of the store that
    `save` makes. With one, they are also in the store, and each layer is loaded onto the device
    when it is first used, decoded. Keys are kept a second time, normalised
    and in float32: 4 * head_dim bytes a key.

    Args:
        layout: the shape of the rows.
        path: see `MemoryBackend`.
        identity: see `MemoryBackend`.
        sinks: see `MemoryBackend`.
        row_codec: see `MemoryBackend`.
        device: where the tensors live; the CPU if None.
    """

    def __init__(
        self,
        layout: MemoryLayout,
        *,
        path: Path | str | None = None,
        identity: Mapping[str, Any] | None = None,
        sinks: Sinks = "all",
        row_codec: str = "exact",
        device: torch.device | str | None = None,
    ) -> None:
        self.device = usable_device(device or "cpu")
        self._loaded: dict[int, torch.Tensor] = {}  # layer -> rows on the device
        self._directions: dict[int, torch.Tensor] = {}  # layer -> (Hkv, n, D) float32, unit length
        # (layer, head) -> (1, n, D), of layers that were only searched by single heads
        self._directions_of_head: dict[tuple[int, int], torch.Tensor] = {}
        self._searchable_ids: torch.Tensor | None = None
        super().__init__(layout, path=path, identity=identity, sinks=sinks, row_codec=row_codec)
        self._scopes.num_bytes = _SCOPED_KEY_BYTES

    def _candidates(
        self, layer_idx: int, unit_queries: torch.Tensor, k: int, heads: Sequence[int] | None
    ) -> SearchResult:
        if heads is None:
            return self._nearest_of(self._unit_keys(layer_idx), unit_queries, k)
        found = [
            self._nearest_of(self._unit_keys_of_head(layer_idx, head), queries.unsqueeze(0), k)
            for head, queries in zip(heads, unit_queries, strict=True)
        ]
        scores, ids = zip(*found, strict=True)
        return SearchResult(torch.cat(scores), torch.cat(ids))

    def _nearest_of(
        self, directions: torch.Tensor, unit_queries: torch.Tensor, k: int
    ) -> SearchResult:
        """Search keys (h, n, D) of unit length for queries (h, N, D)."""
        scores, positions = best_rows(unit_queries.to(self.device), [directions], k)
        return SearchResult(scores, self._ids()[positions])

    @property
    def _rows_device(self) -> torch.device:
        return self.device

    def _stored(self, layer_idx: int) -> torch.Tensor:
        """Return all rows of a layer on the device, (M, Hkv, head_dim + value_head_dim)."""
        if isinstance(self._rows, RowTensors):
            return self._rows.layer(layer_idx)
        rows = self._loaded.get(layer_idx)
        if rows is None or len(rows) != self._rows.num_rows:
            rows = loaded(self._rows, self.layout, layer_idx, self.device)
            self._loaded[layer_idx] = rows
        return rows

    def _gather(
        self, layer_idx: int, ids: torch.Tensor, heads: Sequence[int] | None = None
    ) -> torch.Tensor:
        return gather_heads(self._stored(layer_idx), ids.to(self.device), heads)

    def _rows_changed(self) -> None:
        super()._rows_changed()
        self._searchable_ids = None
        self._directions.clear()
        self._directions_of_head.clear()

    def _ids(self) -> torch.Tensor:
        """Return the searchable row ids on the device, (n,)."""
        if self._searchable_ids is None:
            self._searchable_ids = torch.from_numpy(self._searchable_rows()).to(self.device)
        return self._searchable_ids

    def _unit_keys(self, layer_idx: int) -> torch.Tensor:
        """Return a layer's searchable keys, normalised, (Hkv, n, head_dim) float32."""
        ids = self._ids()
        if layer_idx not in self._directions:
            head_dim = self._layer(layer_idx).head_dim
            keys = self._stored(layer_idx)[..., :head_dim][ids].float()  # (n, Hkv, D)
            unit = torch.nn.functional.normalize(keys, dim=-1)
            self._directions[layer_idx] = unit.transpose(0, 1).contiguous()
        return self._directions[layer_idx]

    def _unit_keys_of_head(self, layer_idx: int, head: int) -> torch.Tensor:
        """Return one head's searchable keys, normalised, (1, n, head_dim) float32."""
        ids, whole = self._ids(), self._directions.get(layer_idx)
        if whole is not None:
            return whole[head : head + 1]
        found = self._directions_of_head.get((layer_idx, head))
        if found is None:
            head_dim = self._layer(layer_idx).head_dim
            keys = self._stored(layer_idx)[:, head, :head_dim][ids].float()  # (n, D)
            found = torch.nn.functional.normalize(keys, dim=-1).unsqueeze(0)
            self._directions_of_head[layer_idx, head] = found
        return found
