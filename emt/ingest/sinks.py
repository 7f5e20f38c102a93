"""Which rows of a document are attention sinks: those that are attended to whatever is asked.

A softmax has to put its weight somewhere, so where there is nothing to find, heads put it on rows
that say little: nearly all of it on the first row of a text, less on some articles, full stops and
line ends. Which ones differs from model to model and from text to text, so it is measured. A search
that found the sinks of every document would find little else.

Source: Xiao et al., Efficient Streaming Language Models with Attention Sinks (arXiv 2309.17453).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import numpy as np
import numpy.typing as npt
from torch import Tensor

NUM_QUERIES = 32  # of a document's first window
FACTOR = 2.0  # times the attention that other rows get; see `SinkFinder`


class SinkFinder:
    """Finds the attention sinks of one document, window by window, by what its own queries do.

    Up to `NUM_QUERIES` queries, evenly spread over the first window, attend to each row as they
    would to a memory: its key is at position 0. A row's attention is the mean over all layers and
    heads, and of that the median over the queries: a row that only some of them look for gets
    little. It is a sink if that is more than `FACTOR` times what the other rows of the first window
    get on average, so never are all rows of a document sinks. Rows of later windows are compared
    with those of the first.
    """

    def __init__(self) -> None:
        self._num_rows = 0  # of the first window
        self._queries: dict[int, Tensor] = {}  # layer -> (Hkv, G * s, D) float32, scaled
        self._lse: dict[int, Tensor] = {}  # layer -> (Hkv, G * s, 1), over the first window's rows

    def find(
        self,
        keys: Mapping[int, Tensor],
        queries: Mapping[int, Tensor],
        scaling: Mapping[int, float],
    ) -> npt.NDArray[np.bool_]:
        """Return which of a window's n rows are sinks, (n,) bool.

        Args:
            keys: layer -> (Hkv, n, D), at position 0.
            queries: layer -> (H, n, D), of the same tokens.
            scaling: layer -> the factor of its logits.
        """
        num_rows = next(iter(keys.values())).shape[1]
        if not num_rows:
            return np.zeros(0, dtype=bool)
        of_queries = [
            self._attention(idx, key.float(), queries[idx], scaling[idx]).cpu()
            for idx, key in keys.items()
        ]  # of each layer, (s, n)
        self._num_rows = self._num_rows or num_rows
        attention = torch.stack(of_queries).mean(0).median(0).values  # (n,)
        is_sink = attention * (self._num_rows - 1) > FACTOR * (1 - attention)
        found: npt.NDArray[np.bool_] = is_sink.numpy()
        return found

    def _attention(self, idx: int, key: Tensor, query: Tensor, scaling: float) -> Tensor:
        """Return what each kept query gives to rows in one layer, (s, n), the mean over heads."""
        num_heads, num_rows, dim = len(query), *key.shape[1:]
        is_first = not self._num_rows
        if is_first:
            first = min(1, num_rows - 1)  # the first token has seen nothing; it asks otherwise
            count = min(NUM_QUERIES, num_rows - first)
            sample = torch.linspace(first, num_rows - 1, count).long().to(query.device)
            sampled = query[:, sample].float() * scaling  # (H, s, D)
            self._queries[idx] = sampled.reshape(len(key), -1, dim)
        logits = self._queries[idx] @ key.transpose(1, 2)  # (Hkv, G * s, n)
        if is_first:
            self._lse[idx] = logits.logsumexp(-1, keepdim=True)
        share = logits.sub_(self._lse[idx]).exp_().clamp_(max=1)
        return share.view(num_heads, -1, num_rows).mean(0)
