"""Interpretability: what memories are attended to, and what the answer owes to how many there are.

Each document is remembered by itself, and its question asked under each condition: with more and
more memories, with `topk: auto`, with active retrieval. Of each answer there is kept what it says,
how likely the right and the original answer were, how many rows it retrieved, which passage it
would cite first, and how much attention each layer and head gave to memories.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from emt.attach import attach, detach
from emt.memory.memory import Memory
from emt.model.loading import LoadedModel
from experiments.interpretability.attention_mass import attention_mass, share_of_passages_with
from experiments.interpretability.settings import InterpretabilitySettings
from experiments.items import Item, chosen, load_items, says
from experiments.responder import LocalModel
from experiments.results import Results
from experiments.texts import fingerprint

_DOCUMENT = "document"


def run_interpretability(
    settings: InterpretabilitySettings, folder: Path, loading: Callable[[], LoadedModel]
) -> Results:
    """Ask what was not asked yet.

    Raises:
        ConfigError: a wrong setting, or results of other settings are there.
        DocumentError: items cannot be used.
    """
    items = chosen(load_items(settings.items), settings.splits, settings.limit)
    asked = settings.model_dump(mode="json", exclude={"limit"})  # a later run may ask more
    asked["items_sha256"] = fingerprint(Path(settings.items).read_bytes())
    loaded = loading()
    responder = LocalModel(
        loaded.model, loaded.tokenizer, chat=settings.chat, max_new_tokens=settings.max_new_tokens
    )
    results = Results(folder / "results.jsonl", "interpretability", asked)
    conditions = settings.conditions()
    finished = sum(f"{item.id}/{name}" in results for item in items for name in conditions)
    total = len(items) * len(conditions)
    with tqdm(total=total, initial=finished, unit="answer", disable=None) as bar:
        for item in items:
            left = {name: f"{item.id}/{name}" for name in conditions}
            left = {name: key for name, key in left.items() if key not in results}
            if not left:
                continue
            with _remembered(item, responder, settings) as (memory, seconds):
                for name, key in left.items():
                    record = _asked(item, responder, memory, settings, conditions[name])
                    record["remember_seconds"] = seconds
                    results.add(key, {"condition": name, **record})
                    bar.update()
    return results


@contextlib.contextmanager
def _remembered(
    item: Item, responder: LocalModel, settings: InterpretabilitySettings
) -> Iterator[tuple[Memory, float]]:
    """Attach a memory of one item's document for a block; yield it and the seconds it took."""
    memory = attach(responder.model, settings.config(), tokenizer=responder.tokenizer)
    try:
        started = time.perf_counter()
        memory.write(item.context, document=_DOCUMENT)
        yield memory, round(time.perf_counter() - started, 3)
    finally:
        detach(responder.model)
        memory.close()


def _asked(
    item: Item,
    responder: LocalModel,
    memory: Memory,
    settings: InterpretabilitySettings,
    changes: Mapping[str, Any],
) -> dict[str, Any]:
    """Ask under one condition; return a record of plain types."""
    message = settings.question.replace("{question}", item.question)
    with memory.using(**changes):
        with memory.recording() as recording:
            response = responder.respond(message)
        log_prob, original_log_prob, *_ = (*responder.log_probs(message, item.candidates), None)
        layers = memory.layers
    document = memory.backend.catalog.document(_DOCUMENT)
    cited = recording.citations(top=1)
    return {
        "item": item.id,
        "split": item.split,
        "title": item.title,
        "text": response.text,
        "token_ids": list(response.token_ids),
        "right": says(response.text, item.answer),
        "log_prob": log_prob,
        "original_log_prob": original_log_prob,
        "num_rows": len(memory),
        "num_redone": recording.num_redone,
        "num_retrieved": recording.num_retrieved,
        "cited": cited[0].text if cited else None,
        "cited_share": cited[0].share if cited else None,
        "cited_answer": bool(cited) and says(cited[0].text, item.answer),
        "chance": share_of_passages_with(document, item.answer),
        "layers": layers,
        "mass": attention_mass(recording, document, item.answer).to_json(),
        "seconds": round(response.seconds, 3),
    }
