"""Making a sharded store, and bringing it up to date after others have written to its shards."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from memory_backends.backend import MemoryBackend
from memory_backends.layout import MemoryLayout
from memory_backends.registry import SHARDED
from memory_backends.sharded.store import Adopted, ShardedStore
from memory_backends.store.directory import check_free


def make_sharded(
    path: Path | str,
    layout: MemoryLayout,
    *,
    num_shards: int,
    identity: Mapping[str, Any] | None = None,
    row_codec: str = "exact",
    fine_heads: Mapping[int, Sequence[int]] | None = None,
) -> None:
    """Make an empty sharded store at a path where nothing is.

    Args:
        path: its directory.
        layout: the shape of the rows.
        num_shards: how many shards it has; it never changes.
        identity: what the model looks like.
        row_codec: as for `MemoryBackend`.
        fine_heads: heads that are searched, whose keys codec "int5.5" keeps more finely.

    Raises:
        StoreError: there is something at the path, or it cannot be written.
    """
    options: dict[str, Any] = {"num_shards": num_shards, "shard_type": "manual"}
    backend = MemoryBackend(
        layout,
        SHARDED,
        path=check_free(Path(path)),
        identity=identity,
        row_codec=row_codec,
        **options,
    )
    with contextlib.closing(backend):
        backend.index_heads(fine_heads)
        backend.save()


def adopt(path: Path | str) -> Adopted:
    """Bring the catalogue of a sharded store up to date with its shards; index files are not made.

    Raises:
        StoreError: it is not a sharded store, somebody writes to it, or a shard is missing.
    """
    with contextlib.closing(MemoryBackend.open(path, SHARDED, shard_type="manual")) as backend:
        store = backend.store
        assert isinstance(store, ShardedStore)
        with store.writing():
            return store.adopted
