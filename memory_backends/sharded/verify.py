"""Reading a whole store, sharded or not, and naming everything in it that is damaged."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np

from memory_backends.catalog import Catalog
from memory_backends.errors import EMTError
from memory_backends.sharded.placements import Placements
from memory_backends.store import verify as single
from memory_backends.store.directory import SHARDS_FILE_NAME, is_sharded
from memory_backends.store.verify import Damage


def verify(path: Path | str) -> list[Damage]:
    """Read all of a store; return its damage, an empty list if there is none.

    Of a sharded store, each shard is read, and compared with the catalogue of all. Documents that
    only a shard has are no damage: the next write adopts them.

    Raises:
        StoreError: there is no store at `path`, or one of another format version.
    """
    directory = Path(path)
    damage = single.verify(directory)
    if not is_sharded(directory):
        return damage
    try:
        placements = Placements(directory)
    except EMTError as error:
        return [*damage, Damage(SHARDS_FILE_NAME, str(error))]
    with contextlib.closing(placements):
        for shard in placements.shards:
            location = directory / shard.location
            try:
                of_shard = single.verify(location)
            except EMTError as error:
                of_shard = [Damage("", str(error))]
            damage += [
                Damage(f"{shard.location}/{file}".rstrip("/"), reason) for file, reason in of_shard
            ]
        if not damage:
            damage += _compared(directory, placements)
    return damage


def _compared(directory: Path, placements: Placements) -> list[Damage]:
    """Compare the catalogue of all with those of the shards, documents by their content."""
    damage = []
    with contextlib.ExitStack() as at_end:
        catalog = at_end.enter_context(contextlib.closing(Catalog.open(directory)))
        try:
            placements.show(catalog.num_rows)
        except EMTError as error:
            return [Damage(SHARDS_FILE_NAME, str(error))]
        spans = list(catalog.record_spans())
        shards, rows = placements.locate(np.array([span.first for span in spans], dtype=np.int64))
        hashes = catalog.content_hashes()
        for shard in placements.shards:
            location = directory / shard.location
            own = at_end.enter_context(contextlib.closing(Catalog.open(location)))
            theirs, firsts = own.content_hashes(), {s.name: s.first for s in own.record_spans()}
            for span, number, row in zip(spans, shards, rows, strict=True):
                if number != shard.number or firsts.get(span.name) != row:
                    continue  # of another shard, or changed there since
                if theirs[span.name] != hashes[span.name]:
                    reason = f"document '{span.name}' has another text than in the catalogue"
                    damage.append(Damage(shard.location, reason))
        lost = [span.name for span, number in zip(spans, shards, strict=True) if number < 0]
        damage += [Damage(SHARDS_FILE_NAME, f"document '{name}' is in no shard") for name in lost]
    return damage
