"""What the routing experiment is asked to do."""

from __future__ import annotations

from dataclasses import dataclass, field

from emt.config import MemoryConfig
from emt.errors import ConfigError
from emt.model.loading import DEFAULT_MODEL
from experiments.checks import check, is_ascending, is_positive, is_seed, is_text

KINDS = ("heads", "words", "both")


@dataclass(frozen=True, kw_only=True)
class RoutingSettings:
    """What is asked, of which store.

    Attributes:
        store: a memory store that `emt index` or another experiment has made.
        data: questions whose answers stand in its documents, as `emt profile` reads them; those
            that are not about one of its documents are left out, and counted.
        wording: a file of these questions in other words: objects with `original` and `question`.
            Others are left out. None for the questions as they are.
        unrelated: a file of prompts about nothing in the store, one a line: how many of them are
            told so? None for no such prompts.
        model: what `load` takes.
        profile: file of a head profile; None for the store's, or the one that comes with emt.
        sizes: rows; of each memory, the store's first documents with so many. None for all.
        routing: what finds passages; each is a condition.
        limit: questions of each document, the first ones; None for all.
        passage_rows: of all passages of a question together.
        max_passages: of a question.
        relevance: as `MemoryConfig.relevance`.
        template: how a question is put, with `{question}`.
        seed: of the intervals.

    Raises:
        ConfigError: a value of a wrong type or out of range.
    """

    store: str | None = None
    data: str | None = None
    wording: str | None = None
    unrelated: str | None = None
    model: str = DEFAULT_MODEL
    profile: str | None = None
    sizes: list[int] | None = None
    routing: list[str] = field(default_factory=lambda: ["heads", "words", "both"])
    limit: int | None = None
    passage_rows: int = 384
    max_passages: int = 3
    relevance: float | None = MemoryConfig.relevance
    template: str = "{question}\nAnswer in a few words."
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("store", "data"):
            check(self, name, is_text, f"a name: --set {name}=...")
        for name in ("model", "template"):
            check(self, name, is_text, "text")
        for name in ("wording", "unrelated", "profile"):
            check(self, name, lambda v: v is None or is_text(v), "a file name or null")
        if self.sizes is not None:
            check(self, "sizes", is_ascending, "a list of whole numbers, ascending, or null")
        for name in ("passage_rows", "max_passages"):
            check(self, name, is_positive, "a whole number of at least 1")
        check(self, "limit", lambda v: v is None or is_positive(v), "a whole number or null")
        check(self, "seed", is_seed, "a whole number of at least 0")
        wrong = [kind for kind in self.routing if kind not in KINDS]
        if wrong or not self.routing:
            raise ConfigError(f"routing must be some of {', '.join(KINDS)}; got {self.routing!r}.")
        if "{question}" not in self.template:
            raise ConfigError(f"template must have {{question}} in it; got {self.template!r}.")
