"""What workers ask of a cluster, so that all have room on its nodes."""

import logging

import pytest
import ray

from emt.cluster import indexing
from emt.cluster.indexing import IndexWorkers, _resources, _room
from emt.cluster.reader import Read
from emt.errors import StoreError
from emt.ingest.changes import Written


def nodes(*each, **more):
    return [{"CPU": float(cpus), **more} for cpus in each]


@pytest.mark.parametrize(
    ("cpus", "num_workers", "share"),
    [
        ((16,), 4, 4),
        ((1, 1, 1), 1, 1),  # three CPUs, but none has a node of three
        ((2, 2, 2), 2, 2),
        ((4, 4), 3, 2),
        ((8, 1), 2, 4),
        ((2,), 4, 0.5),
        ((2,), 14, 0.1428),  # seven of 0.1429 would be more than one
        ((0,), 2, 0.5),
    ],
)
def test_a_worker_gets_a_share_of_one_node(cpus, num_workers, share):
    assert _resources(nodes(*cpus), num_workers) == {"num_cpus": share}
    assert sum(cpus) == 0 or _room(nodes(*cpus), {"num_cpus": share}) >= num_workers


def test_a_worker_gets_a_gpu_where_all_can_have_one():
    machines = nodes(1, 1, GPU=4.0)
    assert _resources(machines, 8) == {"num_cpus": 0, "num_gpus": 1}
    assert _resources(machines, 9) == {"num_cpus": 0.2}


def test_workers_without_room_are_told_of_once(monkeypatch, caplog):
    there = nodes(1, 1)
    monkeypatch.setattr(indexing, "_nodes", lambda: there)
    pool = IndexWorkers([None, None], 4, {"num_cpus": 1})
    with caplog.at_level(logging.WARNING):
        pool._warn_without_room()
        assert not caplog.messages
        lost = there.pop()
        pool._warn_without_room()
        pool._warn_without_room()
        assert len(caplog.messages) == 1
        assert "room for 1 of 2 workers" in caplog.text
        assert "--workers 1" in caplog.text
        there.append(lost)
        pool._warn_without_room()
        there.pop()
        pool._warn_without_room()
    assert len(caplog.messages) == 2


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            ray.exceptions.RayTaskError("write", "a traceback", OSError(28, "No space left")),
            "space",
        ),
        (ray.exceptions.OutOfMemoryError("the machine's memory is full"), "memory is full"),
    ],
)
def test_a_batch_that_fails_is_named_and_the_others_go_on(monkeypatch, error, told):
    def get(task):
        if task == "second":
            raise error
        return Read(Written(1, 0, 0), 3)

    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "wait", lambda tasks, timeout: (tasks[:1], tasks[1:]))
    pool = IndexWorkers([FakeWorker(["first", "second", "third"])], 1, {"num_cpus": 1})
    monkeypatch.setattr(indexing, "_MAX_DOCUMENTS", 1)
    rows = []
    with pytest.raises(StoreError, match=rf"1 documents were not read: 'b' \(.*{told}"):
        pool.write([("a", "", None), ("b", "", None), ("c", "", None)], rows.append)
    assert rows == [3, 3]


class FakeWorker:
    def __init__(self, tasks):
        self.write = self
        self._tasks = iter(tasks)

    def remote(self, shard, documents):
        return next(self._tasks)
