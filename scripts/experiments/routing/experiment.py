"""How often the passage that answers a question is found, and how long that takes.

Each question is routed as the passage mode does, nothing is generated. Its answer's place in the
stored text is known: a passage is right if its rows have the answer.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from emt.attach import attach, detach
from emt.config import MemoryConfig
from emt.errors import ConfigError
from emt.memory.memory import Memory
from emt.model.chat import prompt_ids
from emt.model.loading import LoadedModel
from emt.passage import Passage, Routed
from emt.profiles.examples import Example, read_examples
from experiments.results import Results
from experiments.routing.settings import RoutingSettings
from memory_backends import StoredDocument

_AROUND = 40  # characters on both sides of an answer, by which its place is known again


@dataclass(frozen=True)
class Asked:
    """A question about a stored document.

    Attributes:
        document: its name.
        question: what is asked.
        first: row of the document at which the answer begins.
        stop: one after its last row.
    """

    document: str
    question: str
    first: int
    stop: int

    @property
    def key(self) -> str:
        """What tells it from others."""
        return f"{self.document}/{self.first}/{_digest(self.question)}"

    def judged(self, passages: list[Passage]) -> dict[str, Any]:
        """Tell what of the answer is in some passages, best first."""
        right = [
            one.document == self.document and one.first <= self.first and self.stop <= one.stop
            for one in passages
        ]
        return {
            "document": bool(passages) and passages[0].document == self.document,
            "first": right[:1] == [True],
            "any": any(right),
        }


@dataclass(frozen=True)
class Unrelated:
    """A prompt about nothing in the store.

    Attributes:
        question: what is asked.
    """

    question: str

    @property
    def key(self) -> str:
        """What tells it from others."""
        return f"unrelated/{_digest(self.question)}"

    def judged(self, passages: list[Passage]) -> dict[str, Any]:
        """Tell that there is no right passage."""
        return {"document": None, "first": None, "any": None}


def run_routing(settings: RoutingSettings, loaded: LoadedModel, path: Path | str) -> Results:
    """Route what a results file does not have yet.

    Args:
        settings: what to ask.
        loaded: the model and its tokenizer.
        path: the results file; each item is one question at one size with one routing: whether the
            right document was named first, whether the first passage and any of them has the
            answer, whether anything was relevant, the heads' score, and seconds.

    Raises:
        ConfigError: no question is about a document of the store, or the file is of another run.
        StoreError: there is no such store.
    """
    config = MemoryConfig(
        mode="passage",
        memory_type="vector_db",
        path=settings.store,
        profile=settings.profile,
        passage_rows=settings.passage_rows,
        max_passages=settings.max_passages,
        relevance=settings.relevance,
    )
    if not Path(str(settings.store)).is_dir():
        raise ConfigError(f"there is no store '{settings.store}'. Make it with `emt index`.")
    memory = attach(loaded.model, config, tokenizer=loaded.tokenizer)
    try:
        return _run(settings, loaded, memory, path)
    finally:
        detach(loaded.model)
        memory.close()


def _run(
    settings: RoutingSettings, loaded: LoadedModel, memory: Memory, path: Path | str
) -> Results:
    examples = read_examples(str(settings.data))
    if settings.wording is not None:
        examples = list(_in_other_words(examples, settings.wording))
    asked = _asked(memory, examples, settings.limit)
    if not asked:
        raise ConfigError(
            f"no question of '{settings.data}' is about a document of '{settings.store}'."
        )
    memory.save()  # the profile heads' indexes
    sizes = list(_sizes(memory, settings.sizes, {one.document for one in asked}))
    header = {
        **dataclasses.asdict(settings),
        "questions": len(asked),
        "left_out": len(examples) - len(asked),
        "asked_sha256": _digest([dataclasses.astuple(one) for one in asked]),
        "heads": memory.passages.profile.to_json()["heads"],
    }
    results = Results(path, "routing", header)
    questions: list[Asked | Unrelated] = [*asked]
    questions += map(Unrelated, _unrelated(settings.unrelated))
    turns = list(itertools.product(sizes, settings.routing, questions))
    with tqdm(total=len(turns), initial=len(results), unit="question", disable=None) as bar:
        for (rows, names), group in itertools.groupby(turns, key=lambda turn: turn[0]):
            with memory.using(documents=names) if names else memory.using():
                for _, routing, one in group:
                    key = f"{rows}/{routing}/{one.key}"
                    if key not in results:
                        results.add(key, _routed(settings, loaded, memory, one, routing, rows))
                        bar.update()
    return results


def _routed(
    settings: RoutingSettings,
    loaded: LoadedModel,
    memory: Memory,
    one: Asked | Unrelated,
    routing: str,
    rows: int,
) -> dict[str, Any]:
    ids = prompt_ids(loaded.tokenizer, settings.template.replace("{question}", one.question))
    with memory.using(routing=routing):
        started = time.perf_counter()
        (routed,) = memory.passages.finder.route([ids])
        seconds = time.perf_counter() - started
    return {
        "rows": rows,
        "routing": routing,
        **one.judged([found.passage for found in routed.passages]),
        "is_relevant": bool(routed.passages),
        "score": round(routed.score, 4),
        "recalled": _rows(routed),
        "seconds": round(seconds, 4),
    }


def _rows(routed: Routed) -> int:
    return sum(found.passage.stop - found.passage.first for found in routed.passages)


def _asked(memory: Memory, examples: list[Example], limit: int | None) -> list[Asked]:
    """Find the questions that are about stored documents, and their answers' rows."""
    documents = [
        document
        for name in memory.documents
        if (document := memory.backend.catalog.document(name)).text is not None
    ]
    counts: dict[str, int] = {}
    found = {}
    for example in examples:
        low = max(example.start - _AROUND, 0)
        around = example.document[low : example.end + _AROUND]
        for document in documents:
            at = (document.text or "").find(around)
            if at < 0:
                continue
            counts[document.name] = counts.get(document.name, 0) + 1
            if limit is None or counts[document.name] <= limit:
                start = at + example.start - low
                end = start + example.end - example.start
                one = Asked(document.name, example.question, *_rows_of(document, start, end))
                found[dataclasses.astuple(one)] = one
            break
    return list(found.values())


