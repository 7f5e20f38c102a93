"""One memory's documents: in a store, in chunks, and as text."""

from __future__ import annotations

import bisect
import contextlib
import functools
import hashlib
import itertools
import json
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

from emt.attach import attach, detach
from emt.config import MemoryConfig
from emt.memory.memory import Memory
from emt.memory.using import CHANGEABLE
from experiments.comparison.chunks import Chunks
from experiments.comparison.memories import Filled
from experiments.comparison.sets import Question
from experiments.comparison.settings import ComparisonSettings, Condition
from experiments.responder import LocalModel
from experiments.spans import Span
from memory_backends.catalog.metadata import matches

_WRITING = (
    "remove_special_ids",
    "special_ids",
    "stride",
    "max_length",
    "carry_context",
    "row_codec",
)


class Library:
    """The documents of a memory; its store is written once, and shared by all conditions.

    Args:
        filled: the documents.
        settings: of the comparison.
        responder: the model.
        folder: keeps stores and embeddings.

    Attributes:
        responder: as the argument.
    """

    def __init__(
        self, filled: Filled, settings: ComparisonSettings, responder: LocalModel, folder: Path
    ) -> None:
        self._texts = {text.name: text for text in filled.documents}
        self._label = filled.label
        self.responder = responder
        self._folder = folder
        self._settings = settings
        self._written: set[Path] = set()

    @property
    def names(self) -> list[str]:
        """The documents' names."""
        return list(self._texts)

    @functools.cached_property
    def digest(self) -> str:
        """What tells these documents from others, whatever their order; 12 hex digits."""
        texts = [
            [name, text, json.dumps(about, sort_keys=True)]
            for name, text, about in self._texts.values()
        ]
        return hashlib.sha256(json.dumps(sorted(texts)).encode()).hexdigest()[:12]

    @functools.cached_property
    def chunks(self) -> Chunks:
        """All documents in chunks."""
        return Chunks(
            self._texts.values(),
            self.responder,
            self._settings.chunk_tokens,
            embedding_model=self._settings.embedding_model,
            folder=self._folder,
        )

    def documents_of(self, question: Question) -> Collection[str] | None:
        """Return the documents that a question's condition allows; None for all."""
        where = question.where
        if where is None:
            return None
        return {name for name, text in self._texts.items() if matches(text.metadata or {}, where)}

    def text_of(self, span: Span) -> str:
        """Return the text of some characters."""
        return self._texts[span.document].text[span.start : span.stop]

    def around(self, name: str, evidence: Iterable[Span], num_tokens: int) -> str:
        """Return a document, or as many tokens around the evidence in it if it is longer."""
        pieces = self.responder.split(self._texts[name].text, 1)
        if len(pieces) <= num_tokens:
            return "".join(pieces)
        ends = list(itertools.accumulate(map(len, pieces)))
        spans = [span for span in evidence if span.document == name]
        first = bisect.bisect_right(ends, min(span.start for span in spans))
        last = bisect.bisect_left(ends, max(span.stop for span in spans))
        start = min(max((first + last + 1 - num_tokens) // 2, 0), len(pieces) - num_tokens)
        return "".join(pieces[start : start + num_tokens])

    def num_tokens(self, text: str) -> int:
        """Count a text's tokens."""
        return num_tokens_of(self.responder, text)

    @contextlib.contextmanager
    def remembered(self, condition: Condition) -> Iterator[Memory | None]:
        """Attach a condition's memory for a block, None if it has none; the store is written first.

        What a memory may change while it is attached is changed so, and not by `attach`: heads stay
        indexed that the condition does not search, as others do.
        """
        if condition.mode is None:
            yield None
            return
        changes = {name: value for name, value in condition.memory.items() if name in CHANGEABLE}
        config = self._settings.config_of(condition)
        plain = self._settings.config_of(condition.model_copy(update={"memory": {}}))
        config = config.replace(**{name: getattr(plain, name) for name in changes})
        path = self._folder / self._store_name(config)
        model, tokenizer = self.responder.model, self.responder.tokenizer
        memory = attach(model, config.replace(path=str(path)), tokenizer=tokenizer)
        try:
            self._bring_up_to_date(memory, path)
            with memory.using(**changes):
                yield memory
        finally:
            detach(model)
            memory.close()

    def _bring_up_to_date(self, memory: Memory, path: Path) -> None:
        if path not in self._written and set(memory.documents) != set(self._texts):
            with tqdm(desc="reading", unit="tok", disable=None, leave=False) as bar:
                memory.write_all(self._texts.values(), on_rows=bar.update)
        else:
            memory.save()  # indexes of the heads that this condition searches
        self._written.add(path)

    def _store_name(self, config: MemoryConfig) -> str:
        """Name a store after the memory, and all that changes its rows."""
        values = config.to_dict()
        told = [self.digest, self._settings.model, {name: values[name] for name in _WRITING}]
        return f"{self._label}-{hashlib.sha256(json.dumps(told).encode()).hexdigest()[:12]}"


def num_tokens_of(responder: LocalModel, text: str) -> int:
    """Count a text's tokens, without special ones."""
    return len(responder.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
