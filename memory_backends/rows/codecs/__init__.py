"""How a row becomes bytes: exactly, in half precision, or quantised to a few bits."""

from memory_backends.rows.codecs.base import LayerCoder, RowCodec
from memory_backends.rows.codecs.choice import CODEC_NAMES, row_codec

__all__ = ["CODEC_NAMES", "LayerCoder", "RowCodec", "row_codec"]
