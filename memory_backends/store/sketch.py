"""A sketch of a model: a few values of each of its weights, by which two models are compared.

A hash tells whether weights are equal bit for bit, and nothing else. A sketch also tells whether
they are the same weights rounded to another dtype, as the rows of a store must be, and whether
they are those of the same model in another quantisation or file format.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

import torch
import numpy as np
import numpy.typing as npt

from memory_backends.errors import MemoryMismatchError

_NUM_VALUES = 8  # of each weight
_GOLDEN = 0.6180339887498949
_MIN_WEIGHTS = 4  # eight values of one or two weights are alike by chance too often
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class Sketch:
    """A few values of each weight of a model.

    Attributes:
        model_type: the model's architecture.
        num_layers: how many layers it has.
        names: (n,) uint32, ascending; each stands for a weight's name, its shape, and how it is
            packed.
        values: (n, 8) float32, values at fixed places of each weight.
    """

    model_type: str
    num_layers: int
    names: npt.NDArray[np.uint32]
    values: torch.Tensor

    @classmethod
    def of(
        cls, model_type: str, num_layers: int, weights: Iterable[tuple[str, torch.Tensor]]
    ) -> Self:
        """Take the sketch of named tensors, of any dtype and on any device."""
        samples = {_key(name, tensor): _sample(tensor) for name, tensor in weights}
        names = np.array(sorted(samples), dtype=np.uint32)
        values = [torch.empty(0, _NUM_VALUES)]
        values += [samples[name].unsqueeze(0) for name in names.tolist()]
        return cls(model_type, num_layers, names, torch.cat(values))

    def is_same(self, other: Sketch, dtype: torch.dtype, other_dtype: torch.dtype) -> bool:
        """Tell whether two models have the same weights, each rounded to the dtype it is in."""
        if not np.array_equal(self.names, other.names):
            return False
        own, others = self.values, other.values
        if torch.float32 in (dtype, other_dtype):
            coarser = other_dtype if dtype == torch.float32 else dtype
            return torch.equal(own.to(coarser), others.to(coarser))
        # One was rounded to float16 and one to bfloat16: each is at most half a step off.
        size = torch.maximum(own.abs(), others.abs())
        return bool(((own - others).abs() <= size * (2**-8 + 2**-11) + 2**-25).all())

    def correlation(self, other: Sketch) -> float:
        """Return how alike two models' weights are, -1 to 1: the mean of each weight's correlation.

        Only weights that both models have unpacked, in one shape, are compared. It is 0 if too few
        of these are there to tell, or if the models differ in architecture or depth.
        """
        if (self.model_type, self.num_layers) != (other.model_type, other.num_layers):
            return 0.0
        _, own_places, other_places = np.intersect1d(self.names, other.names, return_indices=True)
        own, others = self.values[own_places].double(), other.values[other_places].double()
        own, others = own - own.mean(1, keepdim=True), others - others.mean(1, keepdim=True)
        sizes = torch.stack([own.norm(dim=1), others.norm(dim=1)])
        varies = sizes.amax(0) > 0  # norms that are all ones in both say nothing
        if int(varies.sum()) < _MIN_WEIGHTS:
            return 0.0
        each = (own * others).sum(1) / sizes.prod(0)
        return float(each[varies].nan_to_num(0.0).mean())

    def to_json(self) -> dict[str, Any]:
        """Return the sketch as plain JSON types, some 50 bytes a weight; `from_json` reads it."""
        return {
            "model_type": self.model_type,
            "num_layers": self.num_layers,
            "names": _encoded(self.names.astype("<u4")),
            "values": _encoded(self.values.numpy().astype("<f4")),
        }

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """Read what `to_json` wrote; raise a MemoryMismatchError for anything else."""
        try:
            names = np.frombuffer(base64.b64decode(data["names"], validate=True), dtype="<u4")
            values = np.frombuffer(base64.b64decode(data["values"], validate=True), dtype="<f4")
            values = values.reshape(len(names), _NUM_VALUES).astype(np.float32)
            return cls(
                str(data["model_type"]),
                int(data["num_layers"]),
                names.astype(np.uint32),
                torch.from_numpy(values),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise MemoryMismatchError(f"not a sketch of weights: {data!r:.80} ({error})") from error


def _key(name: str, tensor: torch.Tensor) -> int:
    """Return a number for a weight; packed values are no weights, so their dtype is part of it."""
    packed = "" if tensor.dtype in _FLOATS else str(tensor.dtype)
    return zlib.crc32(f"{name} {tuple(tensor.shape)} {packed}".encode())


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """Return values from all over a tensor, (8,) float32 on the CPU.

    Multiples of the golden ratio are spread evenly, and over columns as well as rows.
    """
    flat = tensor.detach().flatten()
    if not len(flat):
        return torch.zeros(_NUM_VALUES)
    fractions = (torch.arange(1, _NUM_VALUES + 1, dtype=torch.float64) * _GOLDEN) % 1
    places = (fractions * len(flat)).long().to(flat.device)
    return flat[places].to("cpu", torch.float32)


def _encoded(array: np.ndarray[Any, Any]) -> str:
    return base64.b64encode(array.tobytes()).decode("ascii")
