"""A sharded store: one catalogue of all documents, whose rows are in several other stores.

A directory has the catalogue that every store has, with the documents of the whole memory and its
row ids; `shards.sqlite3`, which says in which shard a row is; and the shards, stores like any
other. A document belongs to the shard that its name says. Writing is two steps: the document is
committed in its shard, then the catalogue adopts it. So whatever is killed between, nothing is
lost, doubled, or half there: the next write adopts what the shards have.
"""

from memory_backends.sharded.making import adopt, make_sharded
from memory_backends.sharded.moving import merge, split
from memory_backends.sharded.options import ShardedOptions, ShardSettings
from memory_backends.sharded.placements import Placements, ShardRecord, shard_of, shards_at
from memory_backends.sharded.shard import LocalShard, Shard, ShardMissingError
from memory_backends.sharded.shards import open_shard
from memory_backends.sharded.store import Adopted, ShardedStore
from memory_backends.store.directory import is_sharded

__all__ = [
    "Adopted",
    "LocalShard",
    "Placements",
    "Shard",
    "ShardMissingError",
    "ShardRecord",
    "ShardSettings",
    "ShardedOptions",
    "ShardedStore",
    "adopt",
    "is_sharded",
    "make_sharded",
    "merge",
    "open_shard",
    "shard_of",
    "shards_at",
    "split",
]
