"""Inverted lists that fit the queries: k-means in the metric of what queries see of a key.

Of the difference between a key k and its list's centroid c, a query q notices q.(k - c), whose mean
square over queries is (k - c)^T S (k - c) with S = E[q q^T]. So lists are clustered in that metric:
L2 after a linear map, the square root of S. Without sampled queries S is the identity.

What makes a list worth searching is its best key, not its mean: it is better by some b, on average
over the queries. Queries of one head have a direction w with q.w close to 1 (their mean is far from
zero), so the quantizer holds c + b w, and the inner product that ranks lists is q.c + b for the
price of q.c: the index is an ordinary FAISS one. What either saves is in `benchmarks/recall.md`.

Sources: RetrievalAttention (arXiv 2409.10516) for the difference of the distributions of queries
and keys; Guo et al. (arXiv 1908.10396) for losses weighted by the queries.
"""

from __future__ import annotations

from typing import Any

import torch
import faiss
import numpy as np
import numpy.typing as npt

from memory_backends.layout import Float32Array

_ITERATIONS = 4
_SEED = 1
_ROWS_A_BLOCK = 1024
_RIDGE = 0.01  # of the mean eigenvalue: directions that no sampled query saw still count a little


class QueryMetric:
    """A linear map after which plain L2 distance is the distance that queries notice.

    It is learned from queries (s, dim) float32 of unit length. Fewer than `dim` say too little, and
    give plain L2.
    """

    def __init__(self, queries: Float32Array) -> None:
        dim = queries.shape[-1]
        moment = np.eye(dim)
        if len(queries) >= dim:
            moment = queries.T.astype(np.float64) @ queries / len(queries)
            moment += _RIDGE * np.trace(moment) / dim * np.eye(dim)
        values, vectors = np.linalg.eigh(moment)
        roots = np.sqrt(values)
        self._forward = (vectors * roots) @ vectors.T  # (dim, dim), symmetric
        self._back = (vectors / roots) @ vectors.T

    def map(self, keys: Float32Array) -> Float32Array:
        """Map keys, (n, dim) float32, to where L2 distances are those that queries notice."""
        return np.ascontiguousarray(keys @ self._forward.astype(np.float32))

    def back(self, mapped: Float32Array) -> Float32Array:
        """Undo `map`."""
        return np.ascontiguousarray((mapped @ self._back).astype(np.float32))


def train_lists(index: Any, keys: Float32Array, metric: QueryMetric) -> None:
    """Give an untrained IVF index its lists, from a sample of keys (n, dim) of unit length."""
    mapped = metric.map(keys)
    chosen = np.random.default_rng(_SEED).choice(len(mapped), index.nlist, replace=False)
    means = mapped[np.sort(chosen)]
    for _ in range(_ITERATIONS):
        lists = nearest_of(mapped, means)
        order = np.argsort(lists, kind="stable")
        present, starts, sizes = np.unique(lists[order], return_index=True, return_counts=True)
        means[present] = np.add.reduceat(mapped[order], starts) / sizes[:, None]
    _set_centroids(index, metric.back(means))
    index.train(keys)  # the codes; a quantizer that has its centroids is left alone


def has_own_lists(index: Any) -> bool:
    """Tell whether an index is of the kinds whose lists can be chosen here: plain IVF."""
    kinds = (faiss.IndexIVFFlat, faiss.IndexIVFScalarQuantizer)
    return isinstance(index, kinds) and isinstance(
        faiss.downcast_index(index.quantizer), faiss.IndexFlat
    )


def lists_of(index: Any) -> npt.NDArray[np.int64]:
    """Return the list that each position of an IVF index is in, (ntotal,)."""
    lists = np.empty(index.ntotal, dtype=np.int64)
    for number in range(index.nlist):
        size = index.invlists.list_size(number)
        if size:
            lists[faiss.rev_swig_ptr(index.invlists.get_ids(number), size)] = number
    return lists


