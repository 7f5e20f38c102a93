"""Rows quantised to some bits a number: "int8", "int5.5", "int4".

A key, or a value, is a *centre* plus a residual. The residual is turned into the principal axes of
its head, where each coordinate is divided by its standard deviation and by a scale of this token.
Neighbouring coordinates are coded in pairs, by one of the points that suit two Gaussians. Wide axes
get more bits than narrow ones, and keys more than values. For "int5.5", axes and bits are those
with the least error in the scores that sampled queries give: it is made for passages, where all
rows are attended to; "int8" and "int4" are made for searches, where a key decides whether a row is
found at all.

The centres are the mean and the first few rows that the store got, which decode exactly: in deep
layers those are attention sinks, as small as no other row and attended by every query; the sinks of
later documents are near them.

A record is two bytes, centre and scale of the key and of the value, and the packed codes.

Sources: keys per channel and values per token, KIVI (arXiv 2402.02750); low-rank keys before RoPE,
ShadowKV (2410.21465); first tokens exact, KVQuant (2401.18079); rotation and Gaussian levels,
TurboQuant (2504.19874).
"""

from __future__ import annotations

import functools
import math

import torch

from memory_backends.layout import Heads, LayerLayout
from memory_backends.rows.codecs.bits import BitPacking, gaussian_points, quantise
from memory_backends.rows.codecs.state import NUM_CENTRES, QuantisedState, learn

_SCALE_BYTES = 2
_NUM_STEPS = 51  # a byte is centre * 51 + step; step 0 is a residual of zero
_LOWEST_SCALE, _STEPS_PER_OCTAVE = -3.0, 5.0  # scales 2^-3 to 2^6.8
_KEY_WEIGHT = 16.0  # for search, in token mode: least KL of 1, 4 and 16 on a text
_USUAL_VARIANCE = 4.0  # of scores, where no queries tell: SmolLM2's layers have 0.5 to 13
_ROWS_AT_ONCE = 1024  # what then lies between two operations stays in the processor's cache
_TRIED = (-2, -1, 0, 1, 2, 3)  # steps around the residual's root mean square


class QuantisedCodec:
    """Keep a number in some bits, statistics and all.

    Args:
        name: of the codec.
        bits: of a number; the scales' bytes are part of them, but for 8, which come on top.
        dtype: of the rows that are read.
        for_passages: whether bits follow what queries score, see the module.
    """

    learns = True

    def __init__(
        self, name: str, bits: float, dtype: torch.dtype, *, for_passages: bool = False
    ) -> None:
        self.name = name
        self._bits = bits
        self._dtype = dtype
        self._for_passages = for_passages

    def record_bytes(self, layer: LayerLayout) -> int:
        """Return the size of one token's and KV head's record."""
        if self._bits == 8:
            return _SCALE_BYTES + layer.row_dim
        return max(int(layer.row_dim * self._bits / 8), _SCALE_BYTES + 1)

    def learn(
        self, layer: LayerLayout, rows: torch.Tensor, queries: torch.Tensor | None = None
    ) -> bytes:
        """Return means, axes, variances and widths, learned from (n, Hkv, R) rows."""
        code_bits = self._code_bits(layer)
        if self._for_passages:
            return learn(layer, rows, code_bits, _USUAL_VARIANCE, queries).to_bytes()
        return learn(layer, rows, code_bits, _KEY_WEIGHT).to_bytes()

    def coder(self, layer: LayerLayout, state: bytes) -> QuantisedCoder:
        """Return what encodes and decodes with a state; raise a StoreError for a wrong one."""
        parsed = QuantisedState.from_bytes(state, layer, self._code_bits(layer))
        return QuantisedCoder(layer, parsed, self.record_bytes(layer), self._dtype)

    def _code_bits(self, layer: LayerLayout) -> int:
        return 8 * (self.record_bytes(layer) - _SCALE_BYTES)


