"""What the queries of a forward search: all rows, or for each sequence its own scope."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from emt.attention.softmax import group_queries, ungroup
from emt.config import MemoryConfig
from emt.errors import MemoryUseError
from memory_backends import MemoryBackend, Scope

_NOTHING = (-torch.inf, -1, 0.0, 0.0)  # score, id, key and value where there is no row


@dataclass(frozen=True)
class _Group:
    """Sequences of a batch that search the same rows.

    Attributes:
        scope: the rows; None for all.
        sequences: which of the batch; None for all.
        topk: memories that each of their queries retrieves; 0 if there are none.
    """

    scope: Scope | None
    sequences: list[int] | None
    topk: int


@dataclass(frozen=True)
class _Asked:
    """The queries of a layer's heads that search, as a backend takes them.

    Attributes:
        query: (B, H, Q, D), of all heads.
        grouped: (h, N, D), of those that search, by their h KV heads.
        kv_heads: which these are; None for all.
        query_heads: which query heads those of `grouped` are, as many for each KV head; a KV head
            with fewer names its last one again. None for all.
    """

    query: Tensor
    grouped: Tensor
    kv_heads: list[int] | None
    query_heads: list[int] | None

    @classmethod
    def of(cls, query: Tensor, num_kv_heads: int, heads: Sequence[int] | None) -> _Asked:
        """Choose from queries (B, H, Q, D) those of some query heads; of all if `heads` is None."""
        if heads is None:
            return cls(query, group_queries(query, num_kv_heads), None, None)
        size = query.shape[1] // num_kv_heads
        groups: dict[int, list[int]] = {}
        for head in sorted(heads):
            groups.setdefault(head // size, []).append(head)
        most = max(map(len, groups.values()))
        chosen = [head for group in groups.values() for head in _repeated(group, most)]
        return cls(query, group_queries(query[:, chosen], len(groups)), list(groups), chosen)

    def of_all_heads(self, results: Tensor, nothing: float = 0.0) -> Tensor:
        """Return results for the queries, (h, N, ...), as (B, H, Q, ...).

        Heads that do not search have `nothing`.
        """
        batch, num_heads, num_queries, _ = self.query.shape
        results = ungroup(results.to(self.query.device), batch, num_queries)
        if self.query_heads is None:
            return results
        whole = results.new_full((batch, num_heads, *results.shape[2:]), nothing)
        whole[:, self.query_heads] = results
        return whole


def _repeated(heads: list[int], count: int) -> list[int]:
    return heads + heads[-1:] * (count - len(heads))


class MemorySearch:
    """Where the queries of a batch search.

    Args:
        backend: where the memories are.
        config: the settings in force.
        scopes: the rows that may be found, alike for all sequences, or of each prompt, which has
            batch / len(scopes) consecutive sequences: its beams. None for all rows.
        batch: how many sequences.
        heads: layer -> the query heads that search, the same for all sequences; None for all of
            every layer. Others find nothing.

    Attributes:
        topk: memories that a query retrieves at most.
        without_memories: sequences of the batch with nothing to find.

    Raises:
        MemoryUseError: the batch is not a multiple of the prompts that have scopes.
    """

    def __init__(
        self,
        backend: MemoryBackend,
        config: MemoryConfig,
        scopes: Scope | Sequence[Scope] | None,
        batch: int,
        heads: Mapping[int, Sequence[int]] | None = None,
    ) -> None:
        self._backend = backend
        self._heads = heads
        self._groups = [
            _Group(scope, sequences, config.topk_of(backend.num_searchable(scope)))
            for scope, sequences in _grouped(scopes, batch)
        ]
        self.topk = max(group.topk for group in self._groups)
        self.without_memories = [
            sequence
            for group in self._groups
            if not group.topk
            for sequence in (range(batch) if group.sequences is None else group.sequences)
        ]

    def searches_in(self, layer_idx: int) -> bool:
        """Tell whether any head of a layer searches."""
        return self._heads is None or layer_idx in self._heads

    def query_heads(self, layer_idx: int, num_heads: int) -> Tensor | None:
        """Return which of a layer's query heads search, (H,) bool on the CPU; None for all."""
        if self._heads is None:
            return None
        searching = torch.zeros(num_heads, dtype=torch.bool)
        searching[list(self._heads[layer_idx])] = True
        return searching

    def retrieve(self, layer_idx: int, query: Tensor, num_kv_heads: int) -> list[Tensor]:
        """Search for queries (B, H, Q, D), and fetch the rows that are nearest.

        Returns:
            Scores and ids, (B, H, Q, k), and keys and values, (B, H, Q, k, D or Dv), of `topk`
            memories, best first; -inf, -1 and zeros where a sequence has fewer.
        """
        if len(self._groups) == 1:
            return self._of_group(self._groups[0], layer_idx, query, num_kv_heads)
        results: list[list[Tensor]] = []
        for group in self._groups:
            parts = self._of_group(group, layer_idx, query[group.sequences], num_kv_heads)
            results.append([self._filled(*part) for part in zip(parts, _NOTHING, strict=True)])
        sequences = [sequence for group in self._groups for sequence in group.sequences or []]
        order = torch.tensor(sequences).argsort().to(query.device)
        return [torch.cat(parts)[order] for parts in zip(*results, strict=True)]

    def nearest(
        self, layer_idx: int, query: Tensor, num_kv_heads: int
    ) -> tuple[Tensor, Tensor] | None:
        """Return the keys and values that `retrieve` does, in any order.

        Returns:
            (B, H, Q, k, D) and (B, H, Q, k, Dv), zeros for heads that do not search; None if fewer
            were found for some query of the others.
        """
        if not self.topk or any(group.topk < self.topk for group in self._groups):
            return None
        if len(self._groups) > 1:
            _, ids, keys, values = self.retrieve(layer_idx, query, num_kv_heads)
            searching = self.query_heads(layer_idx, query.shape[1])
            found = ids if searching is None else ids[:, searching]
            return None if bool((found < 0).any()) else (keys, values)
        asked = self._asked(layer_idx, query, num_kv_heads)
        rows = self._backend.nearest(
            layer_idx, asked.grouped, self.topk, heads=asked.kv_heads, scope=self._groups[0].scope
        )
        if rows is None:
            return None
        key, value = (asked.of_all_heads(part) for part in rows)
        return key, value

    def _asked(self, layer_idx: int, query: Tensor, num_kv_heads: int) -> _Asked:
        heads = None if self._heads is None else self._heads[layer_idx]
        return _Asked.of(query, num_kv_heads, heads)

    def _of_group(
        self, group: _Group, layer_idx: int, query: Tensor, num_kv_heads: int
    ) -> list[Tensor]:
        if not group.topk:
            layer, dtype = self._backend.layout.layers[layer_idx], self._backend.layout.dtype
            shape = (*query.shape[:3], 0)
            return [
                query.new_empty(shape, dtype=torch.float32),
                query.new_empty(shape, dtype=torch.int64),
                query.new_empty(*shape, layer.head_dim, dtype=dtype),
                query.new_empty(*shape, layer.value_head_dim, dtype=dtype),
            ]
        asked = self._asked(layer_idx, query, num_kv_heads)
        retrieval = self._backend.retrieve(
            layer_idx, asked.grouped, group.topk, heads=asked.kv_heads, scope=group.scope
        )
        return [
            asked.of_all_heads(part, nothing)
            for part, nothing in zip(retrieval, _NOTHING, strict=True)
        ]

    def _filled(self, part: Tensor, nothing: float) -> Tensor:
        """Append what stands for no row, up to `topk` of them: (B, H, Q, topk, ...)."""
        missing = self.topk - part.shape[3]
        sides: list[Any] = [0, 0] * (part.ndim - 4) + [0, missing]
        return pad(part, sides, value=nothing) if missing else part


def _grouped(
    scopes: Scope | Sequence[Scope] | None, batch: int
) -> list[tuple[Scope | None, list[int] | None]]:
    if scopes is None or isinstance(scopes, Scope):
        return [(scopes, None)]
    if batch % len(scopes):
        raise MemoryUseError(
            f"documents were given for {len(scopes)} prompts; got a batch of {batch} sequences. "
            "Give a list for each prompt of the batch, or one for all of them."
        )
    times = batch // len(scopes)
    sequences: dict[Scope, list[int]] = {}
    for prompt, scope in enumerate(scopes):
        sequences.setdefault(scope, []).extend(range(prompt * times, (prompt + 1) * times))
    if len(sequences) == 1:
        return [(scopes[0], None)]
    return list(sequences.items())
