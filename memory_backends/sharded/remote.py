"""`RemoteShard`: a shard that a Ray actor has opened, on whichever machine that is.

An actor is asked in one message for all searches of a prompt, and in one for the rows of all its
passages; nothing else crosses the wire for a prompt. An actor that died is started again by Ray,
and is told anew which rows may be found.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import ray

from memory_backends.errors import EMTError
from memory_backends.layout import Heads, Int64Array
from memory_backends.search.scores import Search, SearchResult
from memory_backends.sharded.options import ShardSettings
from memory_backends.sharded.placements import ShardRecord
from memory_backends.sharded.shard import LocalShard, ShardMissingError
from memory_backends.sharded.shards import open_shard

_UNTOLD = "untold"
_MAX_CONCURRENCY = 8  # messages that an actor answers at a time
_START_SECONDS = 300  # at most, for an actor to start and open its shard
_MAX_RETRIES = 3  # of a message whose actor died; all of them may be sent again


def start_ray(address: str | None) -> None:
    """Join a cluster, if this process has joined none.

    Args:
        address: of the cluster, or "auto"; None or "local" to start Ray on this machine.
    """
    if not ray.is_initialized():
        ray.init(address=address or "local", log_to_driver=False, configure_logging=False)


class _Actor:
    """Answers for one shard; runs in a process of Ray's."""

    def __init__(self, record: ShardRecord, settings: ShardSettings) -> None:
        self._shard = LocalShard(open_shard(record, settings))
        self._version = 0

    def tell(
        self,
        version: int,
        ids: Int64Array | None,
        heads: Mapping[int, Sequence[int]] | None,
    ) -> None:
        if ids is not None:
            self._shard.choose_rows(ids.copy())  # what Ray hands out is read-only
        self._shard.index_heads(heads)
        self._version = version

    def ask(self, version: int, name: str, *given: Any) -> Any:
        if version != self._version:
            return _UNTOLD
        answer = getattr(self._shard, name)
        return answer(*given) if callable(answer) else answer


class RemoteShard:
    """A shard in a Ray actor; see `Shard` for its methods.

    Args:
        record: which shard it is; its location is a path on the machine where the actor runs.
        settings: how it is opened.
        time_limit: seconds for an answer; None for no limit.

    Attributes:
        num_messages: how many were sent to the actor.
        num_bytes: of the tensors in them, and in the answers.

    Raises:
        ShardMissingError: it cannot be opened there, or nobody answers. So does every method.
    """

    def __init__(
        self, record: ShardRecord, settings: ShardSettings, time_limit: float | None = None
    ) -> None:
        self._number = record.number
        self._time_limit: float | None = _START_SECONDS
        self._version = 1
        self._ids: Int64Array | None = None
        self._heads: Mapping[int, Sequence[int]] | None = None
        self._telling = threading.Lock()
        self.num_messages = self.num_bytes = 0
        options = {"num_cpus": 0, "max_restarts": -1, "max_concurrency": _MAX_CONCURRENCY}
        options["max_task_retries"] = _MAX_RETRIES  # else what is asked while it restarts fails
        actor: Any = ray.remote(_Actor)
        self._actor = actor.options(scheduling_strategy="SPREAD", **options).remote(
            record, settings
        )
        try:
            self._ask("searches_exactly")  # it has opened the shard
        except BaseException:
            self.close()
            raise
        self._time_limit = time_limit

    def search(self, searches: Sequence[Search]) -> list[SearchResult]:
        """See `Shard.search`."""
        sent = [each._replace(queries=each.queries.detach().cpu()) for each in searches]
        return list(self._ask("search", sent))

    def rows(self, ids: torch.Tensor) -> dict[int, torch.Tensor]:
        """See `Shard.rows`."""
        return dict(self._ask("rows", ids))

    def gather(self, layer_idx: int, ids: torch.Tensor, heads: Heads = None) -> torch.Tensor:
        """See `Shard.gather`."""
        gathered: torch.Tensor = self._ask("gather", layer_idx, ids, heads)
        return gathered

    def samples(self, layer_idx: int) -> torch.Tensor:
        """See `Shard.samples`."""
        samples: torch.Tensor = self._ask("samples", layer_idx)
        return samples

    def choose_rows(self, ids: Int64Array) -> None:
        """See `Shard.choose_rows`; the actor is told with the next question."""
        self._ids, self._version = ids, self._version + 1

    def index_heads(self, heads: Mapping[int, Sequence[int]] | None) -> None:
        """See `Shard.index_heads`; the actor is told with the next question."""
        self._heads, self._version = heads, self._version + 1

    def refresh(self) -> None:
        """See `Shard.refresh`."""
        self._ask("refresh")

    def write_files(self) -> None:
        """See `Shard.write_files`."""
        self._ask("write_files")

    def rebuild_files(self) -> None:
        """See `Shard.rebuild_files`."""
        self._ask("rebuild_files")

    @property
    def has_written(self) -> bool:
        """See `Shard.has_written`."""
        return bool(self._ask("has_written"))

    @property
    def lacks_files(self) -> bool:
        """See `Shard.lacks_files`."""
        return bool(self._ask("lacks_files"))

    @property
    def searches_exactly(self) -> bool:
        """See `Shard.searches_exactly`."""
        return bool(self._ask("searches_exactly"))

    def close(self) -> None:
        """See `Shard.close`: the actor ends."""
        if ray.is_initialized():
            ray.kill(self._actor)

    def _ask(self, name: str, *given: Any) -> Any:
        """Send a question, after what the actor has to be told, if it does not know that yet."""
        for _ in range(1 + _MAX_RETRIES):
            answer = self._sent(self._actor.ask, self._version, name, *given)
            if not (isinstance(answer, str) and answer == _UNTOLD):
                break
            with self._telling:
                self._sent(self._actor.tell, self._version, self._ids, self._heads)
        else:  # it dies each time before it can be asked
            raise ShardMissingError(f"shard {self._number}: its actor dies again and again.")
        self.num_bytes += _num_bytes(given) + _num_bytes(answer)
        return answer

    def _sent(self, method: Any, *given: Any) -> Any:
        self.num_messages += 1
        try:
            return ray.get(method.remote(*given), timeout=self._time_limit)
        except ray.exceptions.GetTimeoutError as error:
            reason = f"no answer within {self._time_limit} s"
            raise ShardMissingError(f"shard {self._number}: {reason}.") from error
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, EMTError):  # without the other process's traceback
                raise error.cause from error
            raise
        except ray.exceptions.RayError as error:  # the actor died, or its answer was lost
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise ShardMissingError(f"shard {self._number}: {lines[-1]}") from error


def connect_remotely(
    address: str | None, time_limit: float | None
) -> Callable[[ShardRecord, ShardSettings], RemoteShard]:
    """Return what opens shards in Ray actors, for `ShardedOptions.connect`.

    Args:
        address: as for `start_ray`.
        time_limit: seconds for each answer; None for no limit.
    """

    def connect(record: ShardRecord, settings: ShardSettings) -> RemoteShard:
        start_ray(address)
        return RemoteShard(record, settings, time_limit)

    return connect


def _num_bytes(value: Any) -> int:
    """Return how many bytes the tensors in a message have."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        value = list(value.values())
    return sum(map(_num_bytes, value)) if isinstance(value, list | tuple) else 0
