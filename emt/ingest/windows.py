"""Cut a document into windows: the tokens that a model runs at a time.

Windows start every `stride` tokens and take up to `max_length`, with positions from 0 in each. Only
the tokens that the window before did not reach leave rows, with at least `max_length - stride`
tokens of left context in a long document. Each token is run up to `max_length / stride` times, or
once with carried context (`emt.ingest.carry`).

Source: Klett and Ahle, Extended Mind Transformers (arXiv 2406.02332), section 3.1 and the
published `generate_cache`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, Self

from emt.config import MemoryConfig
from emt.errors import ConfigError
from emt.model.positions import max_positions

_LONGEST = 3072  # tokens: the published length of a window


class Window(NamedTuple):
    """Tokens `start` to `stop` are run, and tokens `keep_from` to `stop` leave rows."""

    start: int
    stop: int
    keep_from: int


@dataclass(frozen=True)
class Windows:
    """How documents are cut; the fields are those of `MemoryConfig`, with `max_length` decided."""

    stride: int
    max_length: int
    carry_context: bool | Literal["auto"] = False

    @classmethod
    def of(cls, config: MemoryConfig, model_config: object) -> Self:
        """Return the windows that a memory's settings ask for.

        Windows of automatic length fit the positions of the model's text decoder, and at least two
        strides fit into one.
        """
        if isinstance(config.max_length, int):
            return cls(config.stride, config.max_length, config.carry_context)
        longest = min(_LONGEST, max_positions(model_config) or _LONGEST)
        return cls(min(config.stride, max(longest // 2, 1)), longest, config.carry_context)

    def cut(self, num_tokens: int) -> Iterator[Window]:
        """Yield the windows of a document without carried context, each token kept once."""
        keep_from = 0
        for start in range(0, num_tokens, self.stride):
            stop = min(start + self.max_length, num_tokens)
            yield Window(start, stop, keep_from)
            keep_from = stop
            if stop == num_tokens:
                return


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
