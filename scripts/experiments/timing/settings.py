"""What the timing experiment is asked to do."""

from __future__ import annotations

from typing import Any

from pydantic import PositiveInt

from emt.config import MemoryConfig
from emt.errors import ConfigError
from emt.model.loading import DEFAULT_MODEL
from experiments.settings import Ascending, MemorySettings, Settings, Text, memory_config

PROMPT = "prompt"
CACHED = "prompt, cached"


class TimingSettings(Settings):
    """What is asked; `configs/experiments/timing.yaml` says what each setting means."""

    data: Text
    model: Text = DEFAULT_MODEL
    lengths: Ascending
    queries: Ascending = [1, 2, 4, 8, 16, 32, 64]
    query_tokens: PositiveInt = 32
    new_tokens: PositiveInt = 16
    measured: PositiveInt = 4
    rounds: PositiveInt = 3
    memory: MemorySettings = {}
    memories: dict[str, MemorySettings] = {
        "EMT manual": {"memory_type": "manual"},
        "EMT vector_db": {"memory_type": "vector_db"},
    }

    def model_post_init(self, _: Any) -> None:
        """Check the names of the memories, and that their settings fit together."""
        for name in (PROMPT, CACHED):
            if name in self.memories:
                raise ConfigError(f"a memory cannot be called '{name}': a condition has that name.")
        self.memory_configs()

    def memory_configs(self) -> dict[str, MemoryConfig]:
        """Return the settings of each memory, by name."""
        return {
            name: memory_config({**self.memory, **changes})
            for name, changes in self.memories.items()
        }
