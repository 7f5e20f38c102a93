"""How a row becomes bytes: exactly, in half precision, quantised to a few bits, or not at all."""

from memory_backends.rows.codecs.base import LayerCoder, RowCodec
from memory_backends.rows.codecs.choice import CODEC_NAMES, row_codec
from memory_backends.rows.codecs.text import NAME as TEXT

__all__ = ["CODEC_NAMES", "TEXT", "LayerCoder", "RowCodec", "row_codec"]
