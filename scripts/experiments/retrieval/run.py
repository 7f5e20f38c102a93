"""Counterfactual retrieval: does a model say what a document says, and not what it learned?

Each item is asked under each condition. With one document at a time, its memory holds this document
only; with many (`sizes`), one memory holds the documents of all items and other texts beside them.
"""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from emt.errors import ConfigError
from emt.model.loading import LoadedModel
from experiments.endpoint import EndpointModel
from experiments.items import Item, chosen, load_items, read_wording, reworded
from experiments.responder import LocalModel, Responder
from experiments.results import Results
from experiments.retrieval.asking import asking
from experiments.retrieval.joined import joined_versions
from experiments.retrieval.libraries import Library, libraries_of
from experiments.retrieval.settings import RetrievalSettings
from experiments.retrieval.shelf import Shelf
from experiments.texts import fingerprint


def responder_of(
    settings: RetrievalSettings, loading: Callable[[], LoadedModel]
) -> LocalModel | EndpointModel:
    """Load the model that settings name, or find its endpoint.

    Raises:
        ConfigError: the model, its device, or the endpoint's URL is not there.
    """
    options = {"max_new_tokens": settings.max_new_tokens, "window": settings.window}
    if settings.endpoint_name is not None:
        return EndpointModel(settings.endpoint_name, **options, **settings.endpoint.model_dump())
    loaded = loading()
    try:
        loaded.model.to(settings.device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise ConfigError(f"device '{settings.device}' cannot be used: {error}") from error
    return LocalModel(loaded.model, loaded.tokenizer, chat=settings.chat, **options)


def run_retrieval(
    settings: RetrievalSettings,
    folder: Path,
    loading: Callable[[], LoadedModel],
    *,
    responding: Callable[..., Responder] = responder_of,
) -> Results:
    """Ask what was not asked yet.

    Args:
        settings: what to ask.
        folder: gets `results.jsonl`; of many documents their memory too, in `stores`.
        loading: loads the model.
        responding: makes the responder of settings and `loading`; called once, after items have
            been checked, and not at all if everything was asked.

    Raises:
        ConfigError: a wrong setting, or results of other settings are there.
        DocumentError: items or other texts cannot be used.
    """
    every = load_items(settings.items)
    items = chosen(every, settings.splits, settings.limit)
    asked = settings.model_dump(mode="json")
    asked["items_sha256"] = fingerprint(Path(settings.items).read_bytes())
    responder = functools.cache(lambda: responding(settings, loading))
    if settings.sizes:
        kept = joined_versions(items)
        libraries = libraries_of(kept, settings.sizes, settings.distractors, responder())
        asked["left_out"] = {
            "same_article": len(items) - len(kept),
            "no_room": len(kept) - len(libraries[0].items),
        }
        asked["documents_sha256"] = fingerprint(json.dumps(libraries[-1].documents).encode())
    else:
        del asked["limit"]  # a later run may ask more; one memory's documents are fixed
        libraries = [Library(item.split, [(item.title, item.context)], [item]) for item in items]
    if settings.wording is not None:
        wording = read_wording(settings.wording)
        libraries = [replace(one, items=reworded(one.items, wording)) for one in libraries]
    results = Results(folder / "results.jsonl", "retrieval", asked)
    _ask_all(libraries, settings, responder, results, folder)
    return results


def _ask_all(
    libraries: Sequence[Library],
    settings: RetrievalSettings,
    responder: Callable[[], Responder],
    results: Results,
    folder: Path,
) -> None:
    """Ask every item of every library under every condition, unless `results` has it."""
    num_answers = sum(len(library.items) for library in libraries) * len(settings.conditions)
    if not num_answers:
        raise ConfigError(f"'{settings.wording}' asks none of the items in other words.")
    left = [
        {name: _left(library, name, results) for name in settings.conditions}
        for library in libraries
    ]
    num_left = sum(len(items) for waiting in left for items in waiting.values())
    finished = num_answers - num_left  # the file may have others, of a larger limit
    with tqdm(total=num_answers, initial=finished, unit="answer", disable=None) as bar:
        for library, waiting in zip(libraries, left, strict=True):
            if not any(waiting.values()):
                continue
            with _shelf(library, folder, settings, responder()) as shelf:
                for name, items in waiting.items():
                    if not items:
                        continue
                    bar.set_postfix_str(f"{library.label} {name}")
                    with asking(name, settings, responder(), shelf) as ask:
                        for key, item in items.items():
                            about = {"id": item.id, "split": library.label, "condition": name}
                            about["occurrences"] = item.occurrences
                            results.add(key, {**about, **ask(item)})
                            bar.update()


def _left(library: Library, condition: str, results: Results) -> dict[str, Item]:
    """Return key -> item of what `results` does not have."""
    keys = {f"{library.label}/{item.id}/{condition}": item for item in library.items}
    return {key: item for key, item in keys.items() if key not in results}


@contextlib.contextmanager
def _shelf(
    library: Library, folder: Path, settings: RetrievalSettings, responder: Responder
) -> Iterator[Shelf]:
    """Put a library's documents on a shelf; its stores are kept if it has many documents."""
    stores = folder / ("stores" if settings.sizes else ".scratch")
    shelf = Shelf(
        library.documents,
        stores,
        responder,
        chunk_tokens=settings.chunk_tokens,
        retriever=settings.retriever,
    )
    if settings.sizes:
        yield shelf
        return
    shutil.rmtree(stores, ignore_errors=True)  # left by a run that was killed
    try:
        yield shelf
    finally:
        shutil.rmtree(stores, ignore_errors=True)
