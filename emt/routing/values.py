"""Routing by values: runs of rows whose values, on average, point where those of a question do.

What a late layer adds to the stream of a token tells what the text is about, in whatever words. The
values that it does so with are stored with every row. So their mean over a run of rows is an
embedding of the run that needs no other model, and nothing that is computed while reading.

Source: means of a language model's states as embeddings, Jiang et al., Scaling Sentence Embeddings
with Large Language Models (arXiv 2307.16645); the mean of all texts taken off, Mu and Viswanath,
All-but-the-Top (arXiv 1702.01417). That values do better than keys, early layers and one layer was
measured.
"""

from __future__ import annotations

import math
import threading
from typing import NamedTuple

import torch
import numpy as np
from torch import Tensor

from emt.model.attached import AttachedModel
from emt.model.devices import input_device, no_autocast
from emt.model.positions import max_positions
from emt.model.references import alive
from emt.model.watch import watching
from emt.routing.mean_values import DIMS, MeanValues, documents_of
from emt.routing.runs import Runs
from memory_backends import MemoryBackend, Scope
from memory_backends.layout import Float32Array

_SHARE = 0.25  # of the layers: the last ones
_MAX_LAYERS = 8  # of these, evenly spread: more would cost a large model's memory more than it says
_RUNS_AT_A_TIME = 128


_SCOPES_KEPT = 4  # whose mean values are kept: a copy takes 4 KB a run


class _Read(NamedTuple):
    """The mean values of a memory as it was after so many changes."""

    backend: MemoryBackend
    num_changes: int
    values: MeanValues


class _Index(NamedTuple):
    """The mean values of a scope.

    Attributes:
        means: (layers, r, 128) float32, of each run.
        center: (layers, 1, 128) float32, of all runs.
        lengths: (layers, r) float32, how far each run is from the center.
    """

    runs: Runs
    means: Float32Array
    center: Float32Array
    lengths: Float32Array


