"""One document to rows, window by window.

Plainly, windows start every `stride` tokens and take up to `max_length`, positions from 0 in each;
only the tail that the window before did not reach is kept. So a row has between
`max_length - stride` and `max_length` tokens of left context, once the document is long enough, and
each token is read up to `max_length / stride` times.

With carried context (`carry.py`) rows have as much context, and each token is read once.

Source: Klett and Ahle, Extended Mind Transformers (arXiv 2406.02332), section 3.1 and the
published `generate_cache`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedModel

from emt.errors import ConfigError
from emt.ingest.carry import read_carrying
from emt.ingest.rows import Reader
from emt.model.positions import max_positions
from emt.model.rope import Unrotation
from memory_backends import Rows


class Window(NamedTuple):
    """Tokens `start` to `stop` are read, rows `keep_from` to `stop` are kept."""

    start: int
    stop: int
    keep_from: int


def windows(num_tokens: int, stride: int, max_length: int) -> Iterator[Window]:
    """Cut a document into encoding windows that together keep each token once."""
    kept = 0
    for start in range(0, num_tokens, stride):
        stop = min(start + max_length, num_tokens)
        yield Window(start, stop, kept)
        kept = stop
        if stop == num_tokens:
            return


def tokens_read(num_tokens: int, stride: int, max_length: int, *, carry_context: bool) -> int:
    """Return how many tokens the model runs to encode a document, repetitions included."""
    if carry_context:
        return num_tokens
    return sum(w.stop - w.start for w in windows(num_tokens, stride, max_length))


def check_max_length(config: object, max_length: int) -> None:
    """Refuse windows that are longer than the model's positions.

    Raises:
        ConfigError: naming both numbers.
    """
    positions = max_positions(config)
    if positions is not None and max_length > positions:
        raise ConfigError(
            f"max_length ({max_length}) must be at most the model's {positions} positions. "
            f"Set max_length={positions} or less in the memory config."
        )


def encode(
    decoder: PreTrainedModel,
    token_ids: Tensor,
    *,
    stride: int,
    max_length: int,
    unrotations: Mapping[int, Unrotation | None],
    drop_ids: Collection[int] = (),
    carry_context: bool = False,
) -> Iterator[Rows]:
    """Read one document, window by window.

    Args:
        decoder: the model without its language-model head, attached or being attached.
        token_ids: (T,) int64, on any device.
        stride: tokens between the starts of two windows.
        max_length: tokens in a window, at least `stride`.
        unrotations: layer -> how to bring its keys to position 0; None leaves them where they are.
        drop_ids: token ids whose rows are left out, after the others have attended to them.
        carry_context: read each token once, after rows of the windows before it.

    Yields:
        The rows of one window, in order; layers are the keys of `unrotations`.

    Raises:
        ConfigError, UnsupportedModelError: the context cannot be carried; see `emt.ingest.carry`.
    """
    reader = Reader(decoder, unrotations, drop_ids)
    if carry_context:
        yield from read_carrying(reader, token_ids, stride=stride, max_length=max_length)
        return
    for window in windows(len(token_ids), stride, max_length):
        num_before = window.keep_from - window.start
        reading = reader.read(token_ids[None, window.start : window.stop], skip=num_before)
        yield reader.rows(
            reading,
            token_ids[window.keep_from : window.stop],
            first_token=window.keep_from,
            num_before=num_before,
        )
