"""From stored rows to one layer's indexes: train, add, calibrate. Memory is bounded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
import numpy as np
import numpy.typing as npt

from memory_backends.faiss import index as faiss_index
from memory_backends.faiss.calibration import Effort, K, Nearest, efforts
from memory_backends.faiss.lists import (
    ListBias,
    QueryMetric,
    add_to_lists,
    has_own_lists,
    keeps_keys,
    lists_of,
    means_of,
    nearest_of,
    train_lists,
)
from memory_backends.layout import Float32Array, Int64Array
from memory_backends.store import Store

_ROWS_AT_ONCE = 16_384
_SPARSEST_SPAN = 2  # rows read for each row wanted
_FEWEST_TOKENS = 16  # to calibrate
_TOKENS_TO_CALIBRATE = 64  # of the sample; others make the metric and rank the lists


class LayerRows(Protocol):
    """The keys and queries of a layer, from which its indexes are built."""

    def keys(self, ids: Int64Array) -> Float32Array:
        """Return the keys of rows as stored, (Hkv, n, head_dim) float32."""

    def queries(self) -> Float32Array:
        """Return sampled queries, (Hkv, s, G, head_dim) float32."""


class StoredLayer:
    """Keys and sampled queries of some of a layer's h KV heads, from a store."""

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


def add_rows(indexes: list[Any], rows: LayerRows, present: int, ids: Int64Array) -> None:
    """Add rows to the indexes of a layer's heads, and train those that need it.

    `ids`, (n,), are the row of each position; the first `present` are in the indexes already.
    """
    if present == len(ids):
        return
    queries = rows.queries()[:, ::2]  # the others calibrate
    metrics = [QueryMetric(_unit(part.reshape(-1, part.shape[-1]))) for part in queries]
    if not indexes[0].is_trained:
        wanted = max(faiss_index.training_rows(indexes[0]), 1)
        sample = _unit(rows.keys(ids[:: max(len(ids) // wanted, 1)]))
        for index, metric, keys in zip(indexes, metrics, sample, strict=True):
            if has_own_lists(index):
                train_lists(index, keys, metric)
            else:
                index.train(keys)
    means = [
        metric.map(means_of(index)) if has_own_lists(index) else None
        for index, metric in zip(indexes, metrics, strict=True)
    ]
    for batch in _batches(ids[present:]):
        all_keys = _unit(rows.keys(batch))
        for index, metric, mean, keys in zip(indexes, metrics, means, all_keys, strict=True):
            if mean is None:
                index.add(keys)
            else:
                add_to_lists(index, keys, nearest_of(metric.map(keys), mean))


def calibrate(
    indexes: list[Any], rows: LayerRows, ids: Int64Array, is_sink: npt.NDArray[np.bool_]
) -> list[list[Effort]]:
    """Rank lists by their best keys, and measure what searches of more and more lists find.

    The indexes, one a KV head, have all of `ids`, (n,), at their positions; `is_sink`, (n,), marks
    attention sinks.

    Returns:
        One list a head; empty ones for an index without lists, or with too few sampled queries.
    """
    sampled = rows.queries()[:, 1::2]  # the others made the metric
    if sampled.shape[1] < _FEWEST_TOKENS or not has_own_lists(indexes[0]):
        return [[] for _ in indexes]
    queries = _some(sampled)  # (Hkv, s * G, D)
    lists = [lists_of(index) for index in indexes]
    exact = [Nearest(_unit(part), K) for part in queries]
    biases = [
        ListBias(_unit(part), index.nlist)
        for part, index in zip(_some(rows.queries()[:, ::2]), indexes, strict=True)
        if keeps_keys(index)
    ]
    for first, batch in zip(range(0, len(ids), _ROWS_AT_ONCE), _batches(ids), strict=True):
        keys = _unit(rows.keys(batch))  # (Hkv, n, D)
        for head, nearest in enumerate(exact):
            nearest.look_at(keys[head], first)
        for head, bias in enumerate(biases):
            bias.look_at(keys[head], lists[head][first : first + len(batch)])
    for index, bias in zip(indexes, biases, strict=False):
        bias.apply(index)
    calibrated = []
    for head, (index, nearest) in enumerate(zip(indexes, exact, strict=True)):
        positions = nearest.positions
        wanted, at = np.unique(positions[positions >= 0], return_inverse=True)
        keys = rows.keys(ids[wanted])[head]  # (u, D)
        taken = np.zeros((*positions.shape, keys.shape[-1]), dtype=np.float32)
        taken[positions >= 0] = keys[at]
        logits = np.einsum("sd,skd->sk", queries[head], taken) * keys.shape[-1] ** -0.5
        logits[positions < 0] = -np.inf
        attention = np.exp(logits - logits.max(axis=1, keepdims=True))
        attention /= attention.sum(axis=1, keepdims=True)
        attention[is_sink[positions]] = 0
        calibrated.append(efforts(index, lists[head], _unit(queries[head]), positions, attention))
    return calibrated


def _some(queries: Float32Array) -> Float32Array:
    """Thin out sampled queries (Hkv, s, G, D): (Hkv, s' * G, D) of few enough tokens."""
    step = -(-queries.shape[1] // _TOKENS_TO_CALIBRATE) or 1
    return queries[:, ::step].reshape(len(queries), -1, queries.shape[-1])


def _batches(ids: Int64Array) -> Iterator[Int64Array]:
    for start in range(0, len(ids), _ROWS_AT_ONCE):
        yield ids[start : start + _ROWS_AT_ONCE]


def _unit(vectors: Float32Array) -> Float32Array:
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.ascontiguousarray(vectors / np.maximum(lengths, np.finfo(np.float32).tiny))
