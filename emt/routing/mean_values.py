"""The mean values of a memory's runs of rows: brought up to date, and kept in its store.

Means are rounded to 16 bits a number where they are computed, not where they are kept: what is
found does not depend on whether they were kept.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
import numpy.typing as npt

from emt.routing.runs import Runs, num_runs
from memory_backends import MemoryBackend
from memory_backends.catalog import Catalog
from memory_backends.layout import Float32Array, Int64Array

DIMS = 128  # that are kept of a layer's mean values
_NAME = "mean-values"
_HEADER_BYTES = 1024
_FORMAT = 1


@dataclass(frozen=True, eq=False)
class MeanValues:
    """Mean values of some documents' runs.

    Attributes:
        layers: l layers, ascending.
        documents: (d, 3) int64: of each document the first row, ascending, how many rows it has,
            and one checksum of all its records in the store.
        scales: (l, r) float32, the largest number of each mean.
        halves: (l, r, 128) float16, the means as shares of it.
    """

    layers: tuple[int, ...]
    documents: Int64Array
    scales: Float32Array
    halves: npt.NDArray[np.float16]

    @classmethod
    def none(cls, layers: Sequence[int]) -> Self:
        """Return those of no documents."""
        halves = np.zeros((len(layers), 0, DIMS), dtype=np.float16)
        return cls(
            tuple(layers), np.zeros((0, 3), dtype=np.int64), halves[..., 0].astype("f4"), halves
        )

    @cached_property
    def runs(self) -> Runs:
        """The r runs of all documents."""
        return Runs.of(dict(self.documents[:, :2].tolist()))

    @property
    def means(self) -> Float32Array:
        """(l, r, 128) float32, the means."""
        return self.halves.astype(np.float32) * self.scales[..., None]

    def brought_to(
        self, documents: Int64Array, compute: Callable[[Runs], Float32Array]
    ) -> MeanValues:
        """Return those of other documents, of which only the means of new ones are computed.

        `compute` gives the means (l, n, 128) float32 of n runs.
        """
        counts, own_counts = num_runs(documents[:, 1]), num_runs(self.documents[:, 1])
        at = np.searchsorted(self.documents[:, 0], documents[:, 0])
        is_kept = at < len(self.documents)
        is_kept[is_kept] = (self.documents[at[is_kept]] == documents[is_kept]).all(axis=1)
        # A document's runs stand one after another, here as there.
        begins, own_begins = counts.cumsum() - counts, own_counts.cumsum() - own_counts
        moved = np.repeat(own_begins[at[is_kept]] - begins[is_kept], counts[is_kept])
        is_known = np.repeat(is_kept, counts)
        source = np.flatnonzero(is_known) + moved
        size = (len(self.layers), len(is_known))
        scales = np.empty(size, dtype=np.float32)
        halves = np.empty((*size, DIMS), dtype=np.float16)
        scales[:, is_known], halves[:, is_known] = self.scales[:, source], self.halves[:, source]
        brought = MeanValues(self.layers, documents, scales, halves)
        means = compute(brought.runs.among(~is_known))
        largest = np.abs(means).max(axis=-1, initial=0)
        scales[:, ~is_known] = largest
        shares = np.divide(
            means, largest[..., None], out=np.zeros_like(means), where=largest[..., None] > 0
        )
        halves[:, ~is_known] = shares
        return brought

    # -- in a store ---------------------------------------------------------------------------

    @classmethod
    def read(cls, backend: MemoryBackend, layers: Sequence[int]) -> Self | None:
        """Return what a store keeps; None if it keeps none of these layers, or they are damaged."""
        data = backend.read_derived(_NAME)
        if data is None or len(data) < _HEADER_BYTES:
            return None
        try:
            header = json.loads(bytes(data[:_HEADER_BYTES]))
            num_documents, size = int(header["documents"]), (len(layers), int(header["runs"]))
        except (ValueError, KeyError, TypeError):
            return None
        if header != _header(layers, num_documents, size[1]):
            return None
        parts, start = [], _HEADER_BYTES
        for dtype, shape in (("<i8", (num_documents, 3)), ("<f4", size), ("<f2", (*size, DIMS))):
            count = int(np.prod(shape, dtype=object))
            stop = start + count * int(dtype[-1])
            if count < 0 or stop > len(data):
                return None
            parts.append(np.frombuffer(data[start:stop], dtype=dtype).reshape(shape))
            start = stop
        documents, scales, halves = parts
        first_rows, counts = documents[:, 0], num_runs(documents[:, 1])
        if (np.diff(first_rows) <= 0).any() or (counts < 1).any() or counts.sum() != size[1]:
            return None
        return cls(tuple(layers), documents, scales, halves)

    def write(self, backend: MemoryBackend) -> None:
        """Keep them in the store of a memory, in the place of those before."""
        header = json.dumps(_header(self.layers, len(self.documents), self.halves.shape[1]))
        arrays = (
            self.documents.astype("<i8"),
            self.scales.astype("<f4"),
            self.halves.astype("<f2"),
        )
        parts = [np.ascontiguousarray(array).reshape(-1).view(np.uint8).data for array in arrays]
        backend.write_derived(_NAME, [header.ljust(_HEADER_BYTES).encode(), *parts])


def documents_of(catalog: Catalog) -> Int64Array:
    """Return the documents of a memory as `MeanValues.documents` has them."""
    spans = [
        (span.first, span.stop - span.first, zlib.crc32(repr(span.row_crc32).encode()))
        for span in catalog.record_spans()
    ]
    return np.array(spans, dtype=np.int64).reshape(-1, 3)


def _header(layers: Sequence[int], num_documents: int, num_of_runs: int) -> dict[str, object]:
    return {
        "format": _FORMAT,
        "layers": list(layers),
        "dims": DIMS,
        "documents": num_documents,
        "runs": num_of_runs,
    }
