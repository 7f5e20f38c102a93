"""Several processes and one store: readers while one writes, and a writer that is killed."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import torch
import pytest

from memory_backends import MemoryBackend, verify
from memory_backends.testing.checks import assert_fetches, assert_finds
from memory_backends.testing.rows import LAYERS, make_document, make_rows

# Does what it is told, a line at a time, and says when it is done.
WORKER = """
import sys
from pathlib import Path
from memory_backends import MemoryBackend
from memory_backends.testing.rows import LAYOUT, make_document, make_rows
backend = MemoryBackend(LAYOUT, path=Path(sys.argv[1]))
for line in sys.stdin:
    what, *arguments = line.split()
    if what == "add":
        name, count = arguments
        backend.add(make_document(name, int(count)), [make_rows(int(count), seed=int(count))])
    elif what == "remove":
        backend.remove_document(*arguments)
    elif what == "compact":
        backend.compact()
    elif what == "churn":
        at = 0
        while True:
            names = [f"doc-{n}" for n in range(at, at + 5)]
            rows = [make_rows(5, seed=n) for n in range(at, at + 5)]
            documents = [(make_document(n, 5), [r]) for n, r in zip(names, rows)]
            for name, ids in backend.add_many(documents, rows_per_commit=10):
                print("added", name, ids.start, flush=True)
            backend.remove_document(names[0])
            print("removed", names[0], flush=True)
            backend.compact()
            at += 5
    print("done", flush=True)
"""


class Worker:
    def __init__(self, store: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(store)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    @property
    def pipes(self) -> tuple[IO[str], IO[str]]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        return self.process.stdin, self.process.stdout

    def start(self, line: str) -> None:
        self.pipes[0].write(line + "\n")
        self.pipes[0].flush()

    def do(self, line: str) -> None:
        self.start(line)
        assert self.pipes[1].readline() == "done\n"

    def kill(self) -> str:
        """Kill it as a crash would; return the lines that it had said whole."""
        self.process.kill()
        said = self.pipes[1].read()
        said = said[: said.rfind("\n") + 1]  # the kill may have cut a line
        self.process.wait()
        self.close()
        return said

    def close(self) -> None:
        self.pipes[0].close()
        self.process.wait()
        self.pipes[1].close()


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    worker = Worker(tmp_path / "store")
    yield worker
    worker.close()


def test_a_reader_follows_a_writer_in_another_process(worker: Worker, tmp_path: Path) -> None:
    store = tmp_path / "store"
    runs = [make_rows(n, seed=n) for n in (10, 7, 4)]
    worker.do("add a 10")
    readers = [MemoryBackend.open(store, kind) for kind in ("manual", "vector_db")]
    worker.do("add b 7")
    for reader in readers:
        assert_finds(reader, runs, range(10))
        reader.refresh()
        assert_finds(reader, runs, range(17))
    worker.do("remove a")
    worker.do("add c 4")
    worker.do("compact")
    for reader in readers:
        assert_finds(reader, runs, range(17))  # rows of the file that it has open
        assert_fetches(reader, runs[:2])
        reader.refresh()
        assert_finds(reader, runs, range(10, 21))
        assert reader.catalog.document_names() == ["b", "c"]
        reader.close()
    assert verify(store) == []


def test_a_store_is_verified_while_it_is_written(worker: Worker, tmp_path: Path) -> None:
    worker.do("add a 10")
    worker.start("churn")
    while not worker.pipes[1].readline().startswith("removed"):
        pass
    for _ in range(10):
        assert verify(tmp_path / "store") == []
    reader = MemoryBackend.open(tmp_path / "store", "vector_db")
    for _ in range(10):  # every state is whole: no row that is found is one of zeros
        reader.refresh()
        names = reader.catalog.document_names()
        assert len(reader) >= 5 * len(names) > 0
        query = make_rows(1, seed=1).keys[0]
        hits = reader.search(0, query, min(len(reader), 20))
        assert (reader.fetch(0, hits.ids)[0].norm(dim=-1) > 0).all()
    reader.close()
    worker.kill()


def test_a_writer_killed_at_any_instant_leaves_a_good_store(worker: Worker, tmp_path: Path) -> None:
    """One kill; `tests/torture/test_kill.py` tries hundreds."""
    store = tmp_path / "store"
    worker.start("churn")
    first = worker.pipes[1].readline()  # it is under way
    time.sleep(random.Random(3).uniform(0, 0.5))
    said = [line.split() for line in (first + worker.kill()).splitlines()]
    assert verify(store) == []
    backend = MemoryBackend.open(store)
    names = backend.catalog.document_names()
    removed = {name for what, name, *_ in said if what == "removed"}
    for what, name, *_ in said:  # what was said to be done, is
        if what == "added" and name not in removed and int(name[4:]) % 5:
            assert name in names
    assert not removed & set(names)
    for name in names:
        document = backend.catalog.document(name)
        rows = make_rows(5, seed=int(name[4:]))
        for layer_idx, layer in LAYERS.items():
            ids = torch.arange(document.first_row, document.first_row + 5)
            keys, values = backend.fetch(layer_idx, ids.expand(layer.num_key_value_heads, -1))
            assert torch.equal(keys, rows.keys[layer_idx])
            assert torch.equal(values, rows.values[layer_idx])
    backend.add(make_document("next", 5), [make_rows(5, seed=1)])
    backend.compact()
    assert verify(store) == []
    backend.close()
