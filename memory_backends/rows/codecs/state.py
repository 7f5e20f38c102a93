"""What the quantised codecs learn of a layer, and its bytes in a store's catalogue."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import torch
import numpy as np

from memory_backends.errors import StoreError
from memory_backends.layout import LayerLayout
from memory_backends.rows.codecs.bits import MAX_BITS, allocate

NUM_CENTRES = 5  # the mean, and the first four rows

_HEADER = struct.Struct("<4sHHHH")  # mark, Hkv, head_dim, value_head_dim, centres
_MARK = b"EMQ2"
_LEARNED_FROM = 4096  # rows at most
_PRIOR_ROWS = 32  # the weight of "all axes alike", for a store that begins with a few rows


@dataclass(frozen=True)
class QuantisedState:
    """The statistics of one layer."""

    # (pairs,) uint8, bits of each pair of neighbouring axes of keys, then of values, the same for
    # all heads.
    widths: torch.Tensor
    std: torch.Tensor  # (Hkv, R) float32, standard deviations along the axes, > 0
    centres: torch.Tensor  # (Hkv, C, R) float32, the mean and the first rows
    # (Hkv, D, D) and (Hkv, Dv, Dv) float16, rows are the principal axes, widest first.
    axes: tuple[torch.Tensor, torch.Tensor]

    def to_bytes(self) -> bytes:
        """Return a header and the raw little-endian arrays; `from_bytes` reads them back."""
        heads, centres, _ = self.centres.shape
        header = _HEADER.pack(_MARK, heads, self.axes[0].shape[-1], self.axes[1].shape[-1], centres)
        arrays = (self.widths, self.std, self.centres, *self.axes)
        return header + b"".join(array.contiguous().numpy().tobytes() for array in arrays)

    @classmethod
    def from_bytes(cls, data: bytes, layer: LayerLayout, code_bits: int) -> QuantisedState:
        """Read what `to_bytes` wrote; raise a StoreError for anything else."""
        heads, dim, value_dim = layer.num_key_value_heads, layer.head_dim, layer.value_head_dim
        expected = _HEADER.pack(_MARK, heads, dim, value_dim, NUM_CENTRES)
        shapes: list[tuple[type, tuple[int, ...]]] = [
            (np.uint8, (-(-dim // 2) - (-value_dim // 2),)),
            (np.float32, (heads, layer.row_dim)),
            (np.float32, (heads, NUM_CENTRES, layer.row_dim)),
            (np.float16, (heads, dim, dim)),
            (np.float16, (heads, value_dim, value_dim)),
        ]
        size = len(expected) + sum(
            int(np.prod(shape)) * np.dtype(kind).itemsize for kind, shape in shapes
        )
        if len(data) != size or data[: len(expected)] != expected:
            raise StoreError(
                f"expected {size} bytes of statistics for a layer of {heads} KV heads, head_dim "
                f"{dim} and value_head_dim {value_dim}; got {len(data)} bytes that begin with "
                f"{data[: len(expected)]!r}. Restore the store's catalogue from a copy."
            )
        at, arrays = len(expected), []
        for kind, shape in shapes:
            count = int(np.prod(shape))
            array: np.ndarray[Any, Any] = np.frombuffer(data, kind, count, at).reshape(shape).copy()
            arrays.append(torch.from_numpy(array))
            at += array.nbytes
        widths, std, centres, keys, values = arrays
        usable = (
            all(bool(a.float().isfinite().all()) for a in arrays)
            and int(widths.max()) <= MAX_BITS
            and int(widths.long().sum()) <= code_bits
            and bool((std > 0).all())
        )
        if not usable:
            raise StoreError(
                f"statistics of rows are damaged: a pair's width must be at most {MAX_BITS} bits, "
                f"all of them {code_bits}, deviations positive, and all numbers finite. "
                "Restore the store's catalogue from a copy."
            )
        return cls(widths, std, centres, (keys, values))


def learn(
    layer: LayerLayout,
    rows: torch.Tensor,
    code_bits: int,
    key_weight: float,
    queries: torch.Tensor | None = None,
) -> QuantisedState:
    """Learn a layer's statistics from its first rows, and fit codes of `code_bits`.

    Bits go where an error costs most. Relative to the output of attention, an error in a value
    costs its share of the values' variance, and one in a key the squared error of the scores that
    queries give it, score = query . key / sqrt(head_dim): softmax turns a small difference of
    scores into as large a relative difference of weights.

    Args:
        layer: the shape of the rows.
        rows: (n, Hkv, R).
        code_bits: of one head's codes.
        key_weight: the variance of scores if there are no queries to measure it with.
        queries: (Hkv, m, head_dim), some that are compared with the keys, or None.
    """
    by_head = rows[:_LEARNED_FROM].detach().cpu().double().transpose(0, 1)  # (Hkv, n, R)
    num_rows, num_first = by_head.shape[1], NUM_CENTRES - 1
    first = by_head[:, torch.arange(num_first).clamp(max=num_rows - 1)]
    usual = by_head[:, num_first:] if num_rows > 2 * num_first else by_head  # without the sinks
    mean = usual.mean(1, keepdim=True)
    dims = [layer.head_dim, layer.value_head_dim]
    keys, values = torch.split(usual, dims, -1)
    key_mean, value_mean = torch.split(mean, dims, -1)
    metric = None if queries is None else _metric(queries.detach().cpu().double())
    if metric is None:
        key_variance, key_axes = _principal_axes(keys, key_mean)
        key_cost = key_weight * key_variance / key_variance.sum(-1, keepdim=True)
    else:  # axes of keys @ metric, whose squared length is that of scores
        key_variance, turned = _principal_axes(keys @ metric, key_mean @ metric)
        key_axes = turned @ torch.linalg.inv(metric)
        key_cost = key_variance
    value_variance, value_axes = _principal_axes(values, value_mean)
    value_cost = value_variance / value_variance.sum(-1, keepdim=True)
    costs = torch.cat([_of_pairs(key_cost.mean(0)), _of_pairs(value_cost.mean(0))])  # (pairs,)
    return QuantisedState(
        widths=torch.from_numpy(allocate(costs.numpy(), code_bits)),
        std=torch.cat([key_variance, value_variance], dim=-1).sqrt().float(),
        centres=torch.cat([mean, first], dim=1).float(),
        axes=(key_axes.half(), value_axes.half()),
    )


def _of_pairs(costs: torch.Tensor) -> torch.Tensor:
    """Return sums of two neighbours, (D,) to (P,); a last one without another is alone."""
    return torch.nn.functional.pad(costs, (0, len(costs) % 2)).view(-1, 2).sum(1)


def _metric(queries: torch.Tensor) -> torch.Tensor | None:
    """Return L (Hkv, D, D) with |key @ L|^2 the mean square of a key's scores; None if of nothing.

    Few queries say little of directions: they are drawn to all directions alike.
    """
    num_queries, dim = queries.shape[1:]
    moment = queries.transpose(1, 2) @ queries  # (Hkv, D, D)
    spread = moment.diagonal(dim1=1, dim2=2).mean(-1) / max(num_queries, 1)
    if not bool((spread > 0).all() and moment.isfinite().all()):
        return None
    moment += _PRIOR_ROWS * spread.view(-1, 1, 1) * torch.eye(dim, dtype=torch.float64)
    metric: torch.Tensor = torch.linalg.cholesky(moment / (num_queries + _PRIOR_ROWS) / dim)
    return metric


def _principal_axes(numbers: torch.Tensor, mean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return variances (Hkv, D) and axes (Hkv, D, D), as rows, of (Hkv, n, D), widest first.

    Few rows say little of the axes, and one row nothing of the variance: both are drawn to the
    same variance in all directions, and that to the mean's square.
    """
    num_rows, dim = numbers.shape[1:]
    residual = numbers - mean
    scatter = residual.transpose(1, 2) @ residual  # (Hkv, D, D)
    spread = scatter.diagonal(dim1=1, dim2=2).mean(-1) / num_rows
    prior = spread + mean.square().mean(-1).squeeze(-1) / num_rows
    prior = prior.clamp(min=1e-12).view(-1, 1, 1)
    covariance = scatter + _PRIOR_ROWS * prior * torch.eye(dim, dtype=torch.float64)
    variance, turned = torch.linalg.eigh(covariance / (num_rows + _PRIOR_ROWS))
    return variance.flip(-1), turned.transpose(1, 2).flip(1)
