"""Where the rows of a sharded store are: `shards.sqlite3`, and arrays of it to look rows up.

A placement says that consecutive rows of the memory are consecutive rows of a shard. Rows never
move and ids are never used again, so a placement never changes. Those of rows that the catalogue
does not have are of a write that did not end; the next one takes their place.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from memory_backends.catalog.database import as_store_error, connect_to, transaction
from memory_backends.catalog.records import damaged, record_crc32
from memory_backends.errors import StoreError, StoreVersionError, refuse_link
from memory_backends.layout import Int64Array
from memory_backends.store.directory import SHARDS_FILE_NAME, is_sharded

_VERSION = 1
_SCHEMA = (
    """CREATE TABLE shards (
    number INTEGER PRIMARY KEY,
    location TEXT NOT NULL,       -- a path; if it is relative, from the store's directory
    fingerprint TEXT NOT NULL,    -- the shard's catalogue has the same, so that it is no other
    crc32 INTEGER NOT NULL
)""",
    """CREATE TABLE placements (
    first_row INTEGER PRIMARY KEY,
    shard INTEGER NOT NULL,
    shard_row INTEGER NOT NULL,   -- the first row there
    num_rows INTEGER NOT NULL,
    crc32 INTEGER NOT NULL
)""",
)


class ShardRecord(NamedTuple):
    """One shard, as the memory knows it."""

    number: int
    location: str
    fingerprint: str


class Placement(NamedTuple):
    """Rows of a shard that are rows of the memory."""

    first_row: int
    shard: int
    shard_row: int
    num_rows: int


def shard_of(name: str, num_shards: int) -> int:
    """Return the shard that a document of this name belongs to. It must never change."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "little") % num_shards


