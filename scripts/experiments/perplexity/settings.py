"""What the perplexity experiment is asked to do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from emt.errors import ConfigError
from emt.model.loading import DEFAULT_MODEL
from experiments.checks import (
    check,
    check_memory,
    is_ascending,
    is_none_or_positive,
    is_positive,
    is_text,
)

WINDOW = "window"
FULL = "full"

_SINKS = (["all"], ["one"], ["all", "one"])


@dataclass(frozen=True, kw_only=True)
class PerplexitySettings:
    """What is measured.

    Attributes:
        data: a .jsonl file of texts, or one text; see `read_texts`.
        model: what `load` takes.
        lengths: tokens of a text that are there to predict from, special ones before it included.
        window: tokens of local context.
        scored: how many tokens are predicted at each length, the last ones.
        topk: memories for each query; each is a condition.
        sinks: "all" or "one"; each is a condition. They are the same unless windows are read
            without left context, that is with `stride` equal to `max_length`.
        memory: other settings of `MemoryConfig`.
        full: predict from the whole text, too.
        texts: use the longest so many; None for all.
        piece_tokens: cut texts into pieces of so many tokens, each a text of its own.

    Raises:
        ConfigError: a value of a wrong type or out of range.
    """

    data: str
    model: str = DEFAULT_MODEL
    lengths: list[int]
    window: int = 2048
    scored: int = 256
    topk: list[int] = field(default_factory=lambda: [3])
    sinks: list[str] = field(default_factory=lambda: ["all"])
    memory: dict[str, Any] = field(default_factory=dict)
    full: bool = True
    texts: int | None = None
    piece_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("data", "model"):
            check(self, name, is_text, "text")
        for name in ("window", "scored"):
            check(self, name, is_positive, "a whole number of at least 1")
        for name in ("texts", "piece_tokens"):
            check(self, name, is_none_or_positive, "a whole number of at least 1, or null")
        for name in ("lengths", "topk"):
            check(self, name, is_ascending, "a list of whole numbers of at least 1, ascending")
        check(self, "sinks", lambda v: v in _SINKS, "a list of 'all' and 'one'")
        check(self, "full", lambda v: isinstance(v, bool), "true or false")
        check_memory(self.memory, "memory", fixed=("topk", "sinks", "path", "enabled"))
        if self.scored >= min(self.window, self.lengths[0]):
            raise ConfigError(
                f"scored ({self.scored}) must be below the window ({self.window}) and every length "
                f"({self.lengths[0]} and up): each token is predicted from one before it."
            )

    def memory_conditions(self) -> dict[str, tuple[str, int]]:
        """Return the memory conditions: name -> sinks and topk."""
        return {
            f"memory, topk {topk}" + (f", sinks {sinks}" if len(self.sinks) > 1 else ""): (
                sinks,
                topk,
            )
            for sinks in self.sinks
            for topk in self.topk
        }

    def conditions(self) -> list[str]:
        """Name all conditions."""
        return [WINDOW, *self.memory_conditions(), *([FULL] if self.full else [])]
