"""The options of `memory_type="sharded"`, and what a shard has to know to be opened."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from memory_backends.layout import MemoryLayout
from memory_backends.sharded.placements import ShardRecord
from memory_backends.sharded.shard import Shard

OnMissing = Literal["error", "warn"]


@dataclass(frozen=True)
class ShardSettings:
    """How the shards of one store are opened.

    Attributes:
        layout: the shape of the rows, in the dtype that they are read in.
        identity: what the model looks like.
        memory_type: how a shard is searched.
        options: of that searcher.
    """

    layout: MemoryLayout
    identity: Mapping[str, Any]
    memory_type: str
    options: Mapping[str, Any]


# Opens a shard; the record's location is an absolute path.
Connect = Callable[[ShardRecord, ShardSettings], Shard]


@dataclass(frozen=True)
class ShardedOptions:
    """How a memory with shards is searched.

    Attributes:
        num_shards: of a store that is made; one that is opened has those it has.
        shard_type: the `memory_type` that each shard is searched with.
        shard_options: options of that searcher. Of `cache_bytes`, each shard gets its share.
        missing_shards: what to do without a shard: "error", or "warn" to answer from the others;
            `MemoryBackend.missing_shards` tells which are missing.
        time_limit: seconds that a shard has to answer before it is missing; None for no limit.
        connect: opens a shard that is somewhere else; None for shards in this process.
    """

    num_shards: int = 4
    shard_type: str = "vector_db"
    shard_options: Mapping[str, Any] = field(default_factory=dict)
    missing_shards: OnMissing = "error"
    time_limit: float | None = None
    connect: Connect | None = None
