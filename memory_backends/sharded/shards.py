"""The shards of one store: opened, asked in parallel, and missed."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from typing import TypeVar

from memory_backends.backend import MemoryBackend
from memory_backends.catalog import Catalog
from memory_backends.errors import EMTError, MemoryMismatchError, StoreError
from memory_backends.sharded.options import ShardedOptions, ShardSettings
from memory_backends.sharded.placements import ShardRecord
from memory_backends.sharded.shard import LocalShard, Shard, ShardMissingError

FINGERPRINT = "shard"  # a setting of a shard's catalogue

_MAX_THREADS = 32
_T = TypeVar("_T")
_logger = logging.getLogger(__name__)


class Shards:
    """The opened shards of a store.

    Args:
        path: the store's directory, from which locations are.
        records: its shards, by number.
        settings: how they are opened.
        options: what to do without one.

    Attributes:
        missing: number -> why the shard is not there.
        num_messages: how often a shard was asked to search, or for rows.
    """

    def __init__(
        self,
        path: Path,
        records: Sequence[ShardRecord],
        settings: ShardSettings,
        options: ShardedOptions,
    ) -> None:
        self._path = path
        self._records = records
        self._settings = settings
        self._options = options
        self._opened: dict[int, Shard] = {}
        self._pool: ThreadPoolExecutor | None = None
        self.missing: dict[int, str] = {}
        self.num_messages = 0
        try:
            self._open_missing()
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, number: int) -> Shard:
        """Return a shard; raise a ShardMissingError if it is not there."""
        if number in self.missing:
            raise self._error(number, self.missing[number])
        return self._opened[number]

    def __iter__(self) -> Iterator[Shard]:
        """Return the shards that are there."""
        return (self._opened[number] for number in sorted(self._opened))

    def location(self, number: int) -> Path:
        """Return where a shard is."""
        return self._path / self._records[number].location

    def local(self, number: int) -> MemoryBackend:
        """Return a shard that can be written to.

        Raises:
            ShardMissingError: it is not there.
            StoreError: it is not in this process.
        """
        shard = self[number]
        if not isinstance(shard, LocalShard):
            raise StoreError(
                f"the shards of '{self._path}' were opened somewhere else, to be read. Open the "
                "memory with shards in this process to write to it."
            )
        return shard.backend

    def ask(
        self, questions: Mapping[int, Callable[[Shard], _T]], *, may_miss: bool = False
    ) -> dict[int, _T]:
        """Ask shards in parallel, within the time limit; return their answers by number.

        Raises:
            ShardMissingError: one does not answer, unless `may_miss` and the options allow that.
        """
        may_miss = may_miss and self._options.missing_shards == "warn"
        wanted = [number for number in questions if not (may_miss and number in self.missing)]
        self.num_messages += len(wanted)
        limit = self._options.time_limit
        if len(wanted) == 1 and limit is None:
            return {number: questions[number](self[number]) for number in wanted}
        pool = self._threads()
        asked = {number: pool.submit(questions[number], self[number]) for number in wanted}
        answers, deadline = {}, None if limit is None else time.monotonic() + limit
        for number, answer in asked.items():
            try:
                left = None if deadline is None else max(deadline - time.monotonic(), 0)
                answers[number] = answer.result(left)
            except (FutureTimeoutError, ShardMissingError) as error:
                late = isinstance(error, FutureTimeoutError)
                reason = f"no answer within {limit} s." if late else str(error)
                if self._options.missing_shards == "warn":
                    self.miss(number, reason)
                if not may_miss:
                    raise self._error(number, reason) from error
        return answers

    def miss(self, number: int, reason: str) -> None:
        """Do without a shard until the next `refresh`, which looks for it again."""
        self.missing[number] = reason
        _logger.warning(
            "shard %d of '%s' is missing: %s Its documents are not found.",
            number,
            self._path,
            reason,
        )

    def refresh(self) -> None:
        """See what was committed to the shards, and look for those that are missing."""
        for number, shard in list(self._opened.items()):
            if number not in self.missing:
                try:
                    shard.refresh()
                except StoreError as error:
                    self._lose(number, error)
        self._open_missing()

    def close(self) -> None:
        """Let go of all shards."""
        for shard in self:
            shard.close()
        self._opened.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=False)
            self._pool = None

    def _open_missing(self) -> None:
        for record in self._records:
            if record.number in self._opened and record.number not in self.missing:
                continue
            lost = self._opened.pop(record.number, None)
            if lost is not None:
                lost.close()
            try:
                self._opened[record.number] = self._open(record)
            except MemoryMismatchError:
                raise
            except (EMTError, OSError) as error:
                self._lose(record.number, error)
            else:
                self.missing.pop(record.number, None)

    def _open(self, record: ShardRecord) -> Shard:
        record = record._replace(location=str(self.location(record.number).absolute()))
        if self._options.connect is not None:
            return self._options.connect(record, self._settings)
        return LocalShard(open_shard(record, self._settings))

    def _lose(self, number: int, error: Exception) -> None:
        """Do without a shard, if that is allowed."""
        if self._options.missing_shards == "warn":
            if self.missing.get(number) != str(error):
                self.miss(number, str(error))
            return
        raise self._error(number, str(error)) from error

    def _error(self, number: int, reason: str) -> ShardMissingError:
        return ShardMissingError(
            f"shard {number} of '{self._path}', at '{self.location(number)}', cannot be used: "
            f"{reason} Put the shard back or restore it from a copy; with "
            "missing_shards 'warn', the other shards answer."
        )

    def _threads(self) -> ThreadPoolExecutor:
        if self._pool is None:
            most = _MAX_THREADS if self._options.connect else (os.cpu_count() or 1)
            self._pool = ThreadPoolExecutor(max(1, min(len(self), most)), "emt-shard")
        return self._pool


def open_shard(record: ShardRecord, settings: ShardSettings) -> MemoryBackend:
    """Open a shard in this process.

    Raises:
        StoreError: it is not there, damaged, or another store than the record says.
        MemoryMismatchError: it has another layout or identity.
    """
    location = Path(record.location)
    Catalog.open(location).close()  # says so if there is none
    backend = MemoryBackend(
        settings.layout,
        settings.memory_type,
        path=location,
        identity=settings.identity,
        **settings.options,
    )
    if backend.catalog.setting(FINGERPRINT) != record.fingerprint:
        backend.close()
        raise StoreError(
            f"the store at '{location}' is not the shard that is expected there. Put that back."
        )
    return backend
