"""One layer's records, as a file has them: the KV heads' parts, then the rest of some heads' keys.

Each head's part has the same size. The rest of a *fine* head's key is what it is beside what its
part decodes to, in 8 bits a number: searches of a few heads, which choose passages, compare keys
that differ by little, and need more digits than attention does.
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
        self._end_of_parts = self._heads * part_bytes
        self._dtype = dtype

    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the records of rows, (n, Hkv, D + Dv) to (n, record_bytes) uint8; errors as the
        coder's."""
        parts = self._coder.encode(rows)
        if not self._fine_heads:
            return parts.flatten(1)
        heads, dim = self._fine_heads, self._layer.head_dim
        coded = self._coder.decode(parts[:, heads], 1, heads)[..., :dim]
        rest = _to_bytes(rows[:, heads, :dim].to(coded) - coded)  # (n, F, rest bytes)
        return torch.cat([parts.flatten(1), rest.flatten(1)], dim=1)

    def span(self, records: torch.Tensor, heads: Heads = None) -> torch.Tensor:
        """Return the rows of records, (n, record_bytes) to (n, h, D + Dv), of `heads` or all."""
        parts = self._parts(records)
        rows = self._coder.decode(parts if heads is None else parts[:, list(heads)], 1, heads)
        for at, rest in self._rests(records, heads):
            rows[:, at, : self._layer.head_dim] += _from_bytes(rest)
        return rows.to(self._dtype)

    def gather(self, records: torch.Tensor, ids: torch.Tensor, heads: Heads = None) -> torch.Tensor:
        """Return rows by id, (h, ...) int64 to (h, ..., D + Dv), of all records; any for -1."""
        rows = self._coder.decode(self._parts_at(records, ids, heads), 0, heads)
        for at, rest in self._rests(records, heads):
            if len(rest):
                rows[at, ..., : self._layer.head_dim] += _from_bytes(rest[ids[at].clamp(min=0)])
        return rows.to(self._dtype)

    def take(self, records: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Return heads' rows by place, id * Hkv + head: (Hkv, ...) to (Hkv, ..., D + Dv)."""
        if not self._fine_heads:
            return self._coder.decode(take_heads(self._parts(records), places), 0)
        return self.gather(records, places // self._heads)

    def _parts(self, records: torch.Tensor) -> torch.Tensor:
        """Return the heads' parts of records, (n, Hkv, part_bytes), not a copy."""
        parts = records[:, : self._end_of_parts]
        return parts.view(len(records), self._heads, self._part_bytes)

    def _parts_at(self, records: torch.Tensor, ids: torch.Tensor, heads: Heads) -> torch.Tensor:
        """Return parts by id, (h, ...) int64 to (h, ..., part_bytes)."""
        parts = self._parts(records)
        if parts.is_contiguous():
            return gather_heads(parts, ids, heads)
        chosen = torch.tensor(list(range(self._heads) if heads is None else heads))
        # Rests lie between parts, so to see all parts in one row would copy the whole file.
        return parts[ids.clamp(min=0), chosen.view(-1, *[1] * (ids.ndim - 1))]

    def _rests(self, records: torch.Tensor, heads: Heads) -> list[tuple[int, torch.Tensor]]:
        """Return of the fine heads among `heads`: the place there, and the rest (n, rest bytes)."""
        chosen = list(range(self._heads) if heads is None else heads)
        size, rests = rest_bytes(self._layer), []
        for number, head in enumerate(self._fine_heads):
            if head in chosen:
                first = self._end_of_parts + number * size
                rests.append((chosen.index(head), records[:, first : first + size]))
        return rests


def rest_bytes(layer: LayerLayout) -> int:
    """Return how many bytes the rest of one head's key takes."""
    return _SCALE_BYTES + layer.head_dim


def _to_bytes(rest: torch.Tensor) -> torch.Tensor:
    """Return (..., D) as a step and multiples of it: (..., 2 + D) uint8."""
    step = (rest.abs().amax(-1, keepdim=True) / _LARGEST).half()
    step = step.clamp(max=torch.finfo(torch.half).max)
    whole = (rest / step.to(rest)).nan_to_num(0.0).round().clamp(-_LARGEST, _LARGEST)
    return torch.cat([step.view(torch.uint8), whole.to(torch.int8).view(torch.uint8)], dim=-1)


def _from_bytes(data: torch.Tensor) -> torch.Tensor:
    """Return what `_to_bytes` was given, nearly: (..., 2 + D) to (..., D) float32.

    Bytes of no row, which a hole in a file has, give numbers, too.
    """
    step = data[..., :_SCALE_BYTES].clone(memory_format=torch.contiguous_format)  # aligned
    step = step.view(torch.half).float().nan_to_num(0.0, 0.0, 0.0)
    return step * data[..., _SCALE_BYTES:].view(torch.int8).float()
