"""Codecs by name."""

from __future__ import annotations

import torch

from memory_backends.errors import MemoryMismatchError
from memory_backends.rows.codecs.base import RowCodec
from memory_backends.rows.codecs.plain import PlainCodec
from memory_backends.rows.codecs.quantised import QuantisedCodec
from memory_backends.rows.codecs.text import NAME as TEXT
from memory_backends.rows.codecs.text import TextCodec

CODEC_NAMES = ("exact", "float16", "bfloat16", "int8", "int5.5", "int4", TEXT)


def row_codec(name: str, dtype: torch.dtype, decoded: torch.dtype | None = None) -> RowCodec:
    """Return the codec of that name.

    Args:
        name: one of `CODEC_NAMES`.
        dtype: that of the store's layout, which "exact" keeps rows in.
        decoded: the dtype of rows that are read, if it is another.
    """
    decoded = decoded or dtype
    stored = {"exact": dtype, "float16": torch.float16, "bfloat16": torch.bfloat16}
    bits = {"int8": 8, "int5.5": 5.5, "int4": 4}
    if name in stored:
        return PlainCodec(name, stored[name], decoded)
    if name in bits:
        return QuantisedCodec(name, bits[name], decoded, for_passages=name == "int5.5")
    if name == TEXT:
        return TextCodec(decoded)
    raise MemoryMismatchError(f"row_codec must be one of {CODEC_NAMES}; got {name!r}.")
