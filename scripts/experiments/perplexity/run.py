"""Perplexity over length: what text beyond the local window is worth.

At each length L, the last `scored` tokens of a text's first L are predicted

* `window`: from the last `window` tokens, all that a truncated prompt has;
* `memory ...`: from the same window, with all tokens before it as memories;
* `full`: from all L tokens, if the model has so many positions.

All conditions score the same tokens of the same texts, so they are compared in pairs.

Source: Klett and Ahle, Extended Mind Transformers (arXiv 2406.02332), section 4.1: WikiText, a
local window of 2,048 tokens, top-k 3.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from emt.attach import attach, detach
from emt.errors import ConfigError
from emt.ingest.documents import special_ids
from emt.ingest.windows import Windows, check_max_length
from emt.memory.memory import Memory
from emt.model.loading import LoadedModel
from emt.model.positions import max_positions
from experiments.forward import nats_of_last
from experiments.perplexity.growing import GrowingMemory
from experiments.perplexity.settings import FULL, WINDOW, PerplexitySettings
from experiments.results import Results
from experiments.settings import memory_config
from experiments.texts import LongText, fingerprint, first_ids, read_texts


def run_perplexity(
    settings: PerplexitySettings, folder: Path, loading: Callable[[], LoadedModel]
) -> Results:
    """Measure what the results do not have yet.

    An item is one text at one length: `nats` summed over the scored tokens for each condition, and
    why others were left out.

    Raises:
        ConfigError: the window is beyond the model's positions, no text is as long as the shortest
            length, or the file is of another run.
        DocumentError: the texts cannot be read.
    """
    loaded = loading()
    _check_windows(settings, loaded)
    texts = read_texts(settings.data, loaded.tokenizer, piece_tokens=settings.piece_tokens)
    texts.sort(key=lambda text: -len(text.token_ids))
    before = first_ids(loaded.tokenizer)
    longest = len(before) + len(texts[0].token_ids)
    if longest < settings.lengths[0]:
        raise ConfigError(
            f"the shortest length is {settings.lengths[0]} tokens, the longest text of "
            f"'{settings.data}' has {longest}. Lower lengths, or give longer texts."
        )
    texts = texts[: settings.texts]
    digest = fingerprint(Path(settings.data).read_bytes())
    asked = {**settings.model_dump(mode="json"), "data_sha256": digest}
    results = Results(folder / "results.jsonl", "perplexity", asked)
    num_items = len(texts) * len(settings.lengths)
    with tqdm(total=num_items, initial=len(results), unit="length", disable=None) as progress:
        for text in texts:
            lengths = [n for n in settings.lengths if _key(text, n) not in results]
            for record in _measured(settings, loaded, text, before, lengths):
                results.add(_key(text, record["length"]), record)
                progress.update()
    return results


def _check_windows(settings: PerplexitySettings, loaded: LoadedModel) -> None:
    """Refuse windows that the model has no positions for."""
    config = loaded.model.config.get_text_config()
    positions = max_positions(config)
    if positions is not None and settings.window > positions:
        raise ConfigError(
            f"window ({settings.window}) must be at most the model's {positions} positions."
        )
    check_max_length(config, Windows.of(memory_config(settings.memory), config).max_length)


def _measured(
    settings: PerplexitySettings,
    loaded: LoadedModel,
    text: LongText,
    before: Tensor,
    lengths: list[int],
) -> Iterator[dict[str, Any]]:
    """Yield each length's record; `before` (n,) are the special ids that begin every prompt."""
    tokens = torch.cat([before, text.token_ids])
    reached = [length for length in lengths if length <= len(tokens)]
    recent = settings.window - len(before)
    older = {n: n - recent if n > settings.window else 0 for n in reached}
    if reached:
        config = memory_config(settings.memory)
        memory = attach(loaded.model, config, tokenizer=loaded.tokenizer)
        dropped = special_ids(config, loaded.tokenizer, loaded.model.config)
        growing = GrowingMemory(memory, tokens[: older[reached[-1]]], dropped)
        try:
            for length in reached:
                prompt = tokens[:length]
                local = torch.cat([before, prompt[-recent:]]) if older[length] else prompt
                started = time.perf_counter()
                growing.grow(older[length])
                seconds = {"remembering": _since(started)}
                scored = _scored(settings, loaded, memory, prompt, local, seconds)
                about = {"text": text.name, "length": length, "older": older[length]}
                yield {**about, "scored": settings.scored, **scored, "seconds": seconds}
        finally:
            detach(loaded.model)
            memory.close()
    for length in lengths[len(reached) :]:
        missing = f"the text has {len(tokens)} tokens"
        yield {"text": text.name, "length": length, "nats": {}, "left_out": missing}


def _scored(
    settings: PerplexitySettings,
    loaded: LoadedModel,
    memory: Memory,
    prompt: Tensor,
    local: Tensor,
    seconds: dict[str, float],
) -> dict[str, Any]:
    """Score the last tokens in all conditions; `seconds` gets what each takes.

    Args:
        settings: what to measure.
        loaded: the model.
        memory: holds the tokens before the window.
        prompt: (L,) int64, the whole text.
        local: (W,) int64, its window, special ids in front.
        seconds: by condition.
    """
    positions = max_positions(loaded.model.config.get_text_config())
    nats: dict[str, float] = {}
    record: dict[str, Any] = {"nats": nats}
    for name in settings.conditions():
        if len(local) == len(prompt) and name != WINDOW:  # all conditions see the same tokens
            nats[name] = nats[WINDOW]
            continue
        if name == FULL and positions is not None and len(prompt) > positions:
            record["without_full"] = f"the model has {positions} positions"
            continue
        topk = settings.memory_conditions().get(name)
        started = time.perf_counter()
        with memory.using(**({"enabled": False} if topk is None else {"topk": topk})):
            tokens = prompt if name == FULL else local
            nats[name] = nats_of_last(loaded.model, tokens, settings.scored)
        seconds[name] = _since(started)
    return record


def _since(started: float) -> float:
    return round(time.perf_counter() - started, 4)


def _key(text: LongText, length: int) -> str:
    return f"{text.name} / {length}"
