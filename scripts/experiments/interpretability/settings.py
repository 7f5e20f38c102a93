"""What the interpretability experiment is asked to do."""

from __future__ import annotations

from typing import Any

from pydantic import PositiveInt

from emt.config import MemoryConfig
from emt.errors import ConfigError
from emt.model.loading import DEFAULT_MODEL
from experiments.settings import MemorySettings, QuestionTemplate, Settings, Text, memory_config


class InterpretabilitySettings(Settings):
    """What is asked; `configs/experiments/interpretability.yaml` says what each setting means."""

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
        return memory_config(self.memory)

    def conditions(self) -> dict[str, dict[str, Any]]:
        """Return name -> settings for `Memory.using`, in the order they are asked."""
        return {**{f"topk {topk}": {"topk": topk} for topk in self.topk}, **self.others}
