"""How a row becomes bytes: exactly, in half precision, or quantised to 8, 6 or 4 bits a number."""

from memory_backends.rows.codecs.base import LayerCoder, RowCodec
from memory_backends.rows.codecs.choice import CODEC_NAMES, row_codec

__all__ = ["CODEC_NAMES", "LayerCoder", "RowCodec", "row_codec"]
