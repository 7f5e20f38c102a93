"""Many workers read documents into one sharded store.

A shard has one writer at a time, so every document goes to the worker that has its shard. That is
why this is a pool of actors with a queue each, and not Ray Data, which hands blocks to whichever
worker is free. A queue has a few batches; while it is full, no more documents are read. A worker
that dies is started again by Ray, and is given its batch again: what it had committed is skipped.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import ray

from emt.cluster.reader import Read, ShardReader, ToRead
from emt.config import MemoryConfig
from emt.errors import EMTError, StoreError
from emt.ingest.changes import Written
from memory_backends.sharded import Placements, shard_of
from memory_backends.sharded.remote import start_ray

_MAX_QUEUED = 2  # batches of one worker that it has not yet written
_MAX_CHARACTERS = 100_000  # of a batch, but for one that has a single longer document
_MAX_DOCUMENTS = 64  # of a batch
_MAX_RESTARTS = 3  # of a worker
_LOOK_SECONDS = 10  # without a batch, after which it is seen whether nodes were lost
_LEFT_OUT = (
    "%d documents were not read: %s. Documents that were read are kept; the same command goes on "
    "with the others."
)
_NO_ROOM = (
    "Ray has room for %d of %d workers. The documents of the others wait until it has more; or "
    "stop this command, and give it again with --workers %d."
)
_logger = logging.getLogger(__name__)


class _Batch(NamedTuple):
    """Documents of one shard, and who reads them."""

    worker: int
    shard: int
    names: list[str]


@dataclass
class IndexWorkers:
    """A pool of models that read documents into one sharded store.

    Attributes:
        workers: Ray actors of `ShardReader`.
        num_shards: of the store.
        resources: what each worker asks of Ray.
    """

    workers: list[Any]
    num_shards: int
    resources: Mapping[str, float]
    _lacked_room: bool = False
    _running: dict[Any, _Batch] = field(default_factory=dict)
    _reads: list[Read] = field(default_factory=list)
    _failed: dict[str, list[str]] = field(default_factory=dict)  # reason -> documents

    def write(
        self, documents: Iterable[ToRead], on_rows: Callable[[int], object] | None = None
    ) -> Written:
        """Read documents; return how many were added, replaced and skipped.

        Args:
            documents: read a few batches ahead.
            on_rows: called with the number of new rows, for a progress bar.

        Raises:
            StoreError: some could not be read, and which; all others are there.
        """
        self._reads, self._failed = [], {}
        for shard, batch in _batches(documents, self.num_shards):
            worker = shard % len(self.workers)
            while self._num_queued(worker) >= _MAX_QUEUED:
                self._wait(on_rows)
            task = self.workers[worker].write.remote(shard, batch)
            self._running[task] = _Batch(worker, shard, [name for name, *_ in batch])
        while self._running:
            self._wait(on_rows)
        if self._failed:
            named = [f"'{name}'" for names in self._failed.values() for name in names]
            shown = ", ".join(named[:10]) + (", ..." if len(named) > 10 else "")
            raise StoreError(_LEFT_OUT % (len(named), f"{shown} ({'; '.join(self._failed)})"))
        counts = [
            sum(column) for column in zip(*(read.written for read in self._reads), strict=True)
        ]
        return Written(*counts) if counts else Written(0, 0, 0)

    def write_files(self, heads: Mapping[int, Sequence[int]] | None) -> None:
        """Make the index files of all shards, each by the worker that has it.

        Raises:
            StoreError: some cannot be written.
        """
        tasks = [
            self.workers[number % len(self.workers)].write_files.remote(number, heads)
            for number in range(self.num_shards)
        ]
        with _told_plainly():
            ray.get(tasks)

    def _num_queued(self, worker: int) -> int:
        return sum(batch.worker == worker for batch in self._running.values())

    def _wait(self, on_rows: Callable[[int], object] | None) -> None:
        """Wait for a batch to be written, and count it."""
        done: list[Any] = []
        while not done:
            done, _ = ray.wait(list(self._running), timeout=_LOOK_SECONDS)
            if not done:
                self._warn_without_room()
        (task,) = done
        batch = self._running.pop(task)
        try:
            with _told_plainly():
                read: Read = ray.get(task)
        except EMTError as error:
            self._failed.setdefault(str(error), []).extend(batch.names)
            return
        self._reads.append(read)
        if on_rows is not None:
            on_rows(read.num_rows)

    def _warn_without_room(self) -> None:
        """Say once that workers wait for a node, as after one was lost."""
        room = _room(_nodes(), self.resources)
        lacks_room = room < len(self.workers)
        if lacks_room and not self._lacked_room:
            _logger.warning(_NO_ROOM, room, len(self.workers), max(room, 1))
        self._lacked_room = lacks_room


@contextlib.contextmanager
def index_workers(
    source: str,
    how: Mapping[str, Any],
    config: MemoryConfig,
    num_workers: int,
    address: str | None,
) -> Iterator[IndexWorkers]:
    """Start workers, which load the model once each, for a `with` block.

    A worker has a GPU of its own where the cluster has enough of them, else its share of the CPUs.
    Workers of a lost node start on another that has room, or wait for one.

    Args:
        source: of the model, as `load` takes it; a path must be there on every machine.
        how: keywords of `load`.
        config: settings of the memory, with the path of a sharded store that is there.
        num_workers: how many; no more than shards are of use.
        address: of a Ray cluster, or "auto"; None to start Ray on this machine.
    """
    start_ray(address)
    assert config.path is not None
    with contextlib.closing(Placements(Path(config.path))) as placements:
        num_shards = len(placements.shards)
    num_workers = min(num_workers, num_shards)
    resources = _resources(_nodes(), num_workers)
    if "num_gpus" in resources:
        how = {"device": "cuda", **{key: value for key, value in how.items() if value is not None}}
    actor: Any = ray.remote(ShardReader)
    # A batch is tried again until its worker is given up: while a lost node is not yet known to be
    # lost, tries fail within moments.
    options = {**resources, "max_restarts": _MAX_RESTARTS, "max_task_retries": -1}
    # A batch is a task of its own worker, one after the other: a shard has one writer.
    workers = [
        actor.options(scheduling_strategy="SPREAD", **options).remote(source, how, config)
        for _ in range(num_workers)
    ]
    try:
        yield IndexWorkers(workers, num_shards, resources)
    finally:
        for worker in workers:
            ray.kill(worker)


def _nodes() -> list[dict[str, float]]:
    """Return what each node of the cluster has, in Ray's words."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _resources(nodes: Sequence[Mapping[str, float]], num_workers: int) -> dict[str, float]:
    """Return what each worker asks of Ray, so that all have room.

    A worker is on one node, so it gets a share of a node's CPUs and not of the cluster's.
    """
    on_gpus: dict[str, float] = {"num_cpus": 0, "num_gpus": 1}
    if _room(nodes, on_gpus) >= num_workers:
        return on_gpus
    cpus = [int(node.get("CPU", 0)) for node in nodes]
    for share in range(max(cpus), 0, -1):
        if _room(nodes, {"num_cpus": share}) >= num_workers:
            return {"num_cpus": share}
    workers_of_a_cpu = math.ceil(num_workers / max(sum(cpus), 1))
    return {"num_cpus": math.floor(10_000 / workers_of_a_cpu) / 10_000}  # Ray counts so finely


