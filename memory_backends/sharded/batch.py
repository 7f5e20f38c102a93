"""Documents written together to several shards, and then to the catalogue of all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from memory_backends.layout import Document, Rows
from memory_backends.store.store import DocumentBatch


class ShardedBatch:
    """A batch in each shard that has documents of it.

    Args:
        shard_of: the shard of a document's name.
        begin: returns an empty batch of a shard, which is locked for writing from then on.
        adopt: makes documents, (shard, name), part of the memory that are committed in shards;
            returns their row ids.
    """

    def __init__(
        self,
        shard_of: Callable[[str], int],
        begin: Callable[[int], DocumentBatch],
        adopt: Callable[[Sequence[tuple[int, str]]], list[range]],
    ) -> None:
        self._shard_of = shard_of
        self._begin = begin
        self._adopt = adopt
        self._batches: dict[int, DocumentBatch] = {}
        self._waiting: dict[str, int] = {}  # name -> shard, in order
        self._committed: list[tuple[str, range]] = []
        self.num_rows = 0

    def append(
        self,
        document: Document,
        runs: Iterable[Rows],
        samples: Mapping[int, torch.Tensor] | None = None,
    ) -> None:
        """Append a document to the batch of its shard; errors as `Batch.append`."""
        if document.name in self._waiting:  # is there twice, one after the other
            self._committed += self.commit()
        number = self._shard_of(document.name)
        if number not in self._batches:
            self._batches[number] = self._begin(number)
        batch = self._batches[number]
        before = batch.num_rows
        batch.append(document, runs, samples)
        self.num_rows += batch.num_rows - before
        self._waiting[document.name] = number

    def commit(self) -> list[tuple[str, range]]:
        """Commit the batch of each shard, then all of them to the catalogue, in their order."""
        waiting, self._waiting, self.num_rows = self._waiting, {}, 0
        done: set[str] = set()
        try:
            for batch in self._batches.values():  # an empty one cuts off what was not ended
                done.update(name for name, _ in batch.commit())
        finally:  # what a shard has is part of the memory, whatever became of another's
            names = [name for name in waiting if name in done]
            ids = self._adopt([(waiting[name], name) for name in names]) if names else []
        before, self._committed = self._committed, []
        return before + list(zip(names, ids, strict=True))
