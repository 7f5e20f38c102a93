"""One layer's records, as a file has them: the KV heads' parts, then the rest of some heads' keys.

Each part has the same size. A *fine* head has one or more parts beyond those of the KV heads: what
its key is beside what its own part decodes to, in 8 bits a number. Searches of a few heads, which
choose passages, compare keys that differ by little, and need more digits than attention does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from memory_backends.layout import Heads, LayerLayout
from memory_backends.rows.base import gather_heads, take_heads
from memory_backends.rows.codecs import LayerCoder

_SCALE_BYTES = 2  # float16: the step of a key's rest
_LARGEST = 127  # of a number of the rest, in steps


class LayerRecords:
    """Rows of one layer to records, and back.

    Args:
        coder: makes a head's part.
        layer: the shape of the layer's rows.
        part_bytes: the size of a part.
        fine_heads: ascending KV heads whose keys' rest is kept.
        dtype: of the rows that are read.
    """

    def __init__(
        self,
        coder: LayerCoder,
        layer: LayerLayout,
        part_bytes: int,
        fine_heads: Sequence[int] = (),
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._coder = coder
        self._layer = layer
        self._heads = layer.num_key_value_heads
        self._part_bytes = part_bytes
        self._fine_heads = list(fine_heads)
        self._num_extra = num_extra_parts(layer, part_bytes)
        self._dtype = dtype

    @property
    def _num_parts(self) -> int:
        return self._heads + len(self._fine_heads) * self._num_extra

    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the records of rows, (n, Hkv, D + Dv) to (n, record_bytes) uint8; errors as the
        coder's."""
        parts = self._coder.encode(rows)
        if not self._fine_heads:
            return parts.flatten(1)
        heads, dim = self._fine_heads, self._layer.head_dim
        coded = self._coder.decode(parts[:, heads], 1, heads)[..., :dim]
        rest = self._rest_to_bytes(rows[:, heads, :dim].to(coded) - coded)  # (n, F, extra bytes)
        return torch.cat([parts.flatten(1), rest.flatten(1)], dim=1)

    def span(self, records: torch.Tensor, heads: Heads = None) -> torch.Tensor:
        """Return the rows of records, (n, record_bytes) to (n, h, D + Dv), of `heads` or all."""
        parts = self._parts(records)
        chosen = list(range(self._heads) if heads is None else heads)
        own = parts[:, chosen] if heads is not None else parts[:, : self._heads]
        rows = self._coder.decode(own, 1, heads)
        for at, first in self._fine_among(chosen):
            rest = parts[:, first : first + self._num_extra].flatten(1)
            rows[:, at, : self._layer.head_dim] += self._rest_of(rest)
        return rows.to(self._dtype)

    def gather(self, records: torch.Tensor, ids: torch.Tensor, heads: Heads = None) -> torch.Tensor:
        """Return rows by id, (h, ...) int64 to (h, ..., D + Dv), of all records; any for -1."""
        chosen = list(range(self._heads) if heads is None else heads)
        parts = self._parts(records)
        rows = self._coder.decode(gather_heads(parts, ids, chosen), 0, heads)
        return self._refined(rows, parts, ids, chosen)

    def take(self, records: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Return heads' rows by place, id * Hkv + head: (Hkv, ...) to (Hkv, ..., D + Dv)."""
        parts = self._parts(records)
        if not self._fine_heads:
            return self._coder.decode(take_heads(parts, places), 0)
        return self.gather(records, places // self._heads)

    def _parts(self, records: torch.Tensor) -> torch.Tensor:
        return records.view(len(records), self._num_parts, self._part_bytes)

    def _fine_among(self, chosen: list[int]) -> list[tuple[int, int]]:
        """Return (place in `chosen`, first extra part) of the fine heads among those chosen."""
        return [
            (chosen.index(head), self._heads + number * self._num_extra)
            for number, head in enumerate(self._fine_heads)
            if head in chosen
        ]

    def _refined(
        self, rows: torch.Tensor, parts: torch.Tensor, ids: torch.Tensor, chosen: list[int]
    ) -> torch.Tensor:
        """Add the rest to the keys of fine heads, of rows (h, ..., D + Dv) gathered by id."""
        for at, first in self._fine_among(chosen):
            extra = list(range(first, first + self._num_extra))
            rest = gather_heads(parts, ids[at].expand(len(extra), *ids[at].shape), extra)
            rest = rest.movedim(0, -2).flatten(-2)  # (..., extra bytes)
            rows[at, ..., : self._layer.head_dim] += self._rest_of(rest)
        return rows.to(self._dtype)

    def _rest_to_bytes(self, rest: torch.Tensor) -> torch.Tensor:
        """Return (n, F, D) as step and whole steps: (n, F, extra parts * part_bytes) uint8."""
        step = (rest.abs().amax(-1, keepdim=True) / _LARGEST).half()
        step = step.clamp(max=torch.finfo(torch.half).max)
        whole = (rest / step.to(rest)).nan_to_num(0.0).round().clamp(-_LARGEST, _LARGEST)
        size = self._num_extra * self._part_bytes
        found = rest.new_zeros(*rest.shape[:-1], size, dtype=torch.uint8)
        found[..., :_SCALE_BYTES] = step.view(torch.uint8)
        found[..., _SCALE_BYTES : _SCALE_BYTES + rest.shape[-1]] = whole.to(torch.int8).view(
            torch.uint8
        )
        return found

    def _rest_of(self, data: torch.Tensor) -> torch.Tensor:
        """Return what `_rest_to_bytes` was given, nearly: (..., bytes) to (..., D) float32.

        Bytes of no row, which a hole in a file has, give numbers, too.
        """
        step = data[..., :_SCALE_BYTES].clone(memory_format=torch.contiguous_format)  # aligned
        whole = data[..., _SCALE_BYTES : _SCALE_BYTES + self._layer.head_dim]
        step = step.view(torch.half).float().nan_to_num(0.0, 0.0, 0.0)
        return step * whole.contiguous().view(torch.int8).float()


def num_extra_parts(layer: LayerLayout, part_bytes: int) -> int:
    """Return how many parts the rest of one head's keys takes."""
    return -(-(_SCALE_BYTES + layer.head_dim) // part_bytes)
