"""`HeadSearch`: what a prompt's queries retrieve, in the retrieval heads of a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import numpy as np
from torch import Tensor

from emt.model.attached import AttachedModel
from emt.routing.evidence import Hits
from emt.routing.head_profile import HeadProfile
from emt.routing.queries import unit_queries
from memory_backends import MemoryBackend, Scope, Search
from memory_backends.layout import Int64Array

TOPK = 64  # rows that each query retrieves


class HeadSearch:
    """Searches memories with a model's retrieval heads.

    Args:
        model: the attached model.
        profile: its retrieval heads.
    """

    def __init__(self, model: AttachedModel, profile: HeadProfile) -> None:
        self.profile = profile
        self._model = model
        self._documents: tuple[MemoryBackend, int, Int64Array] | None = None

    def hits(
        self,
        token_ids: Tensor,
        tokens: Sequence[int],
        backend: MemoryBackend,
        *,
        scope: Scope | None = None,
    ) -> Hits:
        """Search for each of some tokens in each of the profile's heads.

        Args:
            token_ids: (T,) int64, the prompt.
            tokens: which of the T tokens have queries, ascending.
            backend: where the memories are, of which only `scope` is searched.
        """
        profile, prompt = self.profile, token_ids[: tokens[-1] + 1]
        of_layers = unit_queries(self._model, prompt, profile.layers, distance=profile.distance)
        k = min(TOPK, backend.num_searchable(scope))
        searches, lengths = [], []
        groups = profile.groups(self._model.query_heads, backend.layout)
        for (layer_idx, kv_head), group in groups.items():
            queries = torch.cat(
                [of_layers[layer_idx][head, tokens] - mean for head, mean in group]
            )  # (G' * T', D): G' profiled heads share the KV head
            lengths.append(queries.norm(dim=-1, keepdim=True).numpy())
            searches.append(Search(layer_idx, queries[None], k, [kv_head], scope))
        hits = backend.search_many(searches)  # one message to each shard, if there are
        ids = np.concatenate([each.ids[0].cpu().numpy() for each in hits])
        scores = np.concatenate([each.scores[0].float().cpu().numpy() for each in hits])
        return Hits.of_search(ids, scores * np.concatenate(lengths), self._first_rows(backend))

    def _first_rows(self, backend: MemoryBackend) -> Int64Array:
        """Return the first row of each document, read again when documents came or went."""
        documents, num_changes = self._documents, backend.num_changes
        if documents is None or documents[0] is not backend or documents[1] != num_changes:
            self._documents = documents = backend, num_changes, backend.catalog.first_rows()
        return documents[2]
