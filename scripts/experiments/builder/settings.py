"""What the builder of counterfactual items is asked to do."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PositiveInt

from emt.errors import ConfigError
from experiments.settings import Settings, Text


def _limits(limits: list[int]) -> list[int]:
    if limits != sorted(limits):
        raise ConfigError(f"expected [lowest, highest] in tokens; got {limits}.")
    return limits


Limits = Annotated[list[PositiveInt], Field(min_length=2, max_length=2), AfterValidator(_limits)]


class BuildSettings(Settings):
    """What to build; `configs/experiments/build_items.yaml` says what each setting means."""

    articles: Text
    output: Text
    source: str = ""
    name: str = "item"
    model: str | None = None
    splits: Annotated[dict[str, Limits], Field(min_length=1)]
    items_per_split: PositiveInt | None = None
    items_per_article: PositiveInt | None = None
    reuse_questions: bool = False
    max_replacements: PositiveInt = 20
    kinds: Annotated[list[Literal["year", "number", "entity"]], Field(min_length=1)] = [
        "year",
        "number",
        "entity",
    ]
    seed: int = 0
