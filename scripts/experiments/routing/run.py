"""How often the passage that answers a question is found, and how long that takes.

Each question is routed as the passage mode does, nothing is generated. Its answer's place in the
stored text is known: a passage is right if its rows have the answer.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from emt.attach import attach, detach
from emt.config import MemoryConfig
from emt.errors import ConfigError
from emt.memory.memory import Memory
from emt.model.chat import prompt_ids
from emt.model.loading import LoadedModel
from emt.profiles.examples import read_examples
from experiments.items import read_wording
from experiments.results import Results
from experiments.routing.questions import (
    RoutedQuestion,
    digest,
    stored_questions,
    unrelated_questions,
)
from experiments.routing.settings import RoutingSettings


def run_routing(
    settings: RoutingSettings, folder: Path, loading: Callable[[], LoadedModel]
) -> Results:
    """Route what the results do not have yet.

    An item is one question at one size with one routing: what `RoutedQuestion.judged` says, whether
    anything was relevant, the heads' score, the rows recalled and seconds.

    Raises:
        ConfigError: no question is about a document of the store, or the file is of another run.
        StoreError: the store cannot be read.
    """
    if not Path(settings.store).is_dir():
        raise ConfigError(f"there is no store '{settings.store}'. Make it with `emt index`.")
    config = MemoryConfig(
        mode="passage",
        memory_type="vector_db",
        path=settings.store,
        profile=settings.profile,
        passage_rows=settings.passage_rows,
        max_passages=settings.max_passages,
        relevance=settings.relevance,
    )
    loaded = loading()
    memory = attach(loaded.model, config, tokenizer=loaded.tokenizer)
    try:
        return _route_all(settings, memory, folder)
    finally:
        detach(loaded.model)
        memory.close()


def _route_all(settings: RoutingSettings, memory: Memory, folder: Path) -> Results:
    examples = read_examples(settings.data)
    if settings.wording is not None:
        wording = read_wording(settings.wording)
        examples = [
            replace(example, question=wording[example.question])
            for example in examples
            if example.question in wording
        ]
    unrelated = unrelated_questions(settings.unrelated)
    stored = map(memory.backend.catalog.document, memory.documents)
    texts = [document for document in stored if document.text is not None]
    questions = stored_questions(examples, texts, settings.limit)
    if not questions:
        raise ConfigError(
            f"no question of '{settings.data}' is about a document of '{settings.store}'."
        )
    memory.save()  # the profile heads' indexes
    answers = {question: question.answer for question in questions if question.answer}
    asked_about = {answer.document for answer in answers.values()}
    scopes = list(_scopes(memory, settings.sizes, asked_about))
    header = {
        **settings.model_dump(mode="json"),
        "questions": len(questions),
        "left_out": len(examples) - len(questions),
        "asked_sha256": digest(
            [[a.document, asked.question, a.first, a.stop] for asked, a in answers.items()]
        ),
        "heads": [] if memory.profile is None else memory.profile.to_json()["heads"],
    }
    results = Results(folder / "results.jsonl", "routing", header)
    turns = list(itertools.product(scopes, settings.routing, [*questions, *unrelated]))
    with tqdm(total=len(turns), initial=len(results), unit="question", disable=None) as bar:
        for (num_rows, names), routing, question in turns:
            key = f"{num_rows}/{routing}/{question.key}"
            if key not in results:
                scope = {"documents": names} if names else {}
                with memory.using(routing=routing, **scope):
                    record = _routed(settings, memory, question)
                results.add(key, {"rows": num_rows, "routing": routing, **record})
                bar.update()
    return results


def _routed(settings: RoutingSettings, memory: Memory, question: RoutedQuestion) -> dict[str, Any]:
    text = settings.template.replace("{question}", question.question)
    ids = prompt_ids(memory.tokenizer, text)
    started = time.perf_counter()
    routed = memory.route(ids)
    seconds = time.perf_counter() - started
    passages = [recalled.passage for recalled in routed.passages]
    return {
        **question.judged(passages),
        "is_relevant": bool(passages),
        "score": round(routed.score, 4),
        "recalled": sum(passage.stop - passage.first for passage in passages),
        "seconds": round(seconds, 4),
    }


def _scopes(
    memory: Memory, sizes: Collection[int] | None, needed: Collection[str]
) -> Iterator[tuple[int, list[str] | None]]:
    """Yield rows and documents of each memory; all have the documents that are asked about.

    Documents are None for all of them.
    """
    every = memory.backend.catalog.document_sizes()
    if sizes is None:
        yield len(memory), None
        return
    for size in sizes:
        names = [name for name, _, _ in every if name in needed]
        num_rows = sum(rows for name, _, rows in every if name in needed)
        if num_rows > size:
            raise ConfigError(
                f"a memory of {size} rows is too small for the documents that are asked about: "
                f"{num_rows}. Raise sizes, or name fewer questions."
            )
        for name, _, rows in every:
            if name not in needed and num_rows < size:
                names.append(name)
                num_rows += rows
        yield num_rows, names if len(names) < len(every) else None
