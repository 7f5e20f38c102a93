"""`ShardReader`: a model of its own, in a process of Ray's, that reads documents into shards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from emt.attach import attach
from emt.config import MemoryConfig
from emt.ingest.changes import Written
from emt.memory.memory import Memory
from emt.model.loading import load
from memory_backends.layout import Metadata
from memory_backends.registry import SHARDED
from memory_backends.sharded import shards_at

ToRead = tuple[str, str, Metadata | None]  # name, text, metadata


class Read(NamedTuple):
    """What came of a batch of documents.

    Attributes:
        written: how many were added, replaced and skipped.
        num_rows: that were written.
    """

    written: Written
    num_rows: int


class ShardReader:
    """Reads documents into the shards of one store, one shard at a time.

    Args:
        source: of the model, as `load` takes it.
        how: keywords of `load`.
        config: settings of the memory, with the path of the sharded store.
    """

    def __init__(self, source: str, how: Mapping[str, Any], config: MemoryConfig) -> None:
        self._loaded = load(source, **how)
        assert config.path is not None
        self._shards = shards_at(Path(config.path))
        kind = "vector_db" if config.memory_type == SHARDED else config.memory_type
        self._config = config.replace(memory_type=kind, ray=None)
        self._memory: Memory | None = None
        self._number: int | None = None

    def write(self, number: int, documents: Sequence[ToRead]) -> Read:
        """Read documents into a shard; those that it has already are skipped.

        Each document is committed whole or not at all, so a batch may be given again.
        """
        rows: list[int] = []
        written = self._of_shard(number).write_all(documents, on_rows=rows.append, save=False)
        return Read(written, sum(rows))

    def write_files(self, number: int, heads: Mapping[int, Sequence[int]] | None) -> None:
        """Make a shard's index files, of these KV heads of each layer, or of all."""
        backend = self._of_shard(number).backend
        backend.index_heads(heads)
        backend.save()

    def _of_shard(self, number: int) -> Memory:
        """Return the memory over a shard."""
        path = str(self._shards[number])
        if self._memory is None:
            config = self._config.replace(path=path)
            self._memory = attach(self._loaded.model, config, tokenizer=self._loaded.tokenizer)
        elif number != self._number:
            self._memory.open(path)
        self._number = number
        return self._memory