class Placements:
    """The file, opened, and where rows are, as of the last `show`.

    Attributes:
        path: the file.
        shards: all shards, by number.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / SHARDS_FILE_NAME
        refuse_link(self.path)
        if not self.path.is_file():
            raise StoreError(
                f"'{directory}' is not a sharded store: it has no {SHARDS_FILE_NAME}. `emt split` "
                "makes one of a store."
            )
        with as_store_error(self.path):
            self._connection = connect_to(self.path)
        self._lock = threading.Lock()
        try:
            with as_store_error(self.path):
                self._check()
                self.shards = [
                    ShardRecord(*_checked(record, "a shard"))
                    for record in self._connection.execute("SELECT * FROM shards ORDER BY number")
                ]
            if [shard.number for shard in self.shards] != list(range(len(self.shards))):
                raise damaged(f"'{self.path}'", "its shards are not numbered from 0")
        except BaseException:
            self._connection.close()
            raise
        self._table = np.empty((0, 4), dtype=np.int64)
        self._by_shard: dict[int, tuple[Int64Array, Int64Array, Int64Array]] = {}

    @staticmethod
    def make(directory: Path, shards: Sequence[ShardRecord]) -> None:
        """Write a new file, in the place of what a killed process may have left."""
        path = directory / SHARDS_FILE_NAME
        path.unlink(missing_ok=True)
        with as_store_error(path), contextlib.closing(connect_to(path)) as connection:
            connection.execute(f"PRAGMA user_version = {_VERSION}")
            with transaction(connection):
                for statement in _SCHEMA:
                    connection.execute(statement)
                for shard in shards:
                    record = (*shard, record_crc32(shard))
                    connection.execute("INSERT INTO shards VALUES (?, ?, ?, ?)", record)

    def __len__(self) -> int:
        return len(self._table)

    def show(self, num_rows: int) -> None:
        """Know where the first `num_rows` rows of the memory are."""
        known = 0 if not len(self._table) else int(self._table[-1, 0] + self._table[-1, 3])
        if num_rows < known:  # an older copy of the catalogue
            known, self._table = 0, self._table[:0]
        query = "SELECT * FROM placements WHERE first_row >= ? AND first_row < ? ORDER BY first_row"
        with self._lock, as_store_error(self.path):
            records = self._connection.execute(query, (known, num_rows)).fetchall()
        if records:
            added = np.array([_checked(record, "a placement") for record in records], np.int64)
            if len(self.shards) <= added[:, 1].max():
                raise damaged(f"'{self.path}'", "it places rows in a shard that is not there")
            self._table = np.concatenate([self._table, added])
            self._by_shard.clear()

    def add(self, placements: Sequence[Placement]) -> None:
        """Write placements of rows that the catalogue is about to commit."""
        with self._lock, as_store_error(self.path), transaction(self._connection):
            first = min(placement.first_row for placement in placements)
            self._connection.execute("DELETE FROM placements WHERE first_row >= ?", (first,))
            self._connection.executemany(
                "INSERT INTO placements VALUES (?, ?, ?, ?, ?)",
                [(*placement, record_crc32(placement)) for placement in placements],
            )

    def copy_to(self, directory: Path) -> None:
        """Write a copy, in which the shards are at their places in the directory."""
        path = directory / SHARDS_FILE_NAME
        with self._lock, as_store_error(path), contextlib.closing(connect_to(path)) as target:
            self._connection.backup(target)
            with transaction(target):
                for shard in self.shards:
                    moved = shard._replace(location=location_of(shard.number))
                    record = (*moved, record_crc32(moved))
                    target.execute("REPLACE INTO shards VALUES (?, ?, ?, ?)", record)

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    # -- looking up -----------------------------------------------------------------------------

    def locate(self, ids: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Return the shard and the row there of each row; -1 and -1 for those that are nowhere."""
        if not len(self._table):
            nowhere = np.full(ids.shape, -1, dtype=np.int64)
            return nowhere, nowhere.copy()
        firsts, shards, shard_rows, counts = self._table.T
        at = np.searchsorted(firsts, ids, side="right") - 1
        inside = ids - firsts[at]
        is_there = (at >= 0) & (inside < counts[at])
        return np.where(is_there, shards[at], -1), np.where(is_there, shard_rows[at] + inside, -1)

    def rows_of(self, shard: int, shard_rows: Int64Array) -> Int64Array:
        """Return the memory's row of each row of a shard; -1 for rows that it does not have."""
        firsts, starts, counts = self._of_shard(shard)
        if not len(starts):
            return np.full(shard_rows.shape, -1, dtype=np.int64)
        at = np.searchsorted(starts, shard_rows, side="right") - 1
        inside = shard_rows - starts[at]
        is_there = (at >= 0) & (shard_rows >= 0) & (inside < counts[at])
        return np.where(is_there, firsts[at] + inside, -1)

    def by_shard(self, ids: Int64Array) -> list[Int64Array]:
        """Return for each shard its rows among rows of the memory, ascending."""
        shards, shard_rows = self.locate(ids)
        return [np.sort(shard_rows[shards == number]) for number in range(len(self.shards))]

    def is_in(
        self, ids: Int64Array, shards: Sequence[int]
    ) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
        """Tell of each row whether it is in one of some shards."""
        return np.isin(self.locate(ids)[0], list(shards))

    def _of_shard(self, shard: int) -> tuple[Int64Array, Int64Array, Int64Array]:
        """Return first row, first row in the shard, and rows, in the order of the shard."""
        if shard not in self._by_shard:
            own = _without_overwritten(self._table[self._table[:, 1] == shard])
            own = own[np.argsort(own[:, 2], kind="stable")]
            self._by_shard[shard] = own[:, 0], own[:, 2], own[:, 3]
        return self._by_shard[shard]

    def _check(self) -> None:
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        if version != _VERSION:
            raise StoreVersionError(
                f"'{self.path}' has format version {version}; this emt reads version {_VERSION}. "
                "Use the emt version that wrote the store."
            )
        query = "SELECT sql FROM sqlite_master WHERE sql IS NOT NULL"
        if sorted(str(sql) for (sql,) in self._connection.execute(query)) != sorted(_SCHEMA):
            raise damaged(f"'{self.path}'", "it has other tables than expected")


def _without_overwritten(table: Int64Array) -> Int64Array:
    """Leave out placements whose rows in the shard were written again, after an older copy of it
    was restored. The table is in the order of writing."""
    starts, stops = table[:, 2], table[:, 2] + table[:, 3]
    if (starts[1:] >= stops[:-1]).all():
        return table
    is_covered = np.zeros(int(stops.max()), dtype=bool)
    kept = []
    for at in reversed(range(len(table))):
        span = slice(int(starts[at]), int(stops[at]))
        if not is_covered[span].any():
            kept.append(at)
        is_covered[span] = True
    return table[kept[::-1]]


def location_of(shard: int) -> str:
    """Return where a new shard is put, from the store's directory."""
    return f"shards/{shard:05d}"


def _checked(record: tuple[Any, ...], what: str) -> tuple[Any, ...]:
    *values, crc32 = record
    if record_crc32(values) != crc32:
        raise damaged(f"the record of {what} in {SHARDS_FILE_NAME}")
    return tuple(values)


def shards_at(path: Path | str) -> list[Path]:
    """Return the directories of the stores that have the rows of a store: itself, or its shards."""
    path = Path(path)
    if not is_sharded(path):
        return [path]
    with contextlib.closing(Placements(path)) as placements:
        return [path / shard.location for shard in placements.shards]
