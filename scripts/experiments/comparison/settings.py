"""What the comparison is asked to do."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveInt

from emt.config import MemoryConfig
from emt.errors import ConfigError
from emt.model.loading import DEFAULT_MODEL
from experiments.prompts import Templates
from experiments.settings import (
    Ascending,
    MemorySettings,
    Settings,
    Text,
    named_conditions,
)

BASELINE = "rag_hybrid"  # what the others are compared with
STANDARD: dict[str, dict[str, Any]] = {
    "closed_book": {},
    "evidence": {"prompt": "evidence"},
    "document": {"prompt": "document"},
    "rag_bm25": {"prompt": "chunks", "retriever": "bm25"},
    "rag_dense": {"prompt": "chunks", "retriever": "dense"},
    "rag_hybrid": {"prompt": "chunks", "retriever": "hybrid"},
    "passages_words": {"mode": "passage", "memory": {"routing": "words"}},
    "passages_heads": {"mode": "passage", "memory": {"routing": "heads"}},
    "passages": {"mode": "passage"},
    "passages_text": {"mode": "passage", "memory": {"row_codec": "text"}},
    "chunks_and_passages": {"prompt": "chunks", "retriever": "bm25", "mode": "passage"},
    "passages_and_tokens": {"mode": "passage_and_token"},
    "tokens": {"mode": "token", "memory": {"topk": 4, "sinks": "one"}},
    "tokens_published": {"mode": "token", "memory": {"topk": 10, "sinks": "all"}},
}


class Condition(Settings):
    """One way to answer.

    Attributes:
        prompt: what the question stands after: nothing, the sentences that answer it, the documents
            that have them, or retrieved chunks.
        retriever: ranks chunks.
        mode: how the memory is read; None without a memory.
        memory: settings of the memory, beside those of all conditions.
    """

    prompt: Literal["question", "evidence", "document", "chunks"] = "question"
    retriever: Literal["bm25", "dense", "hybrid"] | None = None
    mode: Literal["passage", "token", "passage_and_token"] | None = None
    memory: MemorySettings = {}

    def model_post_init(self, _: Any) -> None:
        """Check settings that depend on each other."""
        if (self.prompt == "chunks") != (self.retriever is not None):
            raise ConfigError("a retriever belongs to the prompt 'chunks', and no other prompt.")
        if self.memory and self.mode is None:
            raise ConfigError("settings of a memory need a mode: passage or token.")

    @property
    def is_routed(self) -> bool:
        """Whether passages of the memory are found for each question."""
        return self.mode in ("passage", "passage_and_token")


class ComparisonSettings(Settings):
    """What to ask; `configs/experiments/comparison.yaml` says what each setting means."""

    sets: Annotated[list[Text], Field(min_length=1)]
    model: Text = DEFAULT_MODEL
    device: Text = "cpu"
    embedding_model: Text | None = None
    conditions: Annotated[
        dict[str, Condition],
        BeforeValidator(named_conditions(STANDARD)),
        Field(min_length=1, validate_default=True),
    ] = [name for name in STANDARD if name not in ("rag_dense", "rag_hybrid")]
    together: bool = False
    sizes: Ascending | None = None
    distractors: list[str] = []
    stores: Text | None = None
    limit: PositiveInt | None = None
    generate: bool = True
    without_documents: bool = False
    memory: MemorySettings = {}
    chunk_tokens: PositiveInt = 128
    chunks: PositiveInt = 3
    document_tokens: PositiveInt = 2048
    max_new_tokens: PositiveInt = 30
    window: PositiveInt | None = None
    chat: bool | None = None
    templates: Templates = Templates()

    def model_post_init(self, _: Any) -> None:
        """Check settings that depend on each other."""
        for name, condition in self.conditions.items():
            if condition.retriever in ("dense", "hybrid") and self.embedding_model is None:
                raise ConfigError(
                    f"condition '{name}' needs an embedding_model: a folder such as that of "
                    "all-MiniLM-L6-v2. Set it, or leave the condition out."
                )
            if condition.mode is not None:
                self.config_of(condition)

    def config_of(self, condition: Condition) -> MemoryConfig:
        """Return the settings of a condition's memory; emt's defaults where nothing is said."""
        mode = "passage" if condition.mode == "passage" else "token"
        given = {"memory_type": "vector_db", **self.memory, **condition.memory}
        return MemoryConfig.from_dict({**given, "mode": mode})
