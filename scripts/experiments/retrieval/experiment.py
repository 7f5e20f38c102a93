"""Counterfactual retrieval: does a model say what a document says, and not what it knew?

Each item is asked under each condition. With one document at a time, its memory holds this document
only; with many (`sizes`), one memory holds the documents of all items and other texts beside them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from emt.errors import ConfigError
from emt.model.loading import load
from experiments.items import Item, chosen, load_items
from experiments.paraphrases import paraphrased
from experiments.results import Results
from experiments.retrieval.answering import LocalModel, Responder
from experiments.retrieval.conditions import Answered, Condition, answering
from experiments.retrieval.endpoint import Endpoint
from experiments.retrieval.endpoint_model import EndpointModel
from experiments.retrieval.many_documents import Library, libraries_of
from experiments.retrieval.scoring import scores
from experiments.retrieval.settings import RetrievalSettings
from experiments.retrieval.shelf import Shelf
from experiments.retrieval.versions import joined_versions

EXPERIMENT = "retrieval"


def loaded(settings: RetrievalSettings) -> LocalModel | EndpointModel:
    """Load the model that settings name, or find its endpoint.

    Raises:
        ConfigError: it, its device, or the endpoint's URL is not there.
    """
    if settings.endpoint_name is not None:
        endpoint = Endpoint(
            settings.endpoint_name, max_new_tokens=settings.max_new_tokens, **settings.endpoint
        )
        return EndpointModel(endpoint, window=settings.window)
    found = load(settings.model)
    try:
        found.model.to(settings.device)  # type: ignore[arg-type]
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise ConfigError(f"device '{settings.device}' cannot be used: {error}") from error
    return LocalModel(
        found.model,
        found.tokenizer,
        chat=settings.chat,
        max_new_tokens=settings.max_new_tokens,
        window=settings.window,
    )


def run_retrieval(
    settings: RetrievalSettings,
    folder: Path | str,
    *,
    loading: Callable[[RetrievalSettings], Responder] = loaded,
) -> Results:
    """Ask what was not asked yet.

    Args:
        settings: what to ask.
        folder: gets `results.jsonl`; of many documents their memory too, in `stores`.
        loading: makes who answers; called once, after items have been checked, and not at all if
            everything was asked.

    Raises:
        ConfigError: a wrong setting, or results of other settings are there.
        DocumentError: items or other texts cannot be used.
    """
    folder, path = Path(folder), Path(str(settings.items))
    every = load_items(path)
    items = chosen(every, settings.splits, settings.limit)
    asked = {
        **dataclasses.asdict(settings),
        "items_sha256": _digest(path.read_bytes()),
    }
    if not settings.sizes or settings.limit is None:
        del asked["limit"]  # a later run may ask more; one memory's documents are fixed
    if not settings.endpoint:
        del asked["endpoint"]  # nothing to say about a model that is here
    if settings.wording is None:
        del asked["wording"]
    torch.manual_seed(settings.seed)
    responder = functools.cache(lambda: loading(settings))
    if not settings.sizes:
        results = Results(folder / "results.jsonl", EXPERIMENT, asked)
        libraries = [Library(item.split, [(item.title, item.context)], [item]) for item in items]
    else:
        kept = joined_versions(items)
        libraries = libraries_of(kept, settings.sizes, settings.distractors, responder())
        asked["left_out"] = {
            "same_article": len(items) - len(kept),
            "no_room": len(kept) - len(libraries[0].items),
        }
        asked["documents_sha256"] = _digest(json.dumps(libraries[-1].documents).encode())
        results = Results(folder / "results.jsonl", EXPERIMENT, asked)
    if settings.wording is not None:
        libraries = _in_other_words(libraries, paraphrased(every, Path(settings.wording)))
    _ask_all(libraries, settings, responder, results, folder)
    return results


def _in_other_words(libraries: Sequence[Library], items: Sequence[Item]) -> list[Library]:
    """Ask some items' questions instead of the libraries' own, and leave the others out."""
    reworded = {item.id: item for item in items}
    return [
        Library(
            library.label,
            library.documents,
            [reworded[item.id] for item in library.items if item.id in reworded],
        )
        for library in libraries
    ]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _ask_all(
    libraries: Sequence[Library],
    settings: RetrievalSettings,
    responder: Callable[[], Responder],
    results: Results,
    folder: Path,
) -> None:
    """Ask every item of every library under every condition, unless `results` has it."""
    conditions = settings.made_conditions()
    keys = [
        _key(library, item, condition)
        for library in libraries
        for item in library.items
        for condition in conditions
    ]
    finished = sum(key in results for key in keys)  # the file may have others, of a larger limit
    with tqdm(total=len(keys), initial=finished, unit="answer", disable=None) as bar:
        for library in libraries:
            wanted = (_key(library, item, one) for item in library.items for one in conditions)
            if all(key in results for key in wanted):
                continue
            with _shelf(library, folder, settings, responder()) as shelf:
                for condition in conditions:
                    left = [
                        (key, item)
                        for item in library.items
                        if (key := _key(library, item, condition)) not in results
                    ]
                    if not left:
                        continue
                    bar.set_postfix_str(f"{library.label} {condition.name}")
                    with answering(
                        condition,
                        responder(),
                        shelf,
                        templates=settings.made_templates(),
                        num_chunks=settings.chunks,
                    ) as answerer:
                        for key, item in left:
                            answered = answerer.answer(item)
                            results.add(key, _record(library, condition, item, answered, shelf))
                            bar.update()


def _key(library: Library, item: Item, condition: Condition) -> str:
    return f"{library.label}/{item.id}/{condition.name}"


@contextlib.contextmanager
def _shelf(
    library: Library, folder: Path, settings: RetrievalSettings, responder: Responder
) -> Iterator[Shelf]:
    """Put a library's documents on a shelf; its stores are kept if it has many documents."""
    options: dict[str, Any] = {
        "chunk_tokens": settings.chunk_tokens,
        "retriever": settings.retriever,
    }
    if settings.sizes:
        yield Shelf(library.documents, folder / "stores", responder, **options)
        return
    scratch = folder / ".scratch"
    shutil.rmtree(scratch, ignore_errors=True)  # what a run that was killed has left
    try:
        yield Shelf(library.documents, scratch, responder, **options)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _record(
    library: Library, condition: Condition, item: Item, answered: Answered, shelf: Shelf
) -> dict[str, Any]:
    """Return what is kept of one answer, as plain JSON types."""
    return {
        "id": item.id,
        "split": library.label,
        "condition": condition.name,
        "occurrences": item.occurrences,
        **scores(item, answered.text, answered.log_probs),
        "num_prompt_tokens": answered.num_prompt_tokens,
        "truncated": answered.truncated,
        "has_answer": answered.has_answer,
        "is_cited": answered.is_cited,
        "seconds": round(answered.seconds, 4),
        "memory_seconds": None if condition.memory is None else round(shelf.seconds or 0, 3),
        "text": answered.text,
    }
