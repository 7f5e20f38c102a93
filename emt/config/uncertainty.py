"""When a generation step is uncertain, and how many memories it is then redone with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from emt.errors import ConfigError


@dataclass(frozen=True)
class Uncertainty:
    """The setting `uncertainty`: active retrieval.

    Attributes:
        entropy: of the next token, in nats; a step above it is redone. 0 redoes every step,
            infinity none.
        topk: memories that each query attends to in the step that is redone.

    Raises:
        ConfigError: a value of a wrong type or out of range.

    Source:
        Klett and Ahle, Extended Mind Transformers (arXiv 2406.02332): 1.0, and 12 instead of 4.
    """

    entropy: float
    topk: int

    def __post_init__(self) -> None:
        entropy = float(self.entropy) if type(self.entropy) is int else self.entropy
        if not isinstance(entropy, float) or not entropy >= 0:
            raise ConfigError(f"uncertainty's entropy must be nats, 0 or more; got {entropy!r}.")
        if type(self.topk) is not int or self.topk < 1:
            raise ConfigError(
                f"uncertainty's topk must be a whole number of at least 1; got {self.topk!r}."
            )
        object.__setattr__(self, "entropy", entropy)

    @classmethod
    def from_mapping(cls, values: Mapping[Any, Any]) -> Uncertainty:
        """Make the setting from what a config says.

        Raises:
            ConfigError: other keys than the two, or a wrong value.
        """
        if set(values) != {"entropy", "topk"}:
            given = ", ".join(map(str, values)) or "none"
            raise ConfigError(
                f"uncertainty must have the keys entropy and topk; got {given}. "
                "The published values are {entropy: 1.0, topk: 12}."
            )
        return cls(**values)
