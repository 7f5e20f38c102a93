"""Asks the questions of some sets under each condition, of memories of each size.

Results go on where they stopped. More sets, sizes, conditions and questions can be asked later;
what was asked of other documents, or under a condition of other settings, is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from emt.errors import ConfigError
from emt.model.loading import LoadedModel
from experiments.comparison.asking import asking
from experiments.comparison.library import Library, num_tokens_of
from experiments.comparison.memories import Filled, filled_memories
from experiments.comparison.sets import Question, read_set
from experiments.comparison.settings import ComparisonSettings, Condition
from experiments.responder import LocalModel
from experiments.results import Results

_GROWING = ("sets", "sizes", "conditions", "limit", "together", "distractors", "stores")


def run_comparison(
    settings: ComparisonSettings, folder: Path, loading: Callable[[], LoadedModel]
) -> Results:
    """Ask what was not asked yet.

    Args:
        settings: what to ask.
        folder: gets `results.jsonl`, and the memories in `stores`.
        loading: loads the model.

    Raises:
        ConfigError: a wrong setting, or results of other settings are there.
        DocumentError: a set or other texts cannot be used.
    """
    sets = [read_set(name) for name in settings.sets]
    twice = {one.name for one in sets if sum(one.name == other.name for other in sets) > 1}
    if twice:
        raise ConfigError(f"sets must have names of their own; {', '.join(twice)} comes twice.")
    responder = _responder(settings, loading)

    def cut(text: str, length: int | None) -> tuple[str, int]:
        if length is not None:
            text = responder.split(text, length)[0]
        return text, num_tokens_of(responder, text)

    memories = filled_memories(
        sets,
        together=settings.together,
        sizes=settings.sizes,
        distractors=settings.distractors,
        cut=cut,
    )
    asked = settings.model_dump(mode="json")
    fixed = {name: value for name, value in asked.items() if name not in _GROWING}
    results = Results(folder / "results.jsonl", "comparison", fixed)
    stores = folder / "stores" if settings.stores is None else Path(settings.stores)
    for filled in memories:
        _ask_all(filled, Library(filled, settings, responder, stores), settings, results)
    return results


def _ask_all(
    filled: Filled, library: Library, settings: ComparisonSettings, results: Results
) -> None:
    """Ask all questions of one memory under each condition."""
    questions = _limited(filled.questions, settings.limit)
    left = {
        name: _left(name, condition, questions, filled, library, results)
        for name, condition in settings.conditions.items()
    }
    num_left = sum(map(len, left.values()))
    if not num_left:
        return
    with tqdm(total=num_left, unit="question", desc=filled.label, disable=None) as bar:
        for name, waiting in left.items():
            if not waiting:
                continue
            bar.set_postfix_str(name)
            with asking(settings.conditions[name], settings, library) as ask:
                for key, (question, digest) in waiting.items():
                    about = {
                        "memory": filled.name,
                        "size": filled.size,
                        "set": question.set,
                        "id": question.id,
                        "kind": question.kind,
                        "condition": name,
                        "has_answer": bool(question.answers),
                    }
                    results.add(key, {**about, **ask(question), "digest": digest})
                    bar.update()


def _limited(questions: list[Question], limit: int | None) -> list[Question]:
    """Return the first questions of each set."""
    taken: dict[str, int] = {}
    kept = []
    for question in questions:
        taken[question.set] = taken.get(question.set, 0) + 1
        if limit is None or taken[question.set] <= limit:
            kept.append(question)
    return kept


def _left(
    name: str,
    condition: Condition,
    questions: list[Question],
    filled: Filled,
    library: Library,
    results: Results,
) -> dict[str, tuple[Question, str]]:
    """Return key -> question and digest of what `results` does not have.

    Raises:
        ConfigError: it has it of other documents, or under other settings.
    """
    left = {}
    for question in questions:
        if not (question.answers or condition.is_routed):
            continue  # nothing can be told
        key = f"{filled.label}/{question.set}/{question.id}/{name}"
        digest = _digest([library.digest, condition.model_dump(mode="json"), asdict(question)])
        if key not in results:
            left[key] = question, digest
        elif results.items[key]["digest"] != digest:
            raise ConfigError(
                f"results '{results.path}' have '{key}', asked of other documents or under a "
                "condition of other settings. Give this run another output, or delete the file."
            )
    return left


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def _responder(settings: ComparisonSettings, loading: Callable[[], LoadedModel]) -> LocalModel:
    """Return the model that answers.

    Raises:
        ConfigError: the device cannot be used.
    """
    loaded = loading()
    try:
        loaded.model.to(settings.device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise ConfigError(f"device '{settings.device}' cannot be used: {error}") from error
    options: Mapping[str, Any] = {
        "chat": settings.chat,
        "window": settings.window,
        "max_new_tokens": settings.max_new_tokens,
    }
    return LocalModel(loaded.model, loaded.tokenizer, **options)
