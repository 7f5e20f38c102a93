"""Codecs by name."""

from __future__ import annotations

import torch

from memory_backends.errors import MemoryMismatchError
from memory_backends.rows.codecs.base import RowCodec
from memory_backends.rows.codecs.plain import PlainCodec
from memory_backends.rows.codecs.quantised import QuantisedCodec

CODEC_NAMES = ("exact", "float16", "bfloat16", "int8", "int4")


def row_codec(name: str, dtype: torch.dtype) -> RowCodec:
    """Return the codec of that name; `dtype` is that of the memory's layout."""
    stored = {"exact": dtype, "float16": torch.float16, "bfloat16": torch.bfloat16}
    bits = {"int8": 8, "int4": 4}
    if name in stored:
        return PlainCodec(name, stored[name], dtype)
    if name in bits:
        return QuantisedCodec(name, bits[name], dtype)
    raise MemoryMismatchError(f"row_codec must be one of {CODEC_NAMES}; got {name!r}.")
