"""Seconds a query over the number of queries on one document.

* `prompt`: the document is in the prompt every time;
* `prompt, cached`: its keys and values are computed once, and every query goes on from them;
* each of `memories`: it is written to a memory once, and the prompt is the query alone.

What is done once (computing the cache, writing and indexing the memory) and what each query takes
(prompt and greedy tokens) are measured apart; n queries take once + n * each.

Source: Klett and Ahle, Extended Mind Transformers (arXiv 2406.02332), section 4.4.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from emt.errors import ConfigError
from emt.ingest.windows import check_max_length
from emt.model.loading import LoadedModel
from emt.model.positions import max_positions
from experiments.results import Results
from experiments.texts import fingerprint, read_texts
from experiments.timing.settings import CACHED, PROMPT, TimingSettings
from experiments.timing.ways import Way, answer, cached, prompt, remembered


def run_timing(
    settings: TimingSettings, folder: Path, loading: Callable[[], LoadedModel]
) -> Results:
    """Measure what the results do not have yet.

    An item is one condition in one round at one document length: `once` and `queries`, in seconds,
    or why it was left out. In every round each condition has its turn, so that what else the
    machine does meanwhile meets all of them.

    Raises:
        ConfigError: the text is too short, a memory's windows are beyond the model's positions, or
            the file is of another run.
        DocumentError: the text cannot be read.
    """
    loaded = loading()
    token_ids = _token_ids(settings, loaded)
    ways = _ways(settings, loaded)
    digest = fingerprint(Path(settings.data).read_bytes())
    asked = {**settings.model_dump(mode="json"), "data_sha256": digest}
    results = Results(folder / "results.jsonl", "timing", asked)
    answer(loaded.model, token_ids[: settings.query_tokens], 2)  # what is slower the first time
    turns = list(itertools.product(settings.lengths, range(settings.rounds), ways))
    with tqdm(total=len(turns), initial=len(results), unit="turn", disable=None) as progress:
        for length, turn, name in turns:
            key = f"{length} / {turn} / {name}"
            if key in results:
                continue
            reason = _too_long(settings, loaded, name, length)
            timed = {"left_out": reason}
            if reason is None:
                queries = _queries(settings, token_ids[length:])
                timed = measure(ways[name], token_ids[:length], queries)
                timed["threads"] = torch.get_num_threads()
            results.add(key, {"length": length, "round": turn, "condition": name, **timed})
            progress.update()
    return results


def measure(way: Way, document: Tensor, queries: Sequence[Tensor]) -> dict[str, Any]:
    """Time what is done once, and each query.

    Args:
        way: a way to answer.
        document: (N,) int64.
        queries: each (Q,) int64.
    """
    started = time.perf_counter()
    with way(document) as ask:
        once = time.perf_counter() - started
        seconds = []
        for query in queries:
            started = time.perf_counter()
            ask(query)
            seconds.append(time.perf_counter() - started)
    return {"once": round(once, 4), "queries": [round(spent, 4) for spent in seconds]}


def _token_ids(settings: TimingSettings, loaded: LoadedModel) -> Tensor:
    """Return the text's tokens (T,), enough of them for the longest document and its queries."""
    for config in settings.memory_configs().values():
        check_max_length(loaded.model.config.get_text_config(), config.max_length)
    token_ids = read_texts(settings.data, loaded.tokenizer)[0].token_ids
    needed = settings.lengths[-1] + settings.measured * settings.query_tokens
    if len(token_ids) < needed:
        raise ConfigError(
            f"documents of {settings.lengths[-1]} tokens and queries after them need a text of "
            f"{needed} tokens; '{settings.data}' has {len(token_ids)}. Lower lengths."
        )
    return token_ids


def _ways(settings: TimingSettings, loaded: LoadedModel) -> dict[str, Way]:
    model, new_tokens = loaded.model, settings.new_tokens
    return {
        PROMPT: partial(prompt, model, new_tokens),
        CACHED: partial(cached, model, new_tokens),
        **{
            name: partial(remembered, loaded, new_tokens, config)
            for name, config in settings.memory_configs().items()
        },
    }


def _queries(settings: TimingSettings, token_ids: Tensor) -> list[Tensor]:
    """Cut queries of equal length from what follows the document."""
    count, length = settings.measured, settings.query_tokens
    return list(token_ids[: count * length].view(count, length))


def _too_long(settings: TimingSettings, loaded: LoadedModel, name: str, length: int) -> str | None:
    """Return why a prompt does not fit the model; None if it does."""
    positions = max_positions(loaded.model.config.get_text_config())
    needed = settings.query_tokens + settings.new_tokens
    needed += length if name in (PROMPT, CACHED) else 0
    if positions is None or needed <= positions:
        return None
    return f"{needed} tokens are beyond the model's {positions} positions"
