"""`memory_type="sharded"`: each shard searches its rows, and the best of all are found."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from memory_backends.layout import Heads, Int64Array, MemoryLayout
from memory_backends.scope import Scope
from memory_backends.search.scores import Search, SearchResult
from memory_backends.search.searchable import SearchableRows
from memory_backends.search.searcher import Searcher
from memory_backends.sharded.options import ShardedOptions
from memory_backends.sharded.placements import Placements
from memory_backends.sharded.shard import LocalShard, Shard
from memory_backends.sharded.shards import Shards
from memory_backends.sharded.store import ShardedStore
from memory_backends.store import Store

_MAX_SCOPES = 256


class ShardedSearcher(Searcher):
    """Asks all shards at once, in one message each, and merges what they find by exact score.

    Which rows may be found is said by the memory, not by its shards: scopes, removed rows, and the
    one set of attention sinks are those of the whole.
    """

    options_class = ShardedOptions
    keeps_files = True

    def __init__(self, rows: SearchableRows, options: ShardedOptions) -> None:
        super().__init__(rows, options)
        assert isinstance(rows.store, ShardedStore)
        self._store = rows.store
        self._heads: Mapping[int, Sequence[int]] | None = None
        self._told: Shards | None = None  # which heads are indexed
        self._scopes: dict[Scope, list[Scope]] = {}
        self.rows_changed()

    @classmethod
    def open_store(
        cls,
        layout: MemoryLayout,
        path: Path | None,
        identity: Mapping[str, Any],
        row_codec: str,
        options: ShardedOptions,
    ) -> Store:
        """Open or begin a sharded store."""
        return ShardedStore(layout, path, identity, row_codec, options)

    # -- searching ------------------------------------------------------------------------------

    def search(
        self,
        layer_idx: int,
        queries: torch.Tensor,
        k: int,
        heads: Heads = None,
        scope: Scope | None = None,
    ) -> SearchResult:
        """Search all shards; see `MemoryBackend.search`."""
        return self.search_many([Search(layer_idx, queries, k, heads, scope)])[0]

    def search_many(self, searches: Sequence[Search]) -> list[SearchResult]:
        """Search all shards, with one message each; see `MemoryBackend.search_many`."""
        stored = self._store.sharded_rows
        if stored is None or not searches:
            return [merged(each, {}, None) for each in searches]
        questions = {}
        for number in range(len(stored.shards)):
            own = [self._in_shard(each, number, stored.placements) for each in searches]
            if any(each.k for each in own):
                questions[number] = functools.partial(_search, searches=own)
        answers = stored.shards.ask(questions, may_miss=True)
        return [
            merged(each, {number: hits[at] for number, hits in answers.items()}, stored.placements)
            for at, each in enumerate(searches)
        ]

    def candidates(
        self, layer_idx: int, unit_queries: torch.Tensor, k: int, heads: Heads
    ) -> SearchResult:
        """Find candidates, which are results already."""
        return self.search(layer_idx, unit_queries, k, heads)

    def gather(self, layer_idx: int, ids: torch.Tensor, heads: Heads = None) -> torch.Tensor:
        """Return rows by id."""
        return self.rows.stored.gather(layer_idx, ids, heads)

    def gather_layers(self, ids: torch.Tensor) -> dict[int, torch.Tensor]:
        """Return rows of all heads at every layer, with one message a shard."""
        stored = self._store.sharded_rows
        return super().gather_layers(ids) if stored is None else stored.gather_layers(ids)

    def _in_shard(self, search: Search, number: int, placements: Placements) -> Search:
        """Return what one shard is asked; k is 0 if it has nothing to find."""
        if search.scope is None:
            return search._replace(k=min(search.k, len(self._own_rows[number])))
        scopes = self._scopes.get(search.scope)
        if scopes is None:
            ids = placements.by_shard(self.rows.ids_in(search.scope))
            scopes = [Scope.of_rows(own) for own in ids]
            if len(self._scopes) >= _MAX_SCOPES:
                self._scopes.clear()
            self._scopes[search.scope] = scopes
        own = scopes[number]
        return search._replace(k=min(search.k, len(own)), scope=own)

    # -- keeping up with the store --------------------------------------------------------------

    def rows_changed(self) -> None:
        """Tell the shards which rows may be found now."""
        self._scopes = {}
        self._own_rows: list[Int64Array] = []
        stored = self._store.sharded_rows
        if stored is None:
            return
        self._own_rows = stored.placements.by_shard(self.rows.ids)
        for number, own in enumerate(self._own_rows):
            if number not in stored.shards.missing:
                stored.shards[number].choose_rows(own)
        if self._told is not stored.shards and self._heads is not None:
            self.index_heads(self._heads)

    @property
    def searches_exactly(self) -> bool:
        """Whether every shard does."""
        return all(shard.searches_exactly for shard in self._shards)

    # -- files ----------------------------------------------------------------------------------

    def index_heads(self, heads: Mapping[int, Sequence[int]] | None) -> None:
        """Choose the heads that shards write index files for."""
        self._heads = heads
        for shard in self._shards:
            shard.index_heads(heads)
        stored = self._store.sharded_rows
        self._told = None if stored is None else stored.shards

    @property
    def lacks_files(self) -> bool:
        """Whether a shard does."""
        return any(shard.lacks_files for shard in self._shards)

    @property
    def has_written(self) -> bool:
        """Whether every shard has."""
        return all(shard.has_written for shard in self._shards)

    def write_files(self) -> None:
        """Bring the files of every shard up to date."""
        for shard in self._shards:
            shard.write_files()

    def rebuild_files(self) -> None:
        """Make the files of every shard anew."""
        for shard in self._shards:
            shard.rebuild_files()

    def options_of_copy(self) -> ShardedOptions:
        """Return options for the same files, in this process."""
        options: ShardedOptions = self.options
        given = options.shard_options
        first = next(iter(self._shards), None)
        if isinstance(first, LocalShard):
            copied = first.backend.searcher.options_of_copy()
            fields = dataclasses.fields(copied)
            given = {field.name: getattr(copied, field.name) for field in fields}
        return ShardedOptions(self._store.num_shards, options.shard_type, given)

    @property
    def _shards(self) -> Sequence[Shard]:
        """The shards that are there."""
        stored = self._store.sharded_rows
        return [] if stored is None else list(stored.shards)


def merged(
    search: Search, found: Mapping[int, SearchResult | None], placements: Placements | None
) -> SearchResult:
    """Return the k best of what shards have found, by number, equal ones by the memory's row."""
    heads, num_queries = search.queries.shape[:2]
    scores = [torch.full((heads, num_queries, search.k), -torch.inf, dtype=torch.float64)]
    ids = [torch.full((heads, num_queries, search.k), -1)]
    for number, hits in found.items():
        if hits is None or placements is None:
            continue
        rows = torch.from_numpy(placements.rows_of(number, hits.ids.numpy()))
        scores.append(hits.scores.masked_fill(rows < 0, -torch.inf))
        ids.append(rows)
    every, order = torch.cat(ids, -1).sort(dim=-1)
    ranked = torch.cat(scores, -1).gather(-1, order)
    best, order = ranked.sort(dim=-1, descending=True, stable=True)
    return SearchResult(best[..., : search.k].float(), every.gather(-1, order)[..., : search.k])


def _search(shard: Shard, searches: Sequence[Search]) -> list[SearchResult | None]:
    """Do the searches in which a shard has something to find, in one message."""
    hits = iter(shard.search([each for each in searches if each.k]))
    return [next(hits) if each.k else None for each in searches]