def keeps_keys(index: Any) -> bool:
    """Tell whether an index has its keys as they are, apart from their lists' centroids."""
    if isinstance(index, faiss.IndexIVFScalarQuantizer):
        is_half = index.sq.qtype == faiss.ScalarQuantizer.QT_fp16
        return bool(is_half and not index.by_residual)
    return isinstance(index, faiss.IndexIVFFlat)


def means_of(index: Any) -> Float32Array:
    """Return the mean key of each list, (nlist, dim) float32; its centroid for an empty list.

    Those of an index without `keeps_keys` are the centroids as they were trained.
    """
    means: Float32Array = index.quantizer.reconstruct_n(0, index.nlist)
    if not keeps_keys(index):
        return means
    dtype = np.float32 if isinstance(index, faiss.IndexIVFFlat) else np.float16
    for number in range(index.nlist):
        size = index.invlists.list_size(number)
        if size:
            codes = faiss.rev_swig_ptr(index.invlists.get_codes(number), size * index.code_size)
            means[number] = codes.view(dtype).reshape(size, -1).mean(axis=0, dtype=np.float32)
    return means


class ListBias:
    """By how much each list's best key beats its mean, on average over queries (s, dim)."""

    def __init__(self, queries: Float32Array, num_lists: int) -> None:
        self._queries = queries
        self._best = np.full((len(queries), num_lists), -np.inf, dtype=np.float32)

    def look_at(self, keys: Float32Array, lists: npt.NDArray[np.int64]) -> None:
        """Take keys into account, (n, dim) float32 normalised, with the list of each."""
        order = np.argsort(lists, kind="stable")
        present, starts = np.unique(lists[order], return_index=True)
        scores = self._queries @ keys[order].T  # (s, n)
        best = np.maximum.reduceat(scores, starts, axis=1)
        self._best[:, present] = np.maximum(self._best[:, present], best)

    def apply(self, index: Any) -> None:
        """Move the centroids that rank an index's lists, which must have been unmoved."""
        means = means_of(index)
        above = self._best - self._queries @ means.T  # (s, nlist)
        bias = np.where(np.isfinite(above), above, 0).mean(axis=0)
        moment = self._queries.T.astype(np.float64) @ self._queries / len(self._queries)
        moment += 1e-4 * np.eye(index.d)
        constant = np.linalg.solve(moment, self._queries.mean(axis=0, dtype=np.float64))
        _set_centroids(index, means + np.outer(bias, constant).astype(np.float32))


def nearest_of(vectors: Float32Array, means: Float32Array) -> npt.NDArray[np.int64]:
    """Return which of `means`, (m, dim), is nearest to each of `vectors`, (n, dim), by L2; (n,).

    A matrix product and an argmax over blocks that stay in the cache: four times as fast as
    `IndexFlatL2.search`, and with it k-means, which takes most of the time of building an index.
    """
    halves = np.square(means).sum(axis=1, keepdims=True) / 2
    against = torch.from_numpy(np.hstack([means, -halves]).T.copy())  # (dim + 1, m)
    extended = torch.from_numpy(np.pad(vectors, ((0, 0), (0, 1)), constant_values=1))
    nearest = np.empty(len(vectors), dtype=np.int64)
    for start in range(0, len(vectors), _ROWS_A_BLOCK):
        scores = extended[start : start + _ROWS_A_BLOCK] @ against
        nearest[start : start + len(scores)] = scores.numpy().argmax(axis=1)
    return nearest


def add_to_lists(index: Any, keys: Float32Array, lists: npt.NDArray[np.int64]) -> None:
    """Add keys, (n, dim) float32 normalised, to the lists they belong to, (n,)."""
    index.add_core(len(keys), faiss.swig_ptr(keys), None, faiss.swig_ptr(lists))


def _set_centroids(index: Any, centroids: Float32Array) -> None:
    index.quantizer.reset()
    index.quantizer.add(np.ascontiguousarray(centroids))
