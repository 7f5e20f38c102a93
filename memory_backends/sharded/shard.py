"""A shard as the memory sees it: searched, read and indexed; `LocalShard` is in this process."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch

from memory_backends.backend import MemoryBackend
from memory_backends.errors import StoreError, StoreLockedError
from memory_backends.layout import Heads, Int64Array
from memory_backends.search.scores import Search, SearchResult, cosines


class ShardMissingError(StoreError):
    """A shard that is not there, is damaged, or does not answer in time."""


class Shard(Protocol):
    """What a memory asks of a shard. Row ids are the shard's own.

    Any number of threads may search and read at a time. The other methods are for the thread that
    writes to the memory or refreshes it.
    """

    def search(self, searches: Sequence[Search]) -> list[SearchResult]:
        """Do several searches in one message, each as `MemoryBackend.search` does.

        Scores are float64 and exact, whatever the index: they are compared with other shards'.
        Results are on the CPU. There may be fewer than k rows; then -1 and -inf follow.
        """

    def rows(self, ids: torch.Tensor) -> dict[int, torch.Tensor]:
        """Return rows of all layers in one message: (n,) int64 to layer -> (n, Hkv, D + Dv)."""

    def gather(self, layer_idx: int, ids: torch.Tensor, heads: Heads = None) -> torch.Tensor:
        """Return rows of one layer: (h, n) int64 to (h, n, D + Dv), of `heads` or all Hkv."""

    def samples(self, layer_idx: int) -> torch.Tensor:
        """Return the shard's sample of queries, (Hkv, s, G, head_dim) float32."""

    def choose_rows(self, ids: Int64Array) -> None:
        """Let searches find these rows, ascending, and no others."""

    def refresh(self) -> None:
        """See what was committed to the shard by now."""

    def index_heads(self, heads: Mapping[int, Sequence[int]] | None) -> None:
        """Choose the heads that index files are written for; see `MemoryBackend.index_heads`."""

    def write_files(self) -> None:
        """Bring the shard's index files up to date."""

    def rebuild_files(self) -> None:
        """Make the shard's index files anew."""

    @property
    def has_written(self) -> bool:
        """Whether the index files are up to date."""

    @property
    def lacks_files(self) -> bool:
        """Whether the shard has index files, but not of all heads that are to have them."""

    @property
    def searches_exactly(self) -> bool:
        """Whether every query is compared with every row."""

    def close(self) -> None:
        """Let go of the shard."""


class LocalShard:
    """A shard that this process has opened, with a searcher of its own.

    Args:
        backend: over the shard's store.
    """

    def __init__(self, backend: MemoryBackend) -> None:
        self.backend = backend

    @property
    def path(self) -> Path:
        """The shard's directory."""
        assert self.backend.path is not None
        return self.backend.path

    def search(self, searches: Sequence[Search]) -> list[SearchResult]:
        """See `Shard.search`."""
        return [self._search(each) for each in searches]

    def _search(self, search: Search) -> SearchResult:
        searcher = self.backend.searcher
        ids = searcher.search(*search).ids
        keys = searcher.gather(search.layer_idx, ids, search.heads)[..., : search.queries.shape[-1]]
        scores = cosines(search.queries.detach(), keys, ids)
        return SearchResult(scores.cpu(), ids.cpu())

    def rows(self, ids: torch.Tensor) -> dict[int, torch.Tensor]:
        """See `Shard.rows`. Consecutive ids are one read."""
        stored = self.backend.store.rows
        breaks = (ids.diff() != 1).nonzero().flatten() + 1
        runs = [(int(run[0]), int(run[-1]) + 1) for run in ids.tensor_split(breaks) if len(run)]
        return {
            layer_idx: torch.cat([stored.span(layer_idx, *run) for run in runs])
            for layer_idx in self.backend.layout.layers
        }

    def gather(self, layer_idx: int, ids: torch.Tensor, heads: Heads = None) -> torch.Tensor:
        """See `Shard.gather`."""
        return self.backend.store.rows.gather(layer_idx, ids, heads)

    def samples(self, layer_idx: int) -> torch.Tensor:
        """See `Shard.samples`."""
        return self.backend.sampled_queries(layer_idx)

    def choose_rows(self, ids: Int64Array) -> None:
        """See `Shard.choose_rows`."""
        self.backend.choose_rows(ids)

    def refresh(self) -> None:
        """See `Shard.refresh`. Whoever writes to the shard here sees what is there already."""
        with contextlib.suppress(StoreLockedError):
            self.backend.refresh()

    def index_heads(self, heads: Mapping[int, Sequence[int]] | None) -> None:
        """See `Shard.index_heads`."""
        self.backend.index_heads(heads)

    def write_files(self) -> None:
        """See `Shard.write_files`."""
        self.backend.save()

    def rebuild_files(self) -> None:
        """See `Shard.rebuild_files`."""
        self.backend.rebuild()

    @property
    def has_written(self) -> bool:
        """See `Shard.has_written`."""
        return self.backend.searcher.has_written

    @property
    def lacks_files(self) -> bool:
        """See `Shard.lacks_files`."""
        return self.backend.lacks_files

    @property
    def searches_exactly(self) -> bool:
        """See `Shard.searches_exactly`."""
        return self.backend.searches_exactly

    def close(self) -> None:
        """See `Shard.close`."""
        with contextlib.suppress(OSError):
            self.backend.close()
