"""What the interpretability experiment is asked to do."""

from __future__ import annotations

from typing import Any

from pydantic import PositiveInt

from emt.config import MemoryConfig
from emt.errors import ConfigError
from emt.model.loading import DEFAULT_MODEL
from experiments.settings import MemorySettings, QuestionTemplate, Settings, Text


class InterpretabilitySettings(Settings):
    """What to ask whom, and how to read memories.

    Attributes:
        items: a file that `experiments.items` reads.
        model: what `load` takes.
        splits: of the items to use; None for all.
        limit: items of each split, the first ones; None for all.
        topk: memories for each query; each is a condition, compared with the one before it.
        others: further conditions: name -> settings for `Memory.using`, such as `uncertainty`.
        memory: settings of the memory, keys of `MemoryConfig`; the published ones if not named.
        heat_map: the condition whose attention is drawn.
        question: what is asked, with `{question}`.
        chat: use the model's chat template; None for "if it has one".
        max_new_tokens: length of an answer.

    Raises:
        ConfigError: a value of a wrong type or out of range.
    """

    items: Text
    model: Text = DEFAULT_MODEL
    splits: list[str] | None = None
    limit: PositiveInt | None = None
    topk: list[PositiveInt] = [1, 2, 4, 8, 12, 20]
    others: dict[str, MemorySettings] = {}
    memory: MemorySettings = {}
    heat_map: str = "topk 4"
    question: QuestionTemplate = "{question}\nAnswer in a few words."
    chat: bool | None = None
    max_new_tokens: PositiveInt = 30

    def model_post_init(self, _: Any) -> None:
        """Check that the settings of each condition fit together."""
        for changes in self.conditions().values():
            self.config().replace(**changes)
        if self.heat_map not in self.conditions():
            raise ConfigError(
                f"heat_map must be one of the conditions {', '.join(self.conditions())}; "
                f"got {self.heat_map!r}."
            )

    def config(self) -> MemoryConfig:
        """Return the memory's settings."""
        return MemoryConfig.from_dict(self.memory)

    def conditions(self) -> dict[str, dict[str, Any]]:
        """Return name -> settings for `Memory.using`, in the order they are asked."""
        return {**{f"topk {topk}": {"topk": topk} for topk in self.topk}, **self.others}
