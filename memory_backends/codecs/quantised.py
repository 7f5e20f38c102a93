"""Rows in 8 or 4 bits a number: "int8", "int4".

A key, or a value, is a *centre* plus a residual. The residual is turned into the principal axes of
its head, where each coordinate is divided by its standard deviation and by a scale of this token,
and coded by one of the levels that suit a Gaussian. Wide axes get more bits than narrow ones, and
keys more than values. The centres are the mean and the first few rows that the store got, which
decode exactly: in deep layers those are attention sinks, as small as no other row and attended by
every query; the sinks of later documents are near them.

A record is two bytes, centre and scale of the key and of the value, and the packed codes.

Sources: keys per channel and values per token, KIVI (arXiv 2402.02750); low-rank keys before RoPE,
ShadowKV (2410.21465); first tokens exact, KVQuant (2401.18079); rotation and Gaussian levels,
TurboQuant (2504.19874).
"""

from __future__ import annotations

import torch

from memory_backends.codecs.bits import BitPacking, quantise
from memory_backends.codecs.state import NUM_CENTRES, QuantisedState, learn
from memory_backends.layout import LayerLayout

_SCALE_BYTES = 2
_NUM_STEPS = 51  # a byte is centre * 51 + step; step 0 is a residual of zero
_LOWEST_SCALE, _STEPS_PER_OCTAVE = -3.0, 5.0  # scales 2^-3 to 2^6.8
_TRIED = (-2, -1, 0, 1, 2, 3)  # steps around the residual's root mean square


class QuantisedCodec:
    """Keep a number in 8 or 4 bits, statistics and all.

    Args:
        name: the name in the configuration.
        bits: 8, which takes two bytes a record more, or 4, which takes no more than 4 bits.
        dtype: the dtype of the memory's rows, which `decode` gives back.
    """

    def __init__(self, name: str, bits: int, dtype: torch.dtype) -> None:
        self.name = name
        self._bits = bits
        self._dtype = dtype

    def record_bytes(self, layer: LayerLayout) -> int:
        """Return the size of one token's and KV head's record."""
        if self._bits == 8:
            return _SCALE_BYTES + layer.row_dim
        return max(layer.row_dim * self._bits // 8, _SCALE_BYTES + 1)

    def learn(self, layer: LayerLayout, rows: torch.Tensor) -> bytes:
        """Return means, axes, variances and widths, learned from (n, Hkv, R) rows."""
        return learn(layer, rows, self._code_bits(layer)).to_bytes()

    def coder(self, layer: LayerLayout, state: bytes) -> QuantisedCoder:
        """Return what encodes and decodes with a state.

        Raises:
            StoreError: the state is not one of this codec and this layer.
        """
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
        self._dims = (layer.head_dim, layer.value_head_dim)
        self._levels = state.levels
        self._widths = state.widths.long()
        self._packing = BitPacking(self._widths, record_bytes - _SCALE_BYTES)
        self._centres = state.centres.split(self._dims, dim=-1)  # (Hkv, C, D)
        self._std = state.std.split(self._dims, dim=-1)  # (Hkv, D)
        self._turn_back = [  # (Hkv, D, D): coordinates @ it is the residual
            std.unsqueeze(-1) * axes.float()
            for std, axes in zip(self._std, state.axes, strict=True)
        ]
        self._turn = [torch.linalg.inv(back.double()).float() for back in self._turn_back]
        steps = torch.arange(_NUM_STEPS, dtype=torch.float32) - 1
        self._scales = torch.exp2(_LOWEST_SCALE + steps / _STEPS_PER_OCTAVE)
        self._scales[0] = 0.0

    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the records of rows: (n, Hkv, R) to (n, Hkv, record_bytes) uint8."""
        by_head = rows.detach().float().cpu().transpose(0, 1)  # (Hkv, n, R)
        widths = self._widths.split(self._dims)
        scales, places = [], []
        for part, numbers in enumerate(by_head.split(self._dims, dim=-1)):
            scale, place = self._encode_part(part, numbers, widths[part])
            scales.append(scale)
            places.append(place)
        packed = self._packing.pack(torch.cat(places, dim=-1))
        records = torch.cat([torch.stack(scales, dim=-1).to(torch.uint8), packed], dim=-1)
        return records.transpose(0, 1).contiguous().to(rows.device)

    def _encode_part(
        self, part: int, numbers: torch.Tensor, widths: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scale bytes (Hkv, n) and places in the levels (Hkv, n, D)."""
        centre = torch.cdist(numbers, self._centres[part]).argmin(-1)  # (Hkv, n)
        coordinates = (numbers - self._centre(part, centre)) @ self._turn[part]
        coded = coordinates[..., widths > 0]
        size = coded.square().mean(-1).sqrt() if coded.shape[-1] else coordinates.norm(dim=-1)
        nearest = ((size.log2() - _LOWEST_SCALE) * _STEPS_PER_OCTAVE + 1).round()
        nearest = nearest.nan_to_num(neginf=1.0).clamp(1, _NUM_STEPS - 1).long()
        variances = self._std[part].square().unsqueeze(1)  # (Hkv, 1, D)
        best_error = torch.where(
            centre > 0, (coordinates.square() * variances).sum(-1), torch.inf
        )  # step 0: the centre itself; the mean is not a row
        best_step = torch.zeros_like(centre)
        best_place = quantise(torch.zeros_like(coordinates), widths, self._levels)
        for tried in _TRIED:
            step = (nearest + tried).clamp(1, _NUM_STEPS - 1)
            scale = self._scales[step].unsqueeze(-1)
            place = quantise(coordinates / scale, widths, self._levels)
            error = coordinates - self._levels[place] * scale
            error = (error.square() * variances).sum(-1)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_step = torch.where(better, step, best_step)
            best_place = torch.where(better.unsqueeze(-1), place, best_place)
        return centre * _NUM_STEPS + best_step, best_place

    def decode(self, records: torch.Tensor, head_axis: int) -> torch.Tensor:
        """Return the rows of records: (..., record_bytes) to (..., R)."""
        by_head = records.cpu().movedim(head_axis, 0)
        heads_first = by_head.shape[:-1]
        flat = by_head.reshape(heads_first[0], -1, by_head.shape[-1])  # (Hkv, m, record_bytes)
        chosen = flat[..., :_SCALE_BYTES].long().clamp(max=NUM_CENTRES * _NUM_STEPS - 1)
        numbers = self._levels[self._packing.unpack(flat[..., _SCALE_BYTES:])]  # (Hkv, m, R)
        parts = []
        for part, coordinates in enumerate(numbers.split(self._dims, dim=-1)):
            scale = self._scales[chosen[..., part] % _NUM_STEPS].unsqueeze(-1)
            residual = (coordinates * scale) @ self._turn_back[part]
            parts.append(residual + self._centre(part, chosen[..., part] // _NUM_STEPS))
        limit = torch.finfo(self._dtype).max
        rows = torch.cat(parts, dim=-1).clamp(-limit, limit).to(self._dtype)
        return rows.view(*heads_first, rows.shape[-1]).movedim(0, head_axis).to(records.device)

    def _centre(self, part: int, which: torch.Tensor) -> torch.Tensor:
        """Return centres by number: (Hkv, m) to (Hkv, m, D)."""
        centres = self._centres[part]
        num_heads, num_centres, dim = centres.shape
        heads = torch.arange(num_heads).unsqueeze(1) * num_centres
        return centres.reshape(-1, dim)[which + heads]
