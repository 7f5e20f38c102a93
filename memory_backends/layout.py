"""What a memory's rows look like, layer by layer, and the documents they come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import numpy as np
import numpy.typing as npt

from memory_backends.errors import MemoryMismatchError

Float32Array = npt.NDArray[np.float32]
Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
MetadataValue = str | int | float | bool
Metadata = Mapping[str, MetadataValue]
Heads = Sequence[int] | None  # KV heads of one layer; None for all of them

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

_MAX_LAYERS = 10_000


@dataclass(frozen=True)
class LayerLayout:
    """The shape of one layer's rows: a key and a value of these dims a token and KV head."""

    num_key_value_heads: int
    head_dim: int
    value_head_dim: int

    @property
    def row_dim(self) -> int:
        """Elements of one head's key and value together."""
        return self.head_dim + self.value_head_dim


@dataclass(frozen=True)
class MemoryLayout:
    """The shape of a memory: one `LayerLayout` for each model layer, and the dtype of all rows."""

    layers: Mapping[int, LayerLayout]
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if not self.layers:
            raise MemoryMismatchError("a memory must have at least one layer; got none.")
        if self.dtype not in DTYPES.values():
            raise MemoryMismatchError(
                f"rows must be float32, float16 or bfloat16; got {self.dtype}. "
                "Load the model in one of these dtypes."
            )

    @property
    def largest_head_dim(self) -> int:
        """The dims of the widest key."""
        return max(layer.head_dim for layer in self.layers.values())

    def to_json(self) -> dict[str, Any]:
        """Return the layout as plain JSON types; `from_json` reads it back."""
        return {
            "dtype": str(self.dtype).removeprefix("torch."),
            "layers": {
                str(idx): [ll.num_key_value_heads, ll.head_dim, ll.value_head_dim]
                for idx, ll in self.layers.items()
            },
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> MemoryLayout:
        """Read what `to_json` wrote; raise a MemoryMismatchError for anything else."""
        try:
            shapes = {int(idx): tuple(map(int, dims)) for idx, dims in data["layers"].items()}
            if not all(
                len(dims) == 3 and 0 < min(dims) <= max(dims) < 2**16 for dims in shapes.values()
            ):
                raise ValueError(f"impossible layer shapes {shapes}")
            if not all(0 <= idx < _MAX_LAYERS for idx in shapes):
                raise ValueError(f"impossible layers {sorted(shapes)}")
            return cls(
                {idx: LayerLayout(*dims) for idx, dims in shapes.items()}, DTYPES[data["dtype"]]
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise MemoryMismatchError(f"not a memory layout: {data!r} ({error})") from error


@dataclass(frozen=True)
class Rows:
    """A run of consecutive tokens' keys and values.

    Attributes:
        keys: layer -> (Hkv, n, head_dim), at position 0 (before RoPE), KV heads not repeated.
        values: layer -> (Hkv, n, value_head_dim).
        tokens: (n,) int32, each row's token: an index into its document's `token_ids`.
        sinks: (n,) bool, rows that are attention sinks: attended to whatever is asked.
        queries: layer -> (H, n, head_dim), the same tokens' queries as the model compares them with
            keys, all query heads; empty if not known. A store keeps a sample of them to find out
            how hard its index must search.
        records: layer -> (n, record_bytes) uint8, the same rows as a store with the same coding has
            them, from which they are copied; empty if they come from a model.
    """

    keys: Mapping[int, torch.Tensor]
    values: Mapping[int, torch.Tensor]
    tokens: Int32Array
    sinks: npt.NDArray[np.bool_]
    queries: Mapping[int, torch.Tensor] = field(default_factory=dict)
    records: Mapping[int, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, keys: Mapping[int, torch.Tensor], values: Mapping[int, torch.Tensor]) -> Rows:
        """Wrap keys and values of a whole document, one row a token and no sinks."""
        num_rows = next(iter(keys.values())).shape[1]
        return cls(
            keys, values, np.arange(num_rows, dtype=np.int32), np.zeros(num_rows, dtype=bool)
        )

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Document:
    """The text a run of rows was made from.

    Attributes:
        name: unique in its memory.
        token_ids: (T,) int32, all tokens, those without a row (special ids) included.
        text: the original text, or None if only ids were given.
        offsets: (T, 2) int32, each token's span of characters in `text`, or None.
        metadata: what else is known of it, by which searches can be narrowed; None if nothing is
            said.
    """

    name: str
    token_ids: Int32Array
    text: str | None = None
    offsets: Int32Array | None = None
    metadata: Metadata | None = None


@dataclass(frozen=True)
class StoredDocument(Document):
    """A document and where its rows are.

    Attributes:
        first_row: its rows have the ids `first_row` to `first_row + len(row_tokens) - 1`.
        row_tokens: (n,) int32, each row's token: an index into `token_ids`.
        sink_rows: int32, which of the n rows are attention sinks.
    """

    first_row: int = 0
    row_tokens: Int32Array = field(default_factory=lambda: np.empty(0, dtype=np.int32))
    sink_rows: Int32Array = field(default_factory=lambda: np.empty(0, dtype=np.int32))
