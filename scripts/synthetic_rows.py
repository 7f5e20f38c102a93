"""Stores larger than the book: its own documents first, then documents mixed from their rows.

A mixed row takes one real row's deviation from its layer's mean, adds a smaller part of another's
and a little noise, in shares whose squares sum to one, so that norms and the spread of cosines
to real queries stay what they were; `likeness` checks it. What mixing cannot give is new topics:
many mixed rows lie around each real one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import numpy as np

from memory_backends import Document, MemoryBackend, MemoryLayout, Rows
from memory_backends.catalog.records import NewDocument
from memory_backends.rows.files import RowFiles
from memory_backends.rows.query_samples import sampled_rows

LENGTH = 512  # rows of a document
SINKS = 4  # of them
OWN, NOISE = 0.95, 0.05
OTHER = (1 - OWN**2 - NOISE**2) ** 0.5
_NOISE_ROWS = 4096
_STATISTIC_ROWS = 4096
_LIKENESS_DOCUMENTS = 8

Queries = Mapping[int, torch.Tensor]  # layer -> (Hkv, N, head_dim) float32


class Book:
    """The documents of a store of real rows, and any number of others mixed from them.

    Args:
        backend: the store; its documents have `LENGTH` rows each.
    """

    def __init__(self, backend: MemoryBackend) -> None:
        self._backend = backend
        self._catalog = backend.catalog
        self.layout = backend.layout
        self.identity = backend.catalog.identity
        self._names = backend.catalog.document_names()
        self._num_rows = backend.catalog.num_rows
        assert self._num_rows == LENGTH * len(self._names), "a document of the book lacks rows"
        sinks = backend.catalog.sink_rows()
        self._content = np.setdiff1d(np.arange(self._num_rows), sinks)
        self._samples = {  # layer -> (H, s, D) float16
            idx: backend.sampled_queries(idx).transpose(1, 2).flatten(0, 1).half()
            for idx in self.layout.layers
        }
        self._sampled = sampled_rows(0, self._num_rows)
        some = self._content[:: max(len(self._content) // _STATISTIC_ROWS, 1)]
        self._mean, self._spread, self._noise = {}, {}, {}
        generator = torch.Generator().manual_seed(0)
        for idx, layer in self.layout.layers.items():
            rows = self._rows(idx, some)
            self._mean[idx] = rows.mean(dim=1, keepdim=True)
            self._spread[idx] = rows.std(dim=1, keepdim=True)
            shape = (layer.num_key_value_heads, _NOISE_ROWS, layer.row_dim)
            if idx and shape == self._noise[0].shape:  # documents take different parts of it
                self._noise[idx] = self._noise[0]
            else:
                self._noise[idx] = torch.randn(shape, generator=generator)

    def __len__(self) -> int:
        """How many documents are real: those of the lowest numbers."""
        return len(self._names)

    def document(self, number: int, num_rows: int = LENGTH) -> tuple[Document, list[Rows]]:
        """Return the first rows of a document for `add_many`; the same ones for the same number."""
        random = np.random.default_rng(number)
        is_real = number < len(self)
        source = number if is_real else int(random.integers(len(self)))
        found = self._catalog.document(self._names[source])
        own = np.arange(source * LENGTH, source * LENGTH + num_rows)
        other = random.choice(self._content, num_rows)
        is_sink = np.isin(np.arange(num_rows), found.sink_rows)
        keys, values = {}, {}
        for idx, layer in self.layout.layers.items():
            rows = self._rows(idx, own)
            if not is_real:
                start = int(random.integers(_NOISE_ROWS - num_rows))
                mixed = self._mixed(idx, rows, self._rows(idx, other), start)
                rows = torch.where(torch.from_numpy(is_sink)[:, None], rows, mixed)
            rows = rows.to(self.layout.dtype)
            keys[idx], values[idx] = rows[..., : layer.head_dim], rows[..., layer.head_dim :]
        chosen = torch.from_numpy(self._chosen_samples(number, num_rows, random))
        queries = {idx: samples[:, chosen] for idx, samples in self._samples.items()}
        document = Document(f"{number:06d}", found.token_ids[:num_rows])
        return document, [Rows(keys, values, found.row_tokens[:num_rows], is_sink, queries)]

    def likeness(self, queries: Queries) -> list[str]:
        """Compare real and mixed rows, sinks left out; return a line for each layer of `queries`.

        Args:
            queries: real ones, of unit length.
        """
        count = min(_LIKENESS_DOCUMENTS, len(self))
        numbers = {
            "real": [i * len(self) // count for i in range(count)],
            "mixed": [len(self) + i for i in range(count)],
        }
        runs = {
            kind: [self.document(number)[1][0] for number in some] for kind, some in numbers.items()
        }
        lines = []
        for idx, asked in queries.items():
            parts = []
            for kind, some in runs.items():
                keys = torch.cat([run.keys[idx][:, ~run.sinks].float() for run in some], dim=1)
                cosines = asked @ torch.nn.functional.normalize(keys, dim=-1).transpose(1, 2)
                best = cosines.topk(10, dim=-1).values[..., -1].mean()
                parts.append(
                    f"{kind}: norm {keys.norm(dim=-1).mean():.2f}, cosine {cosines.mean():+.3f} "
                    f"(spread {cosines.std():.3f}), 10th best of {keys.shape[1]:,} {best:.3f}"
                )
            lines.append(f"layer {idx}: " + "; ".join(parts))
        return lines

    def _rows(self, layer_idx: int, ids: np.ndarray) -> torch.Tensor:
        """Return rows of the book, (Hkv, n, D + Dv) float32."""
        heads = self.layout.layers[layer_idx].num_key_value_heads
        found = self._backend.fetch(layer_idx, torch.from_numpy(ids).expand(heads, -1))
        return torch.cat(found, dim=-1).float()

    def _mixed(
        self, layer_idx: int, own: torch.Tensor, other: torch.Tensor, start: int
    ) -> torch.Tensor:
        mean = self._mean[layer_idx]
        noise = self._noise[layer_idx][:, start : start + own.shape[1]]
        return (
            mean
            + OWN * (own - mean)
            + OTHER * (other - mean)
            + NOISE * self._spread[layer_idx] * noise
        )

    def _chosen_samples(
        self, number: int, num_rows: int, random: np.random.Generator
    ) -> np.ndarray:
        """Return which of the book's samples is each row's query; stores keep few of them."""
        chosen = random.integers(len(self._sampled), size=num_rows)
        if number < len(self):  # its own, at the rows whose queries are kept
            rows = sampled_rows(number * LENGTH, number * LENGTH + num_rows)
            chosen[rows - number * LENGTH] = np.searchsorted(self._sampled, rows)
        return chosen


def write_empty_store(layout: MemoryLayout, path: Path, num_rows: int) -> None:
    """Write a store whose catalogue is real and whose row files are sparse, without an index."""
    crc32 = dict.fromkeys(layout.layers, 0)

    def documents() -> Iterator[NewDocument]:
        for first in range(0, num_rows, LENGTH):
            tokens = np.arange(min(LENGTH, num_rows - first), dtype=np.int32)
            document = Document(f"{first:09d}", tokens)
            yield NewDocument(document, tokens, tokens[:SINKS], {}, crc32)

    backend = MemoryBackend(layout, "vector_db", path=path, sinks="one")
    with backend._writing():
        rows = backend._store.rows
        assert isinstance(rows, RowFiles)
        rows.skip(num_rows)
        rows.flush()
        backend.catalog.commit(list(documents()))
        backend._store.show_committed()
    backend.close()
