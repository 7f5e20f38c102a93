"""What the interpretability experiment is asked to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from emt.config import MemoryConfig
from emt.errors import ConfigError
from emt.model.loading import DEFAULT_MODEL
from experiments.checks import check, check_memory, is_seed, is_text


@dataclass(frozen=True, kw_only=True)
class InterpretabilitySettings:
    """What to ask whom, and how to read memories.

    Attributes:
        items: a .jsonl or .parquet file, as `experiments.items` reads it.
        model: what `emt.model.loading.load` takes.
        splits: of the items to use; None for all.
        limit: items of each split, the first ones; None for all.
        topk: memories for each query; each is a condition, compared with the one before it.
        others: further conditions: name -> settings for `Memory.using`, such as `uncertainty`.
        memory: settings of the memory, keys of `MemoryConfig`; the published ones if not named.
        heat_map: the condition whose attention is drawn.
        question: what is asked, with `{question}`.
        chat: use the model's chat template; None for "if it has one".
        max_new_tokens: length of an answer.
        seed: of the intervals.

    Raises:
        ConfigError: a value of a wrong type or out of range.
    """

    items: str | None = None
    model: str = DEFAULT_MODEL
    splits: Sequence[str] | None = None
    limit: int | None = None
    topk: Sequence[int] = (1, 2, 4, 8, 12, 20)
    others: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    memory: Mapping[str, Any] = field(default_factory=dict)
    heat_map: str = "topk 4"
    question: str = "{question}\nAnswer in a few words."
    chat: bool | None = None
    max_new_tokens: int = 30
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.items, str):
            raise ConfigError(f"items must name a file: items=FILE; got {self.items!r}.")
        check(self, "model", is_text, "text")
        check(self, "chat", lambda v: v is None or isinstance(v, bool), "true, false or null")
        check(self, "seed", is_seed, "a whole number of at least 0")
        for name in ("limit", "max_new_tokens"):
            value = getattr(self, name)
            if value is None and name == "limit":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1; got {value!r}.")
        for name in ("splits", "topk"):
            value = getattr(self, name)
            if not isinstance(value, list | tuple) and not (value is None and name == "splits"):
                raise ConfigError(f"{name} must be a list; got {value!r}.")
        for name in ("memory", "others"):
            if not isinstance(getattr(self, name), Mapping):
                raise ConfigError(f"{name} must be a mapping; got {getattr(self, name)!r}.")
        check_memory(self.memory, "memory", fixed=("path", "enabled"))
        if not isinstance(self.question, str) or "{question}" not in self.question:
            raise ConfigError(f"question must have {{question}} in it; got {self.question!r}.")
        known = self.conditions()
        if self.heat_map not in known:
            raise ConfigError(
                f"heat_map must be one of the conditions {', '.join(known)}; got {self.heat_map!r}."
            )

    def config(self) -> MemoryConfig:
        """Return the memory's settings."""
        return MemoryConfig.from_dict(self.memory)

    def conditions(self) -> dict[str, dict[str, Any]]:
        """Return name -> settings for `Memory.using`, in the order they are asked.

        Raises:
            ConfigError: settings that are wrong, or wrong together.
        """
        found: dict[str, dict[str, Any]] = {f"topk {topk}": {"topk": topk} for topk in self.topk}
        for name, settings in self.others.items():
            if not isinstance(settings, Mapping):
                raise ConfigError(f"condition '{name}' must be a mapping; got {settings!r}.")
            found[str(name)] = dict(settings)
        for settings in found.values():
            self.config().replace(**settings)
        return found
