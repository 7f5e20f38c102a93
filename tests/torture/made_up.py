"""Documents that are a function of their name and version, and jobs that keep a store of them.

The jobs are what a command does, without a model: the same call again goes on where the one before
was killed. Each says on stdout what it has done, once it is done.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import numpy as np

from memory_backends import (
    Document,
    DocumentError,
    EMTError,
    LayerLayout,
    MemoryBackend,
    MemoryLayout,
    Rows,
)

# Layers of different shapes, with a gap, and values wider than keys.
LAYOUT = MemoryLayout({0: LayerLayout(2, 8, 8), 3: LayerLayout(1, 4, 6)}, torch.float32)
IDENTITY = {"model_type": "made up"}
_ROWS_A_RUN = 7
_GROUP = 2  # query heads a KV head

Goal = Mapping[str, int | None]  # document -> version; None for a document that is to go


@cache
def document(name: str, version: int) -> Document:
    """Make a document of 4 to 43 tokens, one word each."""
    seed = _seed(name, version)
    ids = np.random.default_rng(seed).integers(3, 1000, size=4 + seed % 40).astype(np.int32)
    words = [f"{name}.{version}", *(f"w{token}" for token in ids[1:])]
    stops = np.cumsum([len(word) + 1 for word in words]) - 1
    starts = stops - [len(word) for word in words]
    return Document(name, ids, " ".join(words), np.stack([starts, stops], axis=1).astype(np.int32))


@cache
def rows_of(name: str, version: int) -> Rows:
    """Make all rows of a document: one for each token but the first, which stands for <bos>."""
    num_rows = len(document(name, version).token_ids) - 1
    generator = torch.Generator().manual_seed(_seed(name, version))

    def normal(heads: int, dim: int) -> torch.Tensor:
        return torch.randn(heads, num_rows, dim, generator=generator)

    layers = LAYOUT.layers.items()
    return Rows(
        keys={idx: normal(layer.num_key_value_heads, layer.head_dim) for idx, layer in layers},
        values={
            idx: normal(layer.num_key_value_heads, layer.value_head_dim) for idx, layer in layers
        },
        tokens=np.arange(1, num_rows + 1, dtype=np.int32),
        sinks=np.arange(num_rows) == 0,
        queries={
            idx: normal(_GROUP * layer.num_key_value_heads, layer.head_dim) for idx, layer in layers
        },
    )


def runs_of(name: str, version: int) -> Iterator[Rows]:
    """Give the rows of a document in runs, as an encoder does."""
    rows = rows_of(name, version)
    for first in range(0, len(rows), _ROWS_A_RUN):
        span = slice(first, first + _ROWS_A_RUN)
        parts = (
            {idx: part[:, span] for idx, part in tensors.items()}
            for tensors in (rows.keys, rows.values, rows.queries)
        )
        keys, values, queries = parts
        yield Rows(keys, values, rows.tokens[span], rows.sinks[span], queries)


# -- jobs ---------------------------------------------------------------------------------------


def index(path: str, goal: Goal, index: str = "Flat") -> int:
    """Bring a store to where the goal's documents are in it in their versions, and save."""
    return _told(lambda: _index(Path(path), goal, index))


def tidy(path: str, method: str, index: str = "Flat") -> int:
    """Call `compact` or `rebuild`."""
    return _told(lambda: _tidy(Path(path), method, index))


def _index(path: Path, goal: Goal, index: str) -> None:
    backend = MemoryBackend(LAYOUT, "vector_db", path=path, identity=IDENTITY, index=index)
    for name, version in goal.items():
        stored = backend.catalog.has_document(name)
        if version is None:
            if stored:
                backend.remove_document(name)
        else:
            wanted = document(name, version)
            if not stored or backend.catalog.document(name).text != wanted.text:
                backend.add(wanted, runs_of(name, version), replace=stored)
        say(name)
    backend.save()
    say("saved")
    backend.close()


def _tidy(path: Path, method: str, index: str) -> None:
    backend = MemoryBackend.open(path, "vector_db", index=index)
    getattr(backend, method)()
    say("tidied")
    backend.close()


def _told(job: Any) -> int:
    """Do a job; an error of ours is exit code 2, as on the command line."""
    try:
        job()
    except DocumentError:  # nothing that these jobs do is a mistake of a user's
        raise
    except EMTError as error:
        say(f"error {' '.join(str(error).split())}")
        return 2
    return 0


def say(line: str) -> None:
    """Tell the test, at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _seed(name: str, version: int) -> int:
    return zlib.crc32(f"{name} {version}".encode())
