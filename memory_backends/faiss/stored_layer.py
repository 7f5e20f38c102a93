"""What building an index reads of a store: one layer's keys and sampled queries."""

from __future__ import annotations

import torch
import numpy as np

from memory_backends.layout import Float32Array, Int64Array
from memory_backends.store import Store

_SPARSEST_SPAN = 2  # rows read for each row wanted


class StoredLayer:
    """Keys and sampled queries of some of a layer's h KV heads; `building.LayerRows`."""

    def __init__(self, store: Store, layer_idx: int, heads: list[int]) -> None:
        self._store = store
        self._rows = store.rows
        self._layer_idx = layer_idx
        self._layer = store.layout.layers[layer_idx]
        is_all = heads == list(range(self._layer.num_key_value_heads))
        self._heads = None if is_all else heads  # None reads without copying
        self._num_heads = len(heads)

    def keys(self, ids: Int64Array) -> Float32Array:
        """Return the keys of rows as stored, (h, n, head_dim) float32."""
        first, stop = (int(ids.min()), int(ids.max()) + 1) if len(ids) else (0, 0)
        if stop - first <= _SPARSEST_SPAN * len(ids):  # read in order, and leave some out
            rows = self._rows.span(self._layer_idx, first, stop, self._heads).transpose(0, 1)
            if stop - first > len(ids) or np.any(np.diff(ids) != 1):
                rows = rows[:, torch.from_numpy(ids - first)]
        else:
            wanted = torch.from_numpy(ids).expand(self._num_heads, -1)
            rows = self._rows.gather(self._layer_idx, wanted, self._heads)
        keys: Float32Array = rows[..., : self._layer.head_dim].float().numpy()
        return keys

    def queries(self) -> Float32Array:
        """Return sampled queries, (h, s, G, head_dim) float32."""
        samples = self._store.samples.grouped(self._layer_idx)
        chosen: Float32Array = (samples if self._heads is None else samples[self._heads]).numpy()
        return chosen
