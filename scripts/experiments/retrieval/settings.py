"""What the retrieval experiment is asked to do."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt

from emt.config import MemoryConfig
from emt.errors import ConfigError
from emt.model.loading import DEFAULT_MODEL
from experiments.prompts import Templates
from experiments.settings import (
    MemorySettings,
    Settings,
    Text,
    memory_config,
    named_conditions,
)

Kind = Literal["closed_book", "document", "emt", "rag", "rag_emt"]
STANDARD: dict[str, dict[str, Any]] = {
    "closed_book": {"kind": "closed_book"},
    "document": {"kind": "document"},
    "emt_manual": {"kind": "emt", "memory": {"memory_type": "manual"}},
    "emt_vector_db": {"kind": "emt", "memory": {"memory_type": "vector_db"}},
    "rag": {"kind": "rag"},
    "rag_emt": {"kind": "rag_emt", "memory": {"memory_type": "manual"}},
}


class Condition(Settings):
    """One way to answer: how the question is put, and the settings of its memory.

    The question stands alone, after the document, or after chunks of documents ("rag"); with a
    memory in token mode ("emt"), or without.
    """

    kind: Kind
    memory: MemorySettings = {}

    @property
    def has_memory(self) -> bool:
        """Whether documents are remembered."""
        return self.kind.endswith("emt")

    @property
    def has_chunks(self) -> bool:
        """Whether chunks of documents are retrieved into the prompt."""
        return self.kind.startswith("rag")


class Endpoint(Settings):
    """How a model behind an endpoint is asked; see `experiments.endpoint`."""

    parameters: dict[str, Any] = {}
    timeout: PositiveFloat = 120.0
    attempts: PositiveInt = 5


class RetrievalSettings(Settings):
    """What to ask whom; `configs/experiments/retrieval.yaml` says what each setting means."""

    items: Text
    model: Text = DEFAULT_MODEL
    endpoint: Endpoint = Endpoint()
    device: Text = "cpu"
    splits: list[str] | None = None
    limit: PositiveInt | None = None
    conditions: Annotated[
        dict[str, Condition],
        BeforeValidator(named_conditions(STANDARD)),
        Field(min_length=1, validate_default=True),
    ] = list(STANDARD)
    baseline: str = "closed_book"
    memory: MemorySettings = {}
    window: PositiveInt | None = None
    max_new_tokens: PositiveInt = 30
    chat: bool | None = None
    templates: Templates = Templates()
    retriever: Text = "bm25"
    chunk_tokens: PositiveInt = 500
    chunks: PositiveInt = 5

    def model_post_init(self, _: Any) -> None:
        """Check settings that depend on each other."""
        if self.baseline not in self.conditions:
            raise ConfigError(
                f"baseline must be one of the conditions {', '.join(self.conditions)}; "
                f"got {self.baseline!r}."
            )
        textual = [name for name, one in self.conditions.items() if not one.has_memory]
        for name, condition in self.conditions.items():
            if condition.has_memory:
                self.config_of(name)
            elif condition.memory:
                raise ConfigError(f"condition '{name}' of kind {condition.kind} has no memory.")
            if condition.has_memory and self.endpoint_name is not None:
                raise ConfigError(
                    f"condition '{name}' needs the model itself, which an endpoint does not give. "
                    f"Set conditions to [{', '.join(textual)}]."
                )

    @property
    def endpoint_name(self) -> str | None:
        """The model's name at the endpoint; None for a model that is loaded here."""
        name = self.model.removeprefix("endpoint:")
        return None if name == self.model else name

    def config_of(self, name: str) -> MemoryConfig | None:
        """Return the settings of a condition's memory; None without one."""
        condition = self.conditions[name]
        if not condition.has_memory:
            return None
        values = {**self.memory, **condition.memory, "mode": "token"}
        return memory_config(values)
