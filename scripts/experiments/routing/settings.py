"""What the routing experiment is asked to do."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from emt.config import MemoryConfig
from emt.model.loading import DEFAULT_MODEL
from experiments.settings import Ascending, QuestionTemplate, Settings, Text


class RoutingSettings(Settings):
    """What is asked; `configs/experiments/routing.yaml` says what each setting means."""

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
    passage_rows: PositiveInt = 384
    max_passages: PositiveInt = 3
    relevance: float | None = MemoryConfig.relevance
    template: QuestionTemplate = "{question}\nAnswer in a few words."
