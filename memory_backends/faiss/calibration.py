"""How many lists a search must look into, measured on queries that the model really asked.

The user asks for a recall, not for nprobe. For each (layer, KV head) the sampled queries' exact
nearest rows are known, and the rank, by inner product with the centroids, of the list that each is
in: a search of p lists finds a row if its list's rank is below p. One pass gives the recall of all.

Rows count as much as the attention they get: a softmax over a query's nearest rows, of which the
attention sinks' share is left out, since a search finds sinks first and they carry no content.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import numpy as np
import numpy.typing as npt

from memory_backends.layout import Float32Array

K = 10  # nearest rows that recall counts
_EFFORTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)


class Effort(NamedTuple):
    """What a search that looks into some number of lists finds."""

    nprobe: int  # how many lists it looks into
    attention: float  # share of the attention paid to the exact `K` nearest rows that it finds
    recall: float  # share of the exact `K` nearest rows that it finds
    scanned: float  # share of all rows that are compared with the query


def efforts(
    index: Any,
    lists: npt.NDArray[np.int64],
    queries: Float32Array,
    nearest: npt.NDArray[np.int64],
    attention: Float32Array,
) -> list[Effort]:
    """Measure what searches of more and more of an IVF index's lists find.

    Args:
        index: the index.
        lists: (n,) the list of each position.
        queries: (s, dim) float32.
        nearest: (s, K) positions of the exact nearest rows; -1 where there are fewer.
        attention: (s, K) the attention that each of them gets.

    Returns:
        One `Effort` a step, up to all lists; the attention is 1 where the queries pay none.
    """
    num_lists = index.nlist
    _, order = index.quantizer.search(queries, num_lists)  # (s, nlist), best first
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.arange(num_lists)[None], axis=1)
    is_row = nearest >= 0
    rank = np.where(is_row, np.take_along_axis(ranks, lists[nearest], axis=1), num_lists)  # (s, K)
    sizes = np.bincount(lists, minlength=num_lists)
    scanned = sizes[order].cumsum(axis=1).mean(axis=0) / max(len(lists), 1)  # (nlist,)
    total = float(attention[is_row].sum())
    measured = []
    for nprobe in [*(p for p in _EFFORTS if p < num_lists), num_lists]:
        hit = rank < nprobe
        paid = float(attention[hit].sum()) / total if total else 1.0
        recall = float(hit.sum()) / max(int(is_row.sum()), 1)
        measured.append(Effort(nprobe, paid, recall, float(scanned[nprobe - 1])))
    return measured


def least_effort(efforts: list[Effort], target: float) -> Effort:
    """Return the cheapest effort that finds the target share of the attention, else the last."""
    return next((effort for effort in efforts if effort.attention >= target), efforts[-1])


class Nearest:
    """The k exact nearest keys of queries (s, dim) of unit length, a part of the keys at a time."""

    def __init__(self, queries: Float32Array, k: int) -> None:
        self._queries = queries
        self._scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
        self.positions = np.full((len(queries), k), -1, dtype=np.int64)  # -1 where there is none

    def look_at(self, keys: Float32Array, first: int) -> None:
        """Take keys into account, (n, dim) float32 normalised, that have positions from `first`."""
        k = self.positions.shape[1]
        products = torch.from_numpy(self._queries) @ torch.from_numpy(keys).T  # (s, n)
        best = products.topk(min(k, len(keys)))
        scores = np.concatenate([self._scores, best.values.numpy()], axis=1)
        positions = np.concatenate([self.positions, best.indices.numpy() + first], axis=1)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        self._scores = np.take_along_axis(scores, order, axis=1)
        self.positions = np.take_along_axis(positions, order, axis=1)
