"""Seconds a query over the number of queries on one document.

* `prompt`: the document is in the prompt every time;
* `prompt, cached`: its keys and values are computed once, and every query goes on from them;
* each of `memories`: it is written to a memory once, and the prompt is the query alone.

What is done once (computing the cache, writing and indexing the memory) and what each query takes
(prompt and greedy tokens) are measured apart; n queries take once + n * each.

Source: Klett and Ahle, Extended Mind Transformers (arXiv 2406.02332), section 4.4.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from emt.errors import ConfigError
from emt.ingest.windows import check_max_length
from emt.model.loading import LoadedModel
from emt.model.positions import max_positions
from experiments.results import Results
from experiments.texts import fingerprint, read_texts
from experiments.timing.settings import CACHED, PROMPT, TimingSettings
from experiments.timing.ways import Condition, cached, greedy, prompt, remembered


def run_timing(settings: TimingSettings, loaded: LoadedModel, path: Path | str) -> Results:
    """Measure what a results file does not have yet.

    In every round each condition has its turn, so that what else the machine does meanwhile meets
    all of them.

    Args:
        settings: what to measure.
        loaded: the model and its tokenizer.
        path: the results file, `.jsonl`; each item is one condition in one round at one document
            length: `once` and `queries`, in seconds, or why it was left out.

    Raises:
        ConfigError: the text is too short, a memory's windows are beyond the model's positions, or
            the file is of another run.
        DocumentError: the text cannot be read.
    """
    model = loaded.model
    token_ids = read_texts(settings.data, loaded.tokenizer)[0].token_ids
    needed = settings.lengths[-1] + settings.measured * settings.query_tokens
    if len(token_ids) < needed:
        raise ConfigError(
            f"documents of {settings.lengths[-1]} tokens and queries after them need a text of "
            f"{needed} tokens; '{settings.data}' has {len(token_ids)}. Lower lengths."
        )
    for config in settings.memory_configs().values():
        check_max_length(model.config.get_text_config(), config.max_length)
    asked = {**dataclasses.asdict(settings), "data_sha256": fingerprint(settings.data)}
    results = Results(path, "timing", asked)
    conditions = _conditions(settings, loaded)
    _warm_up(model, token_ids[: settings.query_tokens])
    num_items = len(settings.lengths) * settings.rounds * len(conditions)
    with tqdm(total=num_items, initial=len(results), unit="turn", disable=None) as progress:
        for length in settings.lengths:
            for turn in range(settings.rounds):
                for name, condition in conditions.items():
                    key = f"{length} / {turn} / {name}"
                    if key in results:
                        continue
                    record = {"length": length, "round": turn, "condition": name}
                    reason = _too_long(settings, model, name, length)
                    if reason is None:
                        queries = _queries(settings, token_ids[length:])
                        timed = measure(condition, token_ids[:length], queries)
                        results.add(key, {**record, **timed, "threads": torch.get_num_threads()})
                    else:
                        results.add(key, {**record, "left_out": reason})
                    progress.update()
    return results


def measure(condition: Condition, document: Tensor, queries: Sequence[Tensor]) -> dict[str, Any]:
    """Time one condition: what is done once, and each query.

    Args:
        condition: what is timed.
        document: (N,) int64.
        queries: each (Q,) int64.
    """
    started = time.perf_counter()
    with condition(document) as ask:
        once = time.perf_counter() - started
        seconds = []
        for query in queries:
            started = time.perf_counter()
            ask(query)
            seconds.append(time.perf_counter() - started)
    return {"once": round(once, 4), "queries": [round(spent, 4) for spent in seconds]}


def _conditions(settings: TimingSettings, loaded: LoadedModel) -> dict[str, Condition]:
    model, new_tokens = loaded.model, settings.new_tokens
    found: dict[str, Condition] = {
        PROMPT: partial(prompt, model, new_tokens),
        CACHED: partial(cached, model, new_tokens),
    }
    for name, config in settings.memory_configs().items():
        found[name] = partial(remembered, loaded, new_tokens, config)
    return found


def _queries(settings: TimingSettings, token_ids: Tensor) -> list[Tensor]:
    """Cut queries of equal length from what follows the document."""
    count, length = settings.measured, settings.query_tokens
    return list(token_ids[: count * length].view(count, length))


def _too_long(
    settings: TimingSettings, model: PreTrainedModel, name: str, length: int
) -> str | None:
    """Return why a prompt does not fit the model; None if it does."""
    positions = max_positions(model.config.get_text_config())
    asked = settings.query_tokens + settings.new_tokens
    needed = length + asked if name in (PROMPT, CACHED) else asked
    if positions is None or needed <= positions:
        return None
    return f"{needed} tokens are beyond the model's {positions} positions"


def _warm_up(model: PreTrainedModel, query: Tensor) -> None:
    """Run once what is slower the first time."""
    greedy(model, query, 2)
