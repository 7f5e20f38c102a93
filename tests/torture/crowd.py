"""Jobs of one writer and several readers of one store, that keep a diary for the test to judge.

Times are of the machine's monotonic clock, which all processes share.
"""

from __future__ import annotations

import contextlib
import json
import random
import time
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch

from memory_backends import Document, MemoryBackend
from tests.torture.made_up import IDENTITY, LAYOUT, document, rows_of, runs_of, say

_NAMES = [f"d{number}" for number in range(8)]
_VERSIONS = 4


class Memory(NamedTuple):
    """One row of one version of a document."""

    name: str
    version: int
    row: int


def write(path: str, seconds: float, seed: int) -> None:
    """Add, replace, remove, save and compact until the time is up; say what and when."""
    rng = random.Random(seed)
    versions: dict[str, int] = {}
    with contextlib.closing(
        MemoryBackend(LAYOUT, "vector_db", path=path, identity=IDENTITY, index="Flat")
    ) as backend:
        versions = {name: _version_of(backend.catalog.document(name)) for name in _names(backend)}
        stop = time.monotonic() + seconds
        while time.monotonic() < stop:
            name = rng.choice(_NAMES)
            action = rng.choices(("put", "remove", "save", "compact"), (6, 2, 1, 1))[0]
            if action == "put":
                old = versions.get(name)
                versions[name] = rng.choice([v for v in range(_VERSIONS) if v != old])
                with _diary("put", name, versions[name]):
                    backend.add(
                        document(name, versions[name]),
                        runs_of(name, versions[name]),
                        replace=old is not None,
                    )
            elif action == "remove" and name in versions:
                del versions[name]
                with _diary("remove", name):
                    backend.remove_document(name)
            elif action == "save":
                backend.save()
            elif action == "compact":
                backend.compact()


def read(path: str, seconds: float, seed: int) -> None:
    """Look at the store again and again until the time is up; say what was there and when."""
    rng = random.Random(seed)
    backend = MemoryBackend.open(path, "vector_db", index="Flat")
    stop = time.monotonic() + seconds
    while time.monotonic() < stop:
        began = time.monotonic()
        backend.refresh()
        ended = time.monotonic()
        seen = [_seen(backend, idx, rng) for idx in rng.choices(list(LAYOUT.layers), k=2)]
        time.sleep(rng.random() / 50)  # the writer goes on; this reader has not asked again
        seen.append(_seen(backend, rng.choice(list(LAYOUT.layers)), rng))
        say(json.dumps([began, ended, seen]))
    backend.close()


def _seen(backend: MemoryBackend, layer_idx: int, rng: random.Random) -> list[tuple[str, int]]:
    """Find all rows there are; return the versions of documents that they are all the rows of.

    Raises:
        AssertionError: a row that was never written, one at another score than its own, or a
            document of which some rows are missing.
    """
    layer = LAYOUT.layers[layer_idx]
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    queries = torch.randn(layer.num_key_value_heads, 1, layer.head_dim, generator=generator)
    result = backend.search(layer_idx, queries, len(backend) + 3)
    keys, values = backend.fetch(layer_idx, result.ids)
    cosines = torch.nn.functional.cosine_similarity(keys, queries[:, :, None], dim=-1)
    versions = []
    for head in range(layer.num_key_value_heads):
        there = result.ids[head, 0] >= 0
        answer = torch.cat([keys, values], dim=-1)[head, 0][there]
        exact = cosines[head, 0][there]
        assert torch.allclose(result.scores[head, 0][there], exact, atol=1e-5, rtol=0), "scores"
        memories = [_universe(layer_idx, head)[row.numpy().tobytes()] for row in answer]
        assert len(set(memories)) == len(memories), "a row was found twice"
        documents = {(memory.name, memory.version) for memory in memories}
        assert len(memories) == sum(len(rows_of(*key)) for key in documents), "half a document"
        versions.append(documents)
    assert all(documents == versions[0] for documents in versions), "heads differ"
    return sorted(versions[0])


@cache
def _universe(layer_idx: int, head: int) -> dict[bytes, Memory]:
    """Return every row that there can ever be, by its bytes."""
    result = {}
    for name in _NAMES:
        for version in range(_VERSIONS):
            rows = rows_of(name, version)
            joined = torch.cat([rows.keys[layer_idx][head], rows.values[layer_idx][head]], dim=-1)
            result |= {
                data.numpy().tobytes(): Memory(name, version, row)
                for row, data in enumerate(joined)
            }
    return result


@contextlib.contextmanager
def _diary(action: str, name: str, version: int | None = None) -> Iterator[None]:
    began = time.monotonic()
    yield
    say(json.dumps([began, time.monotonic(), action, name, version]))


def _names(backend: MemoryBackend) -> list[str]:
    return backend.catalog.document_names()


def _version_of(stored: Document) -> int:
    assert stored.text is not None
    return int(stored.text.split()[0].rpartition(".")[2])


def fill(path: str) -> None:
    """Make the store, with something in it."""
    with contextlib.closing(
        MemoryBackend(LAYOUT, "vector_db", path=path, identity=IDENTITY, index="Flat")
    ) as backend:
        for name in _NAMES[:3]:
            backend.add(document(name, 0), runs_of(name, 0))
        backend.save()
