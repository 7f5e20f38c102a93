"""What the timing experiment is asked to do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from emt.config import MemoryConfig
from emt.errors import ConfigError
from emt.model.loading import DEFAULT_MODEL
from experiments.checks import check, check_memory, is_ascending, is_positive, is_text

PROMPT = "prompt"
CACHED = "prompt, cached"


@dataclass(frozen=True, kw_only=True)
class TimingSettings:
    """What is measured.

    Attributes:
        data: a text, or a .jsonl file whose first text is taken; the document is its start, the
            queries are what follows.
        model: what `load` takes.
        lengths: tokens of the document; each is measured on its own.
        queries: how many queries the mean is given for.
        query_tokens: tokens of a query.
        new_tokens: greedy tokens of an answer.
        measured: queries timed in a round.
        rounds: how often each condition has its turn; medians are reported.
        memory: settings of `MemoryConfig` for all memories.
        memories: further settings of each memory, by the name of its condition.

    Raises:
        ConfigError: a value of a wrong type or out of range.
    """

    data: str
    model: str = DEFAULT_MODEL
    lengths: list[int]
    queries: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32, 64])
    query_tokens: int = 32
    new_tokens: int = 16
    measured: int = 4
    rounds: int = 3
    memory: dict[str, Any] = field(default_factory=dict)
    memories: dict[str, dict[str, Any]] = field(
        default_factory=lambda: {
            "EMT manual": {"memory_type": "manual"},
            "EMT vector_db": {"memory_type": "vector_db"},
        }
    )

    def __post_init__(self) -> None:
        for name in ("data", "model"):
            check(self, name, is_text, "text")
        for name in ("lengths", "queries"):
            check(self, name, is_ascending, "a list of whole numbers of at least 1, ascending")
        for name in ("query_tokens", "new_tokens", "measured", "rounds"):
            check(self, name, is_positive, "a whole number of at least 1")
        check_memory(self.memory, "memory", fixed=("path", "enabled"))
        check(self, "memories", _is_mapping_of_mappings, "a mapping: name to memory settings")
        for name, changes in self.memories.items():
            if name in (PROMPT, CACHED):
                raise ConfigError(f"a memory cannot be called '{name}': a condition has that name.")
            check_memory({**self.memory, **changes}, f"memories.{name}", fixed=("path", "enabled"))

    def memory_configs(self) -> dict[str, MemoryConfig]:
        """Return the settings of each memory, by name."""
        return {
            name: MemoryConfig.from_dict({**self.memory, **changes})
            for name, changes in self.memories.items()
        }


def _is_mapping_of_mappings(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(inner, dict) for inner in value.values())