def _room(nodes: Sequence[Mapping[str, float]], resources: Mapping[str, float]) -> int:
    """Return how many workers have room on the nodes."""
    needs = {"CPU": resources["num_cpus"], "GPU": resources.get("num_gpus", 0)}
    return sum(
        min(int(node.get(name, 0) / need + 1e-9) for name, need in needs.items() if need)
        for node in nodes
    )


def _batches(documents: Iterable[ToRead], num_shards: int) -> Iterator[tuple[int, list[ToRead]]]:
    """Yield documents in batches of one shard each, with the shard's number."""
    waiting: dict[int, list[ToRead]] = {}
    for document in documents:
        shard = shard_of(document[0], num_shards)
        batch = waiting.setdefault(shard, [])
        batch.append(document)
        if (
            len(batch) >= _MAX_DOCUMENTS
            or sum(len(text) for _, text, _ in batch) >= _MAX_CHARACTERS
        ):
            yield shard, waiting.pop(shard)
    yield from waiting.items()


@contextlib.contextmanager
def _told_plainly() -> Iterator[None]:
    """Turn what Ray says of a lost worker into a StoreError; errors of emt's own stay."""
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, EMTError | OSError):
            raise StoreError(str(cause)) from error
        raise
    except ray.exceptions.RayActorError as error:
        raise StoreError(f"a worker died {_MAX_RESTARTS + 1} times, or cannot start") from error
    except ray.exceptions.RayError as error:  # as when a machine's memory is full
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise StoreError(f"a worker failed: {lines[0]}") from error