def _rows_of(document: StoredDocument, start: int, end: int) -> tuple[int, int]:
    assert document.offsets is not None  # it has a text
    spans = document.offsets[document.row_tokens]
    rows = np.flatnonzero((spans[:, 1] > start) & (spans[:, 0] < end))
    return int(rows[0]), int(rows[-1]) + 1


def _unrelated(path: str | None) -> list[str]:
    if path is None:
        return []
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"unrelated prompts '{path}' cannot be read: {error}") from error
    return list(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))


def _in_other_words(examples: list[Example], path: str) -> Iterator[Example]:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        words = {(row := json.loads(line))["original"]: row["question"] for line in lines if line}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"wording '{path}' must have objects with original and question, one a line: {error}"
        ) from error
    for example in examples:
        if example.question in words:
            yield dataclasses.replace(example, question=words[example.question])


def _sizes(
    memory: Memory, sizes: list[int] | None, needed: set[str]
) -> Iterator[tuple[int, list[str] | None]]:
    """Yield rows and documents of each memory; all have the documents that are asked about."""
    every = memory.backend.catalog.document_sizes()
    if sizes is None:
        yield len(memory), None
        return
    for size in sizes:
        names = [name for name, _, _ in every if name in needed]
        rows = sum(num_rows for name, _, num_rows in every if name in needed)
        if rows > size:
            raise ConfigError(
                f"a memory of {size} rows is too small for the documents that are asked about: "
                f"{rows}. Raise sizes, or name fewer questions."
            )
        for name, _, num_rows in every:
            if name not in needed and rows < size:
                names.append(name)
                rows += num_rows
        yield rows, names if len(names) < len(every) else None


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]