class ValueIndex:
    """The mean values of all stored rows, in runs of 64 rows of one document; threads may share it.

    Args:
        model: the attached model.
    """

    def __init__(self, model: AttachedModel) -> None:
        self._model = model
        layers = sorted(model.layout.layers)
        layers = layers[-math.ceil(_SHARE * len(layers)) :]
        spread = np.linspace(0, len(layers) - 1, min(len(layers), _MAX_LAYERS)).round()
        self._layers = [layers[int(at)] for at in spread]
        self._projections = {layer: _projection(_width(model, layer)) for layer in self._layers}
        self._read: _Read | None = None
        self._indexes: dict[Scope | None, _Index] = {}  # the last used is the last
        self._lock = threading.Lock()

    def scores(
        self, question: Tensor, backend: MemoryBackend, scope: Scope | None = None
    ) -> tuple[Runs, Float32Array]:
        """Return the runs of a scope, and how near each is to a question.

        Args:
            question: (T,) int64, its tokens, without a chat template.
            backend: where the memories are.
            scope: what is known of the memory; None for all of it.

        Returns:
            The r runs, and (r,) float32, 0 to 1: the mean over the layers of the cosine between the
            question's mean values and the run's, less those of all runs; 0 if it is negative.
        """
        query = self._of_question(question)[..., None]
        with self._lock:
            index = self._index_of(backend, scope)
        products = (index.means @ query - index.center @ query)[..., 0]
        norms = index.lengths * np.linalg.norm(query, axis=1)
        cosines = np.divide(products, norms, out=np.zeros_like(products), where=norms > 0)
        return index.runs, cosines.mean(axis=0).clip(0, 1)

    @torch.no_grad()
    def _of_question(self, token_ids: Tensor) -> Float32Array:
        """Return the mean values of a text's tokens: (layers, 128) float32."""
        decoder = alive(self._model.decoder, "route")
        device = input_device(decoder)
        token_ids = token_ids[-(max_positions(self._model.config) or len(token_ids)) :]
        with watching(decoder) as seen, no_autocast(device):
            decoder(input_ids=token_ids[None].to(device), use_cache=False)
        values = {call.layer_idx: call.value[0] for call in seen.calls}  # (Hkv, T, Dv)
        first = min(len(token_ids) - 1, 1)  # the first token of a text is a sink
        means = [
            _by_row(values[layer])[first:].mean(axis=0) @ self._projections[layer]
            for layer in self._layers
        ]
        return np.stack(means)

    def keep(self, backend: MemoryBackend) -> None:
        """Keep the mean values of a memory in its store, if it has one that can be written."""
        if backend.catalog.path is None or backend.is_read_only:
            return
        with self._lock:
            values = self._read_values(backend)
        kept = MeanValues.read(backend, self._layers)
        if kept is None or not np.array_equal(kept.documents, values.documents):
            values.write(backend)

    def _index_of(self, backend: MemoryBackend, scope: Scope | None) -> _Index:
        """Return the index of a scope as it is now."""
        values = self._read_values(backend)
        index = self._indexes.pop(scope, None) or _indexed(values, scope)
        self._indexes[scope] = index
        if len(self._indexes) > _SCOPES_KEPT:
            del self._indexes[next(iter(self._indexes))]
        return index

    def _read_values(self, backend: MemoryBackend) -> MeanValues:
        """Return the mean values of a memory as it is now; only new documents are read."""
        read = self._read
        if read is not None and read.backend is not backend:
            read = None
        if read is not None and read.num_changes == backend.num_changes:
            return read.values
        num_changes, documents = backend.num_changes, documents_of(backend.catalog)
        if read is None:
            kept = MeanValues.read(backend, self._layers)
            before = kept or MeanValues.none(self._layers)
        else:
            before = read.values
        values = before.brought_to(documents, lambda runs: self._means(runs, backend))
        self._read, self._indexes = _Read(backend, num_changes, values), {}
        return values

    def _means(self, runs: Runs, backend: MemoryBackend) -> Float32Array:
        """Return the mean values of runs, (layers, r, 128) float32; their rows are read once."""
        means = np.empty((len(self._layers), len(runs.starts), DIMS), dtype=np.float32)
        for first in range(0, len(runs.starts), _RUNS_AT_A_TIME):
            part = slice(first, first + _RUNS_AT_A_TIME)
            starts, stops = runs.starts[part], runs.stops[part]
            rows = np.unique(np.concatenate(list(map(np.arange, starts, stops))))
            low, high = np.searchsorted(rows, starts), np.searchsorted(rows, stops)
            # The first row of a text is a sink, whose values say nothing.
            low += (starts == runs.documents[part]) & (stops - starts > 1)
            bounds = np.stack([low, high], axis=1).ravel()
            for i, layer in enumerate(self._layers):
                values = _stored_values(torch.from_numpy(rows), layer, backend)
                values = np.append(values, np.zeros_like(values[:1]), axis=0)  # a bound may be n
                sums = np.add.reduceat(values, bounds, axis=0)[::2]
                means[i, part] = sums / (high - low)[:, None] @ self._projections[layer]
        return means


def _indexed(values: MeanValues, scope: Scope | None) -> _Index:
    """Return the mean values of the runs of a scope, and their own mean."""
    runs, means = values.runs, values.means
    if scope is not None:
        inside = runs.inside(scope)
        runs, means = runs.among(inside), means[:, inside]
    center = means.sum(axis=1, keepdims=True) / max(means.shape[1], 1)
    lengths = [
        np.linalg.norm(of_layer - its, axis=-1) for of_layer, its in zip(means, center, strict=True)
    ]
    return _Index(runs, means, center, np.stack(lengths))


def _stored_values(rows: Tensor, layer: int, backend: MemoryBackend) -> Float32Array:
    """Return the values of rows (n,) in one layer: (n, Hkv * Dv) float32."""
    num_heads = backend.layout.layers[layer].num_key_value_heads
    _, values = backend.fetch(layer, rows.expand(num_heads, -1))
    return _by_row(values)


def _width(model: AttachedModel, layer: int) -> int:
    shape = model.layout.layers[layer]
    return shape.num_key_value_heads * shape.value_head_dim


def _projection(width: int) -> Float32Array:
    """Return what makes 128 dims of any width, (width, 128): zeros are added, or a random rotation
    is cut off, which nearly keeps angles."""
    if width <= DIMS:
        return np.eye(width, DIMS, dtype=np.float32)
    normal = np.random.default_rng(width).standard_normal((width, DIMS))
    return np.linalg.qr(normal)[0].astype(np.float32)


def _by_row(values: Tensor) -> Float32Array:
    """Return values (Hkv, n, Dv) as (n, Hkv * Dv) float32."""
    rows: Float32Array = values.float().cpu().transpose(0, 1).flatten(1).numpy()
    return rows
