"""What a store must be whatever happened to it: whole documents, their rows, and right answers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import numpy as np
import numpy.typing as npt

import memory_backends
from memory_backends import MemoryBackend
from memory_backends.testing.rows import nearest
from tests.torture.made_up import document, rows_of

Float32Array = npt.NDArray[np.float32]
_K = 5


@dataclass(frozen=True)
class Content:
    """One document as a store has it: all that a user can ask for.

    Attributes:
        rows: layer -> (Hkv, n, head_dim + value_head_dim).
    """

    text: str | None
    token_ids: list[int]
    offsets: list[list[int]]
    row_tokens: list[int]
    sinks: list[int]
    rows: Mapping[int, Float32Array]

    def same(self, other: Content, *, atol: float = 0) -> bool:
        """Tell whether two are the same, rows up to `atol`."""
        return (
            (self.text, self.token_ids, self.offsets, self.row_tokens, self.sinks)
            == (other.text, other.token_ids, other.offsets, other.row_tokens, other.sinks)
            and self.rows.keys() == other.rows.keys()
            and all(
                np.allclose(rows, other.rows[idx], rtol=0, atol=atol)
                for idx, rows in self.rows.items()
            )
        )


def made_up(name: str, version: int) -> Content:
    """Compute, without a store, what a store must have of a made-up document."""
    expected, rows = document(name, version), rows_of(name, version)
    assert expected.offsets is not None
    return Content(
        text=expected.text,
        token_ids=expected.token_ids.tolist(),
        offsets=expected.offsets.tolist(),
        row_tokens=rows.tokens.tolist(),
        sinks=np.flatnonzero(rows.sinks).tolist(),
        rows={
            idx: torch.cat([rows.keys[idx], rows.values[idx]], dim=-1).numpy() for idx in rows.keys
        },
    )


def contents(path: Path, *, index: str = "Flat") -> dict[str, Content]:
    """Read a whole store, as another process would; check that it answers exactly."""
    with contextlib.closing(MemoryBackend.open(path, "vector_db", index=index)) as backend:
        result = {name: _content(backend, name) for name in backend.catalog.document_names()}
        assert len(backend) == sum(len(content.row_tokens) for content in result.values())
        _check_search(backend, result)
    return result


def check_undamaged(path: Path) -> None:
    """Expect `verify` to find nothing."""
    assert memory_backends.verify(path) == []


def size_of(path: Path) -> int:
    """Return the bytes of all files of a store."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _content(backend: MemoryBackend, name: str) -> Content:
    stored = backend.catalog.document(name)
    rows = {}
    for idx, layer in backend.layout.layers.items():
        ids = torch.arange(stored.first_row, stored.first_row + len(stored.row_tokens))
        keys, values = backend.fetch(idx, ids.expand(layer.num_key_value_heads, -1).contiguous())
        rows[idx] = torch.cat([keys, values], dim=-1).float().numpy()
    return Content(
        text=stored.text,
        token_ids=stored.token_ids.tolist(),
        offsets=[] if stored.offsets is None else stored.offsets.tolist(),
        row_tokens=stored.row_tokens.tolist(),
        sinks=stored.sink_rows.tolist(),
        rows=rows,
    )


def _check_search(backend: MemoryBackend, contents: Mapping[str, Content]) -> None:
    """Hold the store's answers against brute force in float64."""
    if not contents:
        assert not len(backend)
        return
    ids = np.concatenate([_ids_of(backend, name) for name in contents])
    owners = backend.catalog.document_of_rows(ids.tolist())
    assert list(owners.values()) == [n for n, c in contents.items() for _ in c.row_tokens]
    for idx, layer in backend.layout.layers.items():
        keys = np.concatenate([c.rows[idx] for c in contents.values()], axis=1)
        keys = keys[..., : layer.head_dim].astype(np.float64)
        generator = torch.Generator().manual_seed(idx)
        queries = torch.randn(layer.num_key_value_heads, 4, layer.head_dim, generator=generator)
        scores, _ = nearest(keys, queries, _K, range(len(ids)))
        result = backend.search(idx, queries, _K)
        np.testing.assert_allclose(result.scores.numpy(), scores, atol=1e-5)
        # Where keys are equal, as of equal tokens in the first layer, any of their ids is right.
        found_ids = result.ids.numpy()
        there = found_ids >= 0
        assert np.isin(found_ids[there], ids).all()
        assert all(
            len(set(row[row >= 0])) == min(_K, len(ids)) for row in found_ids.reshape(-1, _K)
        )
        exact = _cosines(keys, queries.double().numpy(), np.searchsorted(ids, found_ids))
        np.testing.assert_allclose(exact[there], scores[there], atol=1e-9)


def _cosines(
    keys: npt.NDArray[np.float64],
    queries: npt.NDArray[np.float64],
    positions: npt.NDArray[np.int64],
) -> npt.NDArray[np.float64]:
    """Return the cosine of each query, (Hkv, N, D), and its k keys of (Hkv, M, D)."""
    heads = np.arange(len(keys))[:, None, None]
    near = keys[heads, np.minimum(positions, keys.shape[1] - 1)]  # (Hkv, N, k, D)
    lengths = np.linalg.norm(near, axis=-1) * np.linalg.norm(queries, axis=-1)[..., None]
    cosines: npt.NDArray[np.float64] = (near * queries[:, :, None]).sum(axis=-1) / lengths
    return cosines


def _ids_of(backend: MemoryBackend, name: str) -> npt.NDArray[np.int64]:
    stored = backend.catalog.document(name)
    return stored.first_row + np.arange(len(stored.row_tokens), dtype=np.int64)


def check_allowed(
    contents: Mapping[str, Content],
    allowed: Mapping[str, Iterable[Content | None]],
    *,
    atol: float = 0,
) -> None:
    """Expect each document to be in one of the states it may be in; None is its absence."""
    assert contents.keys() <= allowed.keys()
    for name, states in allowed.items():
        content = contents.get(name)
        assert any(
            state is content if state is None or content is None else state.same(content, atol=atol)
            for state in states
        ), f"document {name!r} is in none of the states it may be in: {content and content.text}"
