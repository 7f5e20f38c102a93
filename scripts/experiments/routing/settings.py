"""What the routing experiment is asked to do."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from emt.config import MemoryConfig
from emt.model.loading import DEFAULT_MODEL
from experiments.settings import Ascending, QuestionTemplate, Settings, Text


class RoutingSettings(Settings):
    """What is asked, of which store.

    Attributes:
        store: a memory store that `emt index` or another experiment has made.
        data: questions whose answers stand in its documents, as `emt profile` reads them; those
            that are not about one of its documents are left out, and counted.
        wording: a file of these questions in other words; questions without one are left out. None
            for the questions as they are.
        unrelated: a file of prompts about nothing in the store, one a line, of which the share that
            is told so is counted; None for no such prompts.
        model: what `load` takes.
        profile: file of a head profile; None for the store's, or the one that comes with emt.
        sizes: rows; of each memory, the store's first documents with so many. None for all.
        routing: what finds passages; each is a condition.
        limit: questions of each document, the first ones; None for all.
        recall_rows: rows of all passages of a question together.
        recall_passages: passages of a question.
        relevance: as `MemoryConfig.relevance`.
        template: how a question is put, with `{question}`.

    Raises:
        ConfigError: a value of a wrong type or out of range.
    """

    store: Text
    data: Text
    wording: str | None = None
    unrelated: str | None = None
    model: Text = DEFAULT_MODEL
    profile: str | None = None
    sizes: Ascending | None = None
    routing: Annotated[list[Literal["heads", "words", "both"]], Field(min_length=1)] = [
        "heads",
        "words",
        "both",
    ]
    limit: PositiveInt | None = None
    recall_rows: PositiveInt = 384
    recall_passages: PositiveInt = 3
    relevance: float | None = MemoryConfig.relevance
    template: QuestionTemplate = "{question}\nAnswer in a few words."