class QuantisedCoder:
    """Encodes and decodes one layer; see the module."""

    def __init__(
        self, layer: LayerLayout, state: QuantisedState, record_bytes: int, dtype: torch.dtype
    ) -> None:
        self._dtype = dtype
        self._dims = [layer.head_dim, layer.value_head_dim]
        num_pairs = [math.ceil(dim / 2) for dim in self._dims]
        self._widths = torch.split(state.widths.long(), num_pairs)
        self._packing = BitPacking(state.widths.long(), record_bytes - _SCALE_BYTES)
        self._centres = [  # (Hkv, C, D)
            part.contiguous() for part in torch.split(state.centres, self._dims, dim=-1)
        ]
        self._std = torch.split(state.std, self._dims, dim=-1)  # (Hkv, D)
        self._axes = [  # (Hkv, D, D): coordinates @ it is the residual
            std.unsqueeze(-1) * axes.float()
            for std, axes in zip(self._std, state.axes, strict=True)
        ]
        self._turn_back = [_first_and_second(axes, 1) for axes in self._axes]  # (Hkv, 2P, D)
        steps = torch.arange(_NUM_STEPS, dtype=torch.float32) - 1
        self._scales = torch.exp2(_LOWEST_SCALE + steps / _STEPS_PER_OCTAVE)
        self._scales[0] = 0.0
        chosen = torch.arange(256).clamp(max=NUM_CENTRES * _NUM_STEPS - 1)
        self._scale_of = self._scales[chosen % _NUM_STEPS]  # (256,) by scale byte
        self._centre_of = chosen // _NUM_STEPS  # (256,)
        self._first_centre = torch.arange(layer.num_key_value_heads).unsqueeze(1) * NUM_CENTRES

    @functools.cached_property
    def _turn(self) -> list[torch.Tensor]:
        """The residual @ it is the coordinates, first and second of pairs: (Hkv, D, 2P)."""
        inverses = [torch.linalg.inv(axes.double()).float() for axes in self._axes]
        return [_first_and_second(inverse, 2) for inverse in inverses]

    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the records of rows: (n, Hkv, R) to (n, Hkv, record_bytes) uint8."""
        chunks = torch.split(rows.detach().float().cpu(), _ROWS_AT_ONCE)
        return torch.cat([self._encode(chunk) for chunk in chunks]).to(rows.device)

    def _encode(self, rows: torch.Tensor) -> torch.Tensor:
        num_rows, num_heads, _ = rows.shape
        by_head = rows.transpose(0, 1)  # (Hkv, n, R)
        coded = [
            self._encode_part(part, numbers)
            for part, numbers in enumerate(torch.split(by_head, self._dims, dim=-1))
        ]
        packed = self._packing.pack(torch.cat([places for _, places in coded]))
        scales = torch.stack([scale for scale, _ in coded]).to(torch.uint8)
        records = torch.cat([scales, packed])  # (record_bytes, Hkv * n)
        return records.view(len(records), num_heads, num_rows).permute(2, 1, 0).contiguous()

    def _encode_part(self, part: int, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scale bytes (Hkv * n,) and places of points (P, Hkv * n)."""
        widths = self._widths[part]
        centre = torch.cdist(numbers, self._centres[part]).argmin(-1)  # (Hkv, n)
        coordinates = (numbers - self._centre(part, centre, slice(None))) @ self._turn[part]
        coordinates = coordinates.movedim(-1, 0).reshape(2, len(widths), -1)  # (2, P, Hkv * n)
        centre = centre.flatten()
        variances = _first_and_second(self._std[part].square(), 1).T.reshape(2, len(widths), -1)
        variances = variances.repeat_interleave(numbers.shape[1], dim=2)  # (2, P, Hkv * n)
        radius = torch.hypot(*coordinates)
        turn = (torch.atan2(coordinates[1], coordinates[0]) / (2 * math.pi)).remainder_(1.0)
        used = radius[widths > 0] if bool((widths > 0).any()) else radius
        size = (used.square().mean(0) / 2).sqrt().clamp(min=1e-9)
        nearest = ((size.log2() - _LOWEST_SCALE) * _STEPS_PER_OCTAVE + 1).round()
        nearest = nearest.clamp(1, _NUM_STEPS - 1).long()
        best_error = (coordinates.square() * variances).sum((0, 1))  # step 0: the centre itself
        best_step = torch.zeros_like(centre)
        best_places = quantise(torch.zeros_like(radius), torch.zeros_like(turn), widths)
        for tried in _TRIED:
            step = (nearest + tried).clamp(1, _NUM_STEPS - 1)
            scale = self._scales[step]
            places = quantise(radius / scale, turn, widths)
            error = torch.addcmul(coordinates, _points(places), scale, value=-1.0)
            error = (error.square_() * variances).sum((0, 1))
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_step = torch.where(better, step, best_step)
            best_places = torch.where(better, places, best_places)
        return centre * _NUM_STEPS + best_step, best_places

    def decode(self, records: torch.Tensor, head_axis: int, heads: Heads = None) -> torch.Tensor:
        """Return the rows of records: (..., record_bytes) to (..., R)."""
        by_head = records.cpu().movedim(head_axis, 0)
        heads_first = by_head.shape[:-1]
        flat = (
            by_head.flatten(1, -2) if by_head.ndim > 2 else by_head.unsqueeze(1)
        )  # (Hkv, m, record_bytes)
        rows = torch.empty(*flat.shape[:2], sum(self._dims), dtype=self._dtype)
        for some, out in zip(
            torch.split(flat, _ROWS_AT_ONCE, dim=1),
            torch.split(rows, _ROWS_AT_ONCE, dim=1),
            strict=True,
        ):
            self._decode(some, out, slice(None) if heads is None else list(heads))
        return rows.view(*heads_first, rows.shape[-1]).movedim(0, head_axis).to(records.device)

    def _decode(self, records: torch.Tensor, out: torch.Tensor, heads: slice | list[int]) -> None:
        num_heads, num_records, _ = records.shape
        columns = records.permute(2, 0, 1).flatten(1)  # (record_bytes, Hkv * m)
        chosen = columns[:_SCALE_BYTES].int().flatten()
        scales = self._scale_of.index_select(0, chosen).view(_SCALE_BYTES, num_heads, num_records)
        centres = self._centre_of.index_select(0, chosen).view(scales.shape)
        places = self._packing.unpack(columns[_SCALE_BYTES:])
        points = _points(places).view(2, len(places), num_heads, num_records)  # (2, pairs, Hkv, m)
        limit = torch.finfo(self._dtype).max
        for part, numbers in enumerate(torch.split(points, [len(w) for w in self._widths], dim=1)):
            coordinates = (numbers * scales[part]).flatten(0, 1).permute(1, 2, 0)  # (Hkv, m, 2P)
            centre = self._centre(part, centres[part], heads)
            turn_back = self._turn_back[part][heads]
            decoded = torch.baddbmm(centre, coordinates, turn_back)  # (Hkv, m, D)
            torch.split(out, self._dims, dim=-1)[part].copy_(decoded.clamp_(-limit, limit))

    def _centre(self, part: int, which: torch.Tensor, heads: slice | list[int]) -> torch.Tensor:
        """Return centres by number: (Hkv, m) to (Hkv, m, D)."""
        centres = self._centres[part]
        at = which + self._first_centre[heads]
        chosen = centres.flatten(0, 1).index_select(0, at.flatten())
        return chosen.view(*which.shape, centres.shape[-1])


def _points(places: torch.Tensor) -> torch.Tensor:
    """Return the first and second number of points by place, (P, n) to (2, P, n)."""
    table = gaussian_points()
    points = table.new_empty(2, places.numel())
    for numbers, out in zip(table, points, strict=True):  # faster than along dim 1 of both
        torch.index_select(numbers, 0, places.flatten(), out=out)
    return points.view(2, *places.shape)


def _first_and_second(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """Put the first numbers of all pairs along `dim` before the second ones: D to 2P.

    A last number without another is paired with zeros.
    """
    if tensor.shape[dim] % 2:
        tensor = torch.cat([tensor, torch.zeros_like(tensor.narrow(dim, 0, 1))], dim)
    places = torch.arange(tensor.shape[dim]).view(-1, 2).T.flatten()
    return tensor.index_select(dim, places)
