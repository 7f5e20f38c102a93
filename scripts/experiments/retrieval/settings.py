"""What the retrieval experiment is asked to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from emt.errors import ConfigError
from emt.model.loading import DEFAULT_MODEL
from experiments.checks import check, check_memory, is_seed, is_text
from experiments.retrieval.conditions import DEFAULT, FIXED, Condition, conditions_of
from experiments.retrieval.prompts import Templates
from experiments.retrieval.rag import retriever_of

_ENDPOINT = "endpoint:"


@dataclass(frozen=True, kw_only=True)
class RetrievalSettings:
    """What to ask whom.

    Attributes:
        items: a .jsonl or .parquet file, as `experiments.items` reads it.
        model: what `load` takes; or `endpoint:NAME`, a model behind the endpoint that
            the environment names, for conditions without a memory.
        endpoint: how it is asked: `parameters`, `timeout` and `attempts` of
            `experiments.retrieval.endpoint.Endpoint`.
        device: where the model runs.
        splits: of the items to use; None for all.
        limit: items of each split, the first ones; None for all.
        conditions: names, or name -> `kind` and `memory`; see `retrieval.conditions`.
        baseline: the condition that others are compared with.
        memory: settings of every memory, keys of `MemoryConfig`.
        window: positions a prompt and its answer may take; None for what the model has.
        max_new_tokens: length of an answer.
        chat: use the model's chat template; None for "if it has one".
        templates: wording: `question`, `document`.
        retriever: ranks chunks: "bm25", or "module:Class" that is made as `BM25` is.
        chunk_tokens: length of a chunk.
        chunks: how many go into the prompt.
        wording: a file of the items' questions in other words, as `experiments.paraphrases`
            reads it; items without one are left out. None for the items' own.
        sizes: tokens of one memory of many documents, each size asked in turn; None for one
            document at a time.
        distractors: files and folders of other texts for `sizes`.
        seed: of the intervals.

    Raises:
        ConfigError: a wrong value.
    """

    items: str | None = None
    model: str = DEFAULT_MODEL
    endpoint: Mapping[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    splits: Sequence[str] | None = None
    limit: int | None = None
    conditions: Mapping[str, Any] | Sequence[str] = DEFAULT
    baseline: str = "closed_book"
    memory: Mapping[str, Any] = field(default_factory=dict)
    window: int | None = None
    max_new_tokens: int = 30
    chat: bool | None = None
    templates: Mapping[str, str] = field(default_factory=dict)
    retriever: str = "bm25"
    chunk_tokens: int = 500
    chunks: int = 5
    wording: str | None = None
    sizes: Sequence[int] | None = None
    distractors: Sequence[str] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.items, str):
            raise ConfigError(f"items must name a file: items=FILE; got {self.items!r}.")
        for name in ("model", "device"):
            check(self, name, is_text, "text")
        check(self, "chat", lambda v: v is None or isinstance(v, bool), "true, false or null")
        check(self, "wording", lambda v: v is None or is_text(v), "a file name or null")
        check(self, "seed", is_seed, "a whole number of at least 0")
        for name in ("limit", "window", "max_new_tokens", "chunk_tokens", "chunks"):
            value = getattr(self, name)
            if value is None and name in ("limit", "window"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1; got {value!r}.")
        for name in ("splits", "sizes", "distractors"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, list | tuple):
                raise ConfigError(f"{name} must be a list; got {value!r}.")
        sizes = list(self.sizes or ())
        if not all(isinstance(size, int) and size > 0 for size in sizes) or sizes != sorted(sizes):
            raise ConfigError(f"sizes must be numbers of tokens, ascending; got {self.sizes!r}.")
        for name in ("memory", "templates", "endpoint"):
            if not isinstance(getattr(self, name), Mapping):
                raise ConfigError(f"{name} must be a mapping; got {getattr(self, name)!r}.")
        check_memory(self.memory, "memory", fixed=FIXED)
        retriever_of(self.retriever)
        names = [condition.name for condition in self.made_conditions()]
        if self.baseline not in names:
            raise ConfigError(
                f"baseline must be one of the conditions {', '.join(names)}; got {self.baseline!r}."
            )
        self.made_templates()
        self._check_endpoint()

    @property
    def endpoint_name(self) -> str | None:
        """The model's name at the endpoint; None for a model that is loaded here."""
        if not self.model.startswith(_ENDPOINT):
            return None
        return self.model.removeprefix(_ENDPOINT)

    def _check_endpoint(self) -> None:
        for key in self.endpoint:
            if key not in ("parameters", "timeout", "attempts"):
                raise ConfigError(
                    f"endpoint has the keys parameters, timeout and attempts; got {key!r}."
                )
        if self.endpoint_name is None:
            return
        kept = [condition for condition in self.made_conditions() if condition.memory is None]
        for condition in self.made_conditions():
            if condition.memory is not None:
                raise ConfigError(
                    f"condition '{condition.name}' needs the model itself, which an endpoint does "
                    f"not give. Set conditions to [{', '.join(one.name for one in kept)}]."
                )

    def made_conditions(self) -> list[Condition]:
        """Return the conditions."""
        return conditions_of(self.conditions, self.memory)

    def made_templates(self) -> Templates:
        """Return the templates."""
        unknown = [name for name in self.templates if name not in ("question", "document")]
        if unknown:
            raise ConfigError(f"templates are question and document; got {unknown[0]!r}.")
        return Templates(**self.templates)
