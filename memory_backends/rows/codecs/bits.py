"""Numbers of unit variance as codes of 0 to 8 bits, and codes of mixed widths packed into bytes."""

from __future__ import annotations

import functools

import torch
import numpy as np
import numpy.typing as npt

MAX_BITS = 8
NUM_LEVELS = 2 ** (MAX_BITS + 1) - 1  # of all widths together: 1 + 2 + 4 + ... + 256

_QUANTILES = 20_001
_ROUNDS = 100
_CELLS, _REACH = 2048, 5.0  # a grid over -5 to 5: a number finds its level without a search


@functools.cache
def gaussian_levels() -> torch.Tensor:
    """Return the levels that code a unit Gaussian with the least squared error.

    Returns:
        (NUM_LEVELS,) float32, widths 0 to MAX_BITS one after the other; width w starts at 2^w - 1.

    Source:
        Max, Quantizing for minimum distortion (1960); Lloyd (1982). TurboQuant (arXiv 2504.19874)
        uses them on rotated keys and values, whose coordinates are nearly Gaussian.
    """
    sample = _gaussian_sample()
    parts = []
    for width in range(MAX_BITS + 1):
        num = 2**width
        start = 3**0.5 * torch.special.ndtri((torch.arange(num, dtype=torch.float64) + 0.5) / num)
        levels = start.clamp(sample[0], sample[-1])  # right for many levels: Panter and Dite (1951)
        for _ in range(_ROUNDS):
            cell = torch.bucketize(sample, _borders(levels))
            count = torch.zeros_like(levels).index_add_(0, cell, torch.ones_like(sample))
            total = torch.zeros_like(levels).index_add_(0, cell, sample)
            levels = torch.where(count > 0, total / count.clamp(min=1), levels)
        parts.append(levels)
    return torch.cat(parts).float()


@functools.cache
def distortions() -> npt.NDArray[np.float64]:
    """Return the mean squared error of a unit Gaussian at each width, (MAX_BITS + 1,)."""
    sample = _gaussian_sample().float()
    errors = []
    for width in range(MAX_BITS + 1):
        levels = levels_of_width(gaussian_levels(), width)
        nearest = levels[torch.bucketize(sample, _borders(levels))]
        errors.append(float((sample - nearest).double().square().mean()))
    return np.array(errors)


def levels_of_width(levels: torch.Tensor, width: int) -> torch.Tensor:
    """Return the 2^width levels of one width, ascending."""
    return levels[2**width - 1 : 2 ** (width + 1) - 1]


def allocate(variances: npt.NDArray[np.float64], budget: int) -> npt.NDArray[np.uint8]:
    """Give each number the bits that make the sum of squared errors least.

    Args:
        variances: (R,), each number's variance times what an error in it costs.
        budget: bits for all of them.

    Returns:
        (R,) widths of 0 to MAX_BITS, `budget` in all, or MAX_BITS each if that is less.

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
def _nearest_places() -> torch.Tensor:
    """Return, for each width and cell of a grid, the place of the level nearest to its middle."""
    middles = (torch.arange(_CELLS, dtype=torch.float64) + 0.5) * 2 * _REACH / _CELLS - _REACH
    parts = []
    for width in range(MAX_BITS + 1):
        borders = _borders(levels_of_width(gaussian_levels(), width)).double()
        parts.append(torch.bucketize(middles, borders) + 2**width - 1)
    return torch.cat(parts)


def quantise(numbers: torch.Tensor, widths: torch.Tensor) -> torch.Tensor:
    """Return the place in the levels of the one nearest to each number, but for 1/400.

    Numbers are (R, n) float32, widths (R,) int64, and places (R, n) int64.
    """
    first = (widths * _CELLS).unsqueeze(-1)
    cells = (numbers + _REACH).mul_(_CELLS / (2 * _REACH)).clamp_(0, _CELLS - 1).long() + first
    return _nearest_places().index_select(0, cells.flatten()).view(cells.shape)


class BitPacking:
    """Codes of fixed `widths`, one after the other, the low bit first, in `num_bytes` for all.

    Records are columns here: an operation on one code of all records then reads memory in order.
    """

    def __init__(self, widths: torch.Tensor, num_bytes: int) -> None:
        first_bit = widths.cumsum(0) - widths
        # All of one dtype: torch takes ten times as long to combine two.
        self._first = (2**widths - 1).int().unsqueeze(-1)  # place of a width's first level; a mask
        self._byte = (first_bit // 8).clamp(max=num_bytes - 1)
        self._shift = (first_bit % 8).int().unsqueeze(-1)
        self._num_bytes = num_bytes

    def pack(self, places: torch.Tensor) -> torch.Tensor:
        """Return codes as bytes: (R, n) places in the levels to (num_bytes, n) uint8."""
        words = (places.int() - self._first) << self._shift  # 15 bits at most
        packed = words.new_zeros(self._num_bytes + 1, words.shape[1])
        packed.index_add_(0, self._byte, words & 0xFF)
        packed.index_add_(0, self._byte + 1, words >> 8)
        return packed[:-1].to(torch.uint8)

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """Return what `pack` was given: (num_bytes, n) uint8 to (R, n) int32."""
        words = packed.int()
        words[:-1] |= words[1:] << 8  # what is above bit 15 is no code's
        codes = words.index_select(0, self._byte)
        return codes.bitwise_right_shift_(self._shift).bitwise_and_(self._first).add_(self._first)


def _gaussian_sample() -> torch.Tensor:
    probabilities = (torch.arange(_QUANTILES, dtype=torch.float64) + 0.5) / _QUANTILES
    sample: torch.Tensor = torch.special.ndtri(probabilities)
    return sample


def _borders(levels: torch.Tensor) -> torch.Tensor:
    return (levels[1:] + levels[:-1]) / 2
