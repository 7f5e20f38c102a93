"""Counterfactual retrieval: does a model say what a document says, and not what it learned?

Each item is asked under each condition, with a memory of its own document only.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from tqdm import tqdm

from emt.errors import ConfigError
from emt.model.loading import LoadedModel
from experiments.endpoint import EndpointModel
from experiments.items import Item, chosen, load_items
from experiments.responder import LocalModel, Responder
from experiments.results import Results
from experiments.retrieval.asking import asking
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
        folder: gets `results.jsonl`.
        loading: loads the model.
        responding: makes the responder of settings and `loading`; called once, after items have
            been checked, and not at all if everything was asked.

    Raises:
        ConfigError: a wrong setting, or results of other settings are there.
        DocumentError: items cannot be used.
    """
    items = chosen(load_items(settings.items), settings.splits, settings.limit)
    asked = settings.model_dump(mode="json")
    del asked["limit"]  # a later run may ask more
    asked["items_sha256"] = fingerprint(Path(settings.items).read_bytes())
    results = Results(folder / "results.jsonl", "retrieval", asked)
    responder = functools.cache(lambda: responding(settings, loading))
    left = {item.id: _left(item, settings, results) for item in items}
    num_answers = len(items) * len(settings.conditions)
    finished = num_answers - sum(map(len, left.values()))  # the file may have more
    with tqdm(total=num_answers, initial=finished, unit="answer", disable=None) as bar:
        for item in items:
            if not left[item.id]:
                continue
            with _shelf(item, folder, settings, responder()) as shelf:
                for key, name in left[item.id].items():
                    bar.set_postfix_str(f"{item.split} {name}")
                    about = {"id": item.id, "split": item.split, "condition": name}
                    about["occurrences"] = item.occurrences
                    with asking(name, settings, responder(), shelf) as ask:
                        results.add(key, {**about, **ask(item)})
                    bar.update()
    return results


def _left(item: Item, settings: RetrievalSettings, results: Results) -> dict[str, str]:
    """Return key -> condition of what `results` does not have."""
    keys = {f"{item.split}/{item.id}/{name}": name for name in settings.conditions}
    return {key: name for key, name in keys.items() if key not in results}


@contextlib.contextmanager
def _shelf(
    item: Item, folder: Path, settings: RetrievalSettings, responder: Responder
) -> Iterator[Shelf]:
    """Put an item's document on a shelf for a block."""
    stores = folder / ".scratch"
    shutil.rmtree(stores, ignore_errors=True)  # left by a run that was killed
    try:
        yield Shelf(
            [(item.title, item.context)],
            stores,
            responder,
            chunk_tokens=settings.chunk_tokens,
            retriever=settings.retriever,
        )
    finally:
        shutil.rmtree(stores, ignore_errors=True)
