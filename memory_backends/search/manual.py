"""`memory_type="manual"`: rows as tensors on a device, searched exactly with one matrix product."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from memory_backends.layout import Heads
from memory_backends.rows.base import gather_heads, loaded
from memory_backends.rows.tensors import RowTensors
from memory_backends.search.checks import usable_device
from memory_backends.search.exact import best_rows
from memory_backends.search.scores import SearchResult
from memory_backends.search.searchable import SearchableRows, unit_length
from memory_backends.search.searcher import Searcher

_SCOPED_KEY_BYTES = 2**30  # kept of scopes' keys; those of all rows are kept as well


@dataclass(frozen=True)
class ManualOptions:
    """The options of `memory_type="manual"`.

    Attributes:
        device: where the tensors live; None for the CPU.
    """

    device: torch.device | str | None = None


class ManualSearcher(Searcher):
    """Exact search over tensors on a device.

    A memory without a path has its rows on the device alone, exactly; its `row_codec` is that of
    the copy that `save` makes. With a path, the rows are in the store, and each layer is loaded
    onto the device, decoded, when it is first used. Keys are kept a second time, normalised and in
    float32: 4 * head_dim bytes a key.
    """

    options_class = ManualOptions

    def __init__(self, rows: SearchableRows, options: ManualOptions) -> None:
        super().__init__(rows, options)
        self._loaded: dict[int, torch.Tensor] = {}  # layer -> rows on the device
        # (layer, head) -> (h, n, D) float32; the head is None for all of the layer's
        self._unit_keys: dict[tuple[int, int | None], torch.Tensor] = {}
        self._ids_on_device: torch.Tensor | None = None
        rows.scopes.num_bytes = _SCOPED_KEY_BYTES

    @classmethod
    def rows_device(cls, options: ManualOptions) -> torch.device:
        """Return `options.device`, or the CPU."""
        return usable_device(options.device or "cpu")

    def candidates(
        self, layer_idx: int, unit_queries: torch.Tensor, k: int, heads: Heads
    ) -> SearchResult:
        """Compare queries with all searchable rows."""
        if heads is None:
            return self._nearest_of(self._keys(layer_idx), unit_queries, k)
        hits = [
            self._nearest_of(self._keys(layer_idx, head), queries.unsqueeze(0), k)
            for head, queries in zip(heads, unit_queries, strict=True)
        ]
        scores, ids = zip(*hits, strict=True)
        return SearchResult(torch.cat(scores), torch.cat(ids))

    def gather(self, layer_idx: int, ids: torch.Tensor, heads: Heads = None) -> torch.Tensor:
        """Return rows by id, from the device."""
        return gather_heads(self._stored(layer_idx), ids.to(self.device), heads)

    def rows_changed(self) -> None:
        """Forget the normalised keys."""
        self._ids_on_device = None
        self._unit_keys.clear()

    def _nearest_of(self, unit_keys: torch.Tensor, queries: torch.Tensor, k: int) -> SearchResult:
        """Search keys (h, n, D) for queries (h, N, D)."""
        scores, positions = best_rows(queries.to(self.device), [unit_keys], k)
        return SearchResult(scores, self._ids()[positions])

    def _stored(self, layer_idx: int) -> torch.Tensor:
        """Return all rows of a layer on the device, (M, Hkv, head_dim + value_head_dim)."""
        stored = self.rows.stored
        if isinstance(stored, RowTensors):
            return stored.layer(layer_idx)
        rows = self._loaded.get(layer_idx)
        if rows is None or len(rows) != stored.num_rows:
            rows = loaded(stored, self.layout, layer_idx, self.device)
            self._loaded[layer_idx] = rows
        return rows

    def _ids(self) -> torch.Tensor:
        """Return the searchable row ids on the device, (n,)."""
        if self._ids_on_device is None:
            self._ids_on_device = torch.from_numpy(self.rows.ids).to(self.device)
        return self._ids_on_device

    def _keys(self, layer_idx: int, head: int | None = None) -> torch.Tensor:
        """Return a layer's searchable keys, or those of one head, normalised, (h, n, D) float32."""
        of_layer = self._unit_keys.get((layer_idx, None))
        if of_layer is not None:
            return of_layer if head is None else of_layer[head : head + 1]
        keys = self._unit_keys.get((layer_idx, head))
        if keys is None:
            heads = slice(None) if head is None else slice(head, head + 1)
            head_dim = self.layout.layers[layer_idx].head_dim
            stored = self._stored(layer_idx)[:, heads, :head_dim][self._ids()]  # (n, h, D)
            keys = unit_length(stored).transpose(0, 1).contiguous()
            self._unit_keys[layer_idx, head] = keys
        return keys
