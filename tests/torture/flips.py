"""Jobs that damage one byte of a copy of a store, and judge what comes of it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import resource
import shutil
import traceback
from pathlib import Path
from typing import Any

import torch
import numpy as np

import memory_backends
from memory_backends import EMTError, MemoryBackend
from memory_backends.catalog import Catalog
from tests.torture.made_up import IDENTITY, LAYOUT, document, runs_of, say

INDEX = "IVF4,SQ8"  # lists, ids, centroids, ranges and codes: every part that a FAISS file can have
_DOCUMENTS = 60
_SPARE_MEMORY = 2**31  # bytes; a damaged size must not take the machine's


def make(path: str) -> None:
    """Make a store that has had every kind of write: replaced, removed, single rows, two saves."""
    with contextlib.closing(
        MemoryBackend(LAYOUT, "vector_db", path=path, identity=IDENTITY, index=INDEX)
    ) as backend:
        for number in range(_DOCUMENTS):
            backend.add(document(f"d{number}", 1), runs_of(f"d{number}", 1))
        backend.save()
        backend.remove_document("d3")
        backend.add(document("d7", 2), runs_of("d7", 2), replace=True)
        backend.remove([0, 1, 200, 512])
        backend.save()
        backend.add(document("late", 1), runs_of("late", 1))  # not in the FAISS files
        backend.catalog.set_setting("config", {"topk": 10})
        backend.catalog.set_setting("model", "made-up")


def damage(original: str, folder: str, flips: list[tuple[str, int, int]]) -> None:
    """Judge flips one after another; say the number before each, and its verdict after it."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _SPARE_MEMORY,) * 2)
    before = observed(Path(original))
    for number, (name, offset, mask) in enumerate(flips):
        say(f"trying {number}")
        copy = Path(folder) / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(original, copy)
        with (copy / name).open("r+b") as file:
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ mask]))
        say(f"verdict {_verdict(copy, name, before)}")


def _verdict(store: Path, name: str, before: str) -> str:
    """Return "named", "refused" or "harmless"; anything else is a broken promise."""
    try:
        named = any(str(damage.file).endswith(name) for damage in memory_backends.verify(store))
    except EMTError as error:
        named = name in str(error)
    except Exception as error:
        return f"verify raised {_told(error)}"
    try:
        after = observed(store)
    except EMTError:
        return "named" if named else "refused"
    except Exception as error:
        return f"using raised {_told(error)}"
    if named:
        return "named"
    return "harmless" if after == before else "changed unseen"


def observed(path: Path) -> str:
    """Return a digest of all that a user can see of a store."""
    digest = hashlib.sha256()

    def see(*values: Any) -> None:
        for value in values:
            if isinstance(value, torch.Tensor):
                value = value.numpy()
            if isinstance(value, np.ndarray):
                value = [value.shape, value.dtype.str, hashlib.sha256(value.tobytes()).hexdigest()]
            digest.update(json.dumps(value).encode())

    with contextlib.closing(Catalog.open(path)) as catalog:
        see(catalog.layout.to_json(), dict(catalog.identity))
        see(catalog.setting("config"), catalog.setting("model"), catalog.document_sizes())
        for name in catalog.document_names():
            stored = catalog.document(name)
            see(name, stored.text, stored.token_ids, stored.offsets, stored.first_row)
            see(stored.row_tokens, stored.sink_rows, stored.metadata)
    for memory_type, options in (
        ("manual", {}),
        ("manual", {"sinks": "one"}),
        ("vector_db", {"index": INDEX}),
    ):
        with contextlib.closing(MemoryBackend.open(path, memory_type, **options)) as backend:
            _see_rows(backend, see)
    return digest.hexdigest()


def _see_rows(backend: MemoryBackend, see: Any) -> None:
    see(len(backend))
    ids = np.concatenate(
        [
            stored.first_row + np.arange(len(stored.row_tokens))
            for stored in map(backend.catalog.document, backend.catalog.document_names())
        ]
    )
    see(sorted(backend.catalog.document_of_rows(ids.tolist()).items()))
    for idx, layer in backend.layout.layers.items():
        heads = layer.num_key_value_heads
        see(*backend.fetch(idx, torch.from_numpy(ids).expand(heads, -1).contiguous()))
        queries = torch.randn(heads, 8, layer.head_dim, generator=torch.Generator().manual_seed(1))
        see(*backend.search(idx, queries, 10), backend.sampled_queries(idx))


def _told(error: Exception) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    message = " ".join(str(error).split())[:100]
    return f"{type(error).__name__}: {message} ({Path(where.filename).name}:{where.lineno})"
