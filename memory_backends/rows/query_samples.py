"""A sample of the queries of the stored tokens, from which an index can be calibrated later.

Which tokens are sampled depends on the row id alone, so a run that was interrupted and resumed
samples the same: every 64th of the first 16,384 rows, and half as densely with each doubling of
the id: some 1,500 of ten million. Samples are float16, all query heads of one token together, in
append-only files `queries/layer-000.bin`, or in RAM with the rows. They outlive their document:
they say what queries look like, not what it said.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import numpy as np

from memory_backends.errors import StoreError
from memory_backends.layout import Int64Array, MemoryLayout, Rows
from memory_backends.rows.append_files import AppendFiles

FOLDER = "queries"
ITEMSIZE = torch.float16.itemsize

_DENSE_ROWS = 16_384
_DENSE_STRIDE = 64
_LARGEST = 60_000.0  # float16 ends at 65,504


class SampledLayer(NamedTuple):
    """How many samples one layer has, and of how many query heads each."""

    num_heads: int
    num_samples: int


class Segment(NamedTuple):
    """The samples that one document adds to one layer."""

    num_samples: int
    crc32: int


def sampled_rows(first: int, stop: int) -> Int64Array:
    """Return which row ids from `first` to `stop - 1` are sampled, ascending, int64."""
    parts: list[Int64Array] = [np.empty(0, dtype=np.int64)]
    start, end, stride = 0, _DENSE_ROWS, _DENSE_STRIDE
    while start < stop:
        least = -(-max(first, start) // stride) * stride
        parts.append(np.arange(least, min(stop, end), stride, dtype=np.int64))
        start, end, stride = end, 2 * end, 2 * stride
    return np.concatenate(parts)


class QuerySamples:
    """Samples of each layer, in files or, without a directory, in RAM.

    Attributes:
        num_heads: layer -> query heads, of the layers that have samples or are about to.
    """

    def __init__(
        self, layout: MemoryLayout, directory: Path | None, sampled: Mapping[int, SampledLayer]
    ) -> None:
        self._layout = layout
        self.num_heads: dict[int, int] = {}
        self._appended: dict[int, Segment] = {}  # since the last seal
        self._files = None if directory is None else AppendFiles(directory / FOLDER, {}, {})
        self._tensors: dict[int, list[torch.Tensor]] = {}  # of (n, H, D) float16
        self.show(sampled)

    def append(self, rows: Rows, first: int) -> None:
        """Keep the samples among `rows`, the first of which gets the id `first`."""
        wanted = torch.from_numpy(sampled_rows(first, first + len(rows)) - first)
        for layer_idx, queries in rows.queries.items():  # (H, n, D)
            if len(wanted):
                samples = queries[:, wanted.to(queries.device)].detach().cpu()  # (H, s, D)
                self.append_samples(layer_idx, _as_half(samples.transpose(0, 1)))

    def append_samples(self, layer_idx: int, samples: torch.Tensor) -> None:
        """Put samples (s, H, D) float16 after everything appended to one layer so far."""
        if layer_idx not in self.num_heads:
            self._add_layer(layer_idx, SampledLayer(samples.shape[1], 0))
        data = samples.contiguous().numpy().tobytes()
        if self._files is None:
            self._tensors[layer_idx].append(samples.clone())
        else:
            self._files[layer_idx].append(data)
        before = self._appended.get(layer_idx, Segment(0, 0))
        self._appended[layer_idx] = Segment(
            before.num_samples + len(samples), zlib.crc32(data, before.crc32)
        )

    def seal(self) -> dict[int, Segment]:
        """End a document; return layer -> what it added, for the layers it added to."""
        added, self._appended = self._appended, {}
        if self._files is not None:
            self._files.seal()
        return added

    def rewind(self) -> None:
        """Drop what was appended since the last seal."""
        for layer_idx, segment in self._appended.items():
            self._cut_tensors(layer_idx, len(self.layer(layer_idx)) - segment.num_samples)
        self._appended.clear()
        if self._files is not None:
            self._files.rewind()

    def flush(self) -> None:
        """Make appended samples durable."""
        if self._files is not None:
            self._files.flush()

    def show(self, sampled: Mapping[int, SampledLayer]) -> None:
        """Show what the catalogue says, and forget what was appended after it."""
        self._appended.clear()
        if self._files is not None:
            self._files.show({idx: layer.num_samples for idx, layer in sampled.items()})
        for layer_idx in self.num_heads.keys() - sampled.keys():  # of a document that did not come
            del self.num_heads[layer_idx]
            self._tensors.pop(layer_idx, None)
        for layer_idx, layer in sampled.items():
            self._add_layer(layer_idx, layer)
            self._cut_tensors(layer_idx, layer.num_samples)

    def layer(self, layer_idx: int) -> torch.Tensor:
        """Return the samples of a layer, (s, H, head_dim) float16; (0, Hkv, D) if it has none."""
        layer = self._layout.layers[layer_idx]
        heads = self.num_heads.get(layer_idx, layer.num_key_value_heads)
        if self._files is not None and layer_idx in self._files:
            raw = self._files[layer_idx].records
            return raw.view(torch.float16).view(len(raw), heads, layer.head_dim)
        empty = torch.empty(0, heads, layer.head_dim, dtype=torch.float16)
        return torch.cat([empty, *self._tensors.get(layer_idx, [])])

    def grouped(self, layer_idx: int) -> torch.Tensor:
        """Return the samples of a layer by KV head; see `MemoryBackend.sampled_queries`."""
        layer, samples = self._layout.layers[layer_idx], self.layer(layer_idx)  # (s, H, D)
        num_heads, groups = layer.num_key_value_heads, samples.shape[1] // layer.num_key_value_heads
        grouped = samples.view(len(samples), num_heads, groups, layer.head_dim)
        grouped = grouped.transpose(0, 1).float()  # (Hkv, s, G, D)
        if not bool(torch.isfinite(grouped).all()):
            raise StoreError(
                f"the query samples of layer {layer_idx} must be finite; some are not. "
                "The store is damaged: `emt verify` names the file, restore it from a copy."
            )
        return grouped

    def close(self) -> None:
        """Let go of files and tensors."""
        self._tensors.clear()
        if self._files is not None:
            self._files.close()

    def _add_layer(self, layer_idx: int, layer: SampledLayer) -> None:
        self.num_heads[layer_idx] = layer.num_heads
        if self._files is None:
            self._tensors.setdefault(layer_idx, [])
        elif layer_idx not in self._files or not layer.num_samples:
            head_dim = self._layout.layers[layer_idx].head_dim
            size = layer.num_heads * head_dim * ITEMSIZE
            self._files.add_layer(layer_idx, size, layer.num_samples)

    def _cut_tensors(self, layer_idx: int, num_samples: int) -> None:
        if self._files is None and sum(map(len, self._tensors[layer_idx])) != num_samples:
            self._tensors[layer_idx] = [self.layer(layer_idx)[:num_samples]]


def _as_half(queries: torch.Tensor) -> torch.Tensor:
    """Return queries as float16. Too long ones are shortened: only their direction counts."""
    longest = queries.abs().amax(dim=-1, keepdim=True).float()
    return (queries.float() / (longest / _LARGEST).clamp(min=1)).half()
