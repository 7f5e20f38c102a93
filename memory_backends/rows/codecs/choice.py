"""Codecs by name."""

from __future__ import annotations

import torch

from memory_backends.errors import MemoryMismatchError
from memory_backends.rows.codecs.base import RowCodec
from memory_backends.rows.codecs.plain import PlainCodec
from memory_backends.rows.codecs.quantised import QuantisedCodec

CODEC_NAMES = ("exact", "float16", "bfloat16", "int8", "int4")


def row_codec(name: str, dtype: torch.dtype) -> RowCodec:
    """Return the codec of that name for rows of a dtype.

    Args:
        name: "exact", the rows' own dtype; "float16" or "bfloat16"; "int8" or "int4", quantised.
        dtype: the dtype of the memory's layout, float32, float16 or bfloat16.

    Raises:
        MemoryMismatchError: there is no such codec.
    """
    if name == "exact":
        return PlainCodec(name, dtype, dtype)
    if name == "float16":
        return PlainCodec(name, torch.float16, dtype)
    if name == "bfloat16":
        return PlainCodec(name, torch.bfloat16, dtype)
    if name == "int8":
        return QuantisedCodec(name, 8, dtype)
    if name == "int4":
        return QuantisedCodec(name, 4, dtype)
    known = ", ".join(f"'{known}'" for known in CODEC_NAMES)
    raise MemoryMismatchError(f"row_codec must be one of {known}; got '{name}'.")
