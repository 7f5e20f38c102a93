"""Pairs of numbers as codes of 0 to 16 bits, and codes of mixed widths packed into bytes.

A pair of Gaussian numbers is coded by a point on one of many rings. Points in a plane are nearer to
what they stand for than as many points of a grid: at the same error they save a fifth of a bit a
number, and a pair may have an odd number of bits.
"""

from __future__ import annotations

import functools
import math

import torch
import numpy as np
import numpy.typing as npt

MAX_BITS = 16  # of a pair

_WIDTHS = range(MAX_BITS + 1)
_QUANTILES = 20_001
_ROUNDS = 20
_CELLS, _REACH = 4096, 7.0  # a grid of radii from 0 to 7: a number finds its ring without a search


@functools.cache
def rings(width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rings of 2^width points that code a pair with the least squared error, nearly.

    Returns:
        How many points each ring has, and its radius: (K,) float64 each, the innermost first.

    Source:
        Points lie as dense as the square root of the density that they code, Zador (1982); rings
        then have the radii of Wilson, Magnitude/phase quantization of independent Gaussian
        variates (1980): each the mean over its pairs, of which 2^width = 2 and 4 are the scalar
        levels of Max (1960).
    """
    num_points = 2**width
    num_rings = max(1, round(math.sqrt(num_points / 2)))
    edge, radius = (
        2 * torch.special.ndtri(((torch.arange(num_rings).double() + at) / num_rings + 1) / 2)
        for at in (0.0, 0.5)
    )
    points_inside = (num_points * (1 - torch.exp(-edge.square() / 4))).round()
    counts = torch.diff(points_inside, append=torch.tensor([num_points]).double())
    sample = _radius_sample()
    for _ in range(_ROUNDS):
        ring = torch.bucketize(sample, _borders(counts, radius))
        size = torch.bincount(ring, minlength=num_rings)
        total = torch.bincount(ring, sample, minlength=num_rings)
        centred = torch.sinc(1 / counts) * total / size.clamp(min=1)  # mean over ring and phase
        radius = torch.where(size > 0, centred, radius)
    return counts, radius


@functools.cache
def gaussian_points() -> torch.Tensor:
    """Return the points of all widths, (2, 2^(MAX_BITS + 1) - 1) float32.

    Widths come one after the other; width w starts at 2^w - 1.
    """
    parts = []
    for width in _WIDTHS:
        for count, radius in zip(*rings(width), strict=True):
            angle = torch.arange(int(count)).double() * (2 * math.pi / count)
            parts.append(radius * torch.stack([angle.cos(), angle.sin()]))
    return torch.cat(parts, dim=1).float()


@functools.cache
def distortions() -> npt.NDArray[np.float64]:
    """Return the mean squared error of a unit Gaussian number at each width, (MAX_BITS + 1,)."""
    sample, errors = _radius_sample(), []
    for width in _WIDTHS:
        counts, radius = rings(width)
        ring = torch.bucketize(sample, _borders(counts, radius))
        pull = radius * torch.sinc(1 / counts)
        error = sample.square() - 2 * sample * pull[ring] + radius.square()[ring]
        errors.append(float(error.mean() / 2))
    return np.array(errors)


def allocate(variances: npt.NDArray[np.float64], budget: int) -> npt.NDArray[np.uint8]:
    """Give each pair the bits that make the sum of squared errors least.

    Args:
        variances: (P,), the variances of each pair times what an error in it costs.
        budget: bits for all of them.

    Returns:
        (P,) widths of 0 to MAX_BITS, `budget` in all, or MAX_BITS each if that is less.

    Source:
        Reverse water-filling, Cover and Thomas, Elements of Information Theory, section 10.3.3; one
        bit at a time, for whole bits.
    """
    gains = np.append(distortions()[:-1] - distortions()[1:], 0.0)
    widths = np.zeros(len(variances), dtype=np.int64)
    for _ in range(min(budget, MAX_BITS * len(variances))):
        gain = np.where(widths < MAX_BITS, variances * gains[widths], -1.0)
        widths[gain.argmax()] += 1
    return widths.astype(np.uint8)


@functools.cache
def _ring_tables() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the nearest ring for each width and cell of a grid of radii, and of each ring of all
    widths how many points it has, float32, and the place of the first one."""
    middles = (torch.arange(_CELLS).double() + 0.5) * _REACH / _CELLS
    nearest, counts, num_rings = [], [], 0
    for width in _WIDTHS:
        own, radius = rings(width)
        nearest.append(torch.bucketize(middles, _borders(own, radius)) + num_rings)
        counts.append(own)
        num_rings += len(own)
    points = torch.cat(counts)
    return torch.cat(nearest), points.float(), (points.cumsum(0) - points).long()


def quantise(radius: torch.Tensor, turn: torch.Tensor, widths: torch.Tensor) -> torch.Tensor:
    """Return the place of the point for each pair, but for 1/600 of its radius.

    Pairs are (P, n) float32: radius, and angle in turns, from 0 to 1. Widths are (P,) int64, and
    places (P, n) int64.
    """
    nearest, counts, first_place = _ring_tables()
    cell = radius.mul(_CELLS / _REACH).clamp_(0, _CELLS - 1).long()
    cell += (widths * _CELLS).unsqueeze(-1)
    ring = nearest.index_select(0, cell.flatten())
    count = counts.index_select(0, ring)
    phase = (turn.flatten() * count).round_().remainder_(count)
    return (first_place.index_select(0, ring) + phase.long()).view(radius.shape)


class BitPacking:
    """Codes of fixed `widths`, one after the other, the low bit first, in `num_bytes` for all.

    Records are columns here: an operation on one code of all records then reads memory in order.
    """

    def __init__(self, widths: torch.Tensor, num_bytes: int) -> None:
        first_bit = widths.cumsum(0) - widths
        # All of one dtype: torch takes ten times as long to combine two.
        self._first = (2**widths - 1).int().unsqueeze(-1)  # place of a width's first point; a mask
        self._byte = (first_bit // 8).clamp(max=num_bytes - 1)
        self._shift = (first_bit % 8).int().unsqueeze(-1)
        self._num_bytes = num_bytes

    def pack(self, places: torch.Tensor) -> torch.Tensor:
        """Return codes as bytes: (P, n) places of points to (num_bytes, n) uint8."""
        words = (places.int() - self._first) << self._shift  # 23 bits at most
        packed = words.new_zeros(self._num_bytes + 2, words.shape[1])
        for byte in range(3):
            packed.index_add_(0, self._byte + byte, (words >> 8 * byte) & 0xFF)
        return packed[:-2].to(torch.uint8)

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """Return what `pack` was given: (num_bytes, n) uint8 to (P, n) int32."""
        single = packed.int()
        words = single.clone()
        words[:-1].add_(single[1:], alpha=2**8)  # ten times as fast as shifts
        words[:-2].add_(single[2:], alpha=2**16)  # what is above bit 23 is no code's
        codes = words.index_select(0, self._byte)
        return codes.bitwise_right_shift_(self._shift).bitwise_and_(self._first).add_(self._first)


def _radius_sample() -> torch.Tensor:
    """Return quantiles of the length of a pair of unit Gaussians, (_QUANTILES,) float64."""
    return (-2 * torch.log1p(-(torch.arange(_QUANTILES).double() + 0.5) / _QUANTILES)).sqrt()


def _borders(counts: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """Return the radii between rings where both have the same error, on average over angles."""
    pull = radius * torch.sinc(1 / counts)
    return radius.square().diff() / (2 * pull.diff())
