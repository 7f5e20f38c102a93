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

import dataclasses
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from emt.attach import attach, detach
from emt.config import MemoryConfig
from emt.errors import ConfigError
from emt.ingest.documents import special_ids
from emt.ingest.windows import check_max_length
from emt.memory.memory import Memory
from emt.model.loading import LoadedModel
from emt.model.positions import max_positions
from experiments.forward import nats_of_last
from experiments.perplexity.growing import GrowingMemory
from experiments.perplexity.settings import FULL, WINDOW, PerplexitySettings
from experiments.results import Results
from experiments.texts import LongText, fingerprint, first_ids, read_texts
from memory_backends import MemoryBackend


def run_perplexity(settings: PerplexitySettings, loaded: LoadedModel, path: Path | str) -> Results:
    """Measure what a results file does not have yet.

    Args:
        settings: what to measure.
        loaded: the model and its tokenizer.
        path: the results file, `.jsonl`; each item is one text at one length, with `nats` summed
            over the scored tokens for each condition, and why others were left out.

    Raises:
        ConfigError: the window is beyond the model's positions, no text is as long as the shortest
            length, or the file is of another run.
        DocumentError: the texts cannot be read.
    """
    check_window(settings, loaded)
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
    asked = {**dataclasses.asdict(settings), "data_sha256": fingerprint(settings.data)}
    results = Results(path, "perplexity", asked)
    num_items = len(texts) * len(settings.lengths)
    with tqdm(total=num_items, initial=len(results), unit="length", disable=None) as progress:
        for text in texts:
            todo = [n for n in settings.lengths if _key(text, n) not in results]
            for length, record in _measured(settings, loaded, text, before, todo):
                results.add(_key(text, length), record)
                progress.update()
    return results


def check_window(settings: PerplexitySettings, loaded: LoadedModel) -> None:
    """Refuse windows that the model has no positions for.

    Raises:
        ConfigError: naming both numbers.
    """
    positions = max_positions(loaded.model.config.get_text_config())
    if positions is not None and settings.window > positions:
        raise ConfigError(
            f"window ({settings.window}) must be at most the model's {positions} positions."
        )
    check_max_length(
        loaded.model.config.get_text_config(), MemoryConfig.from_dict(settings.memory).max_length
    )


def _measured(
    settings: PerplexitySettings,
    loaded: LoadedModel,
    text: LongText,
    before: Tensor,
    lengths: list[int],
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield each length's record."""
    tokens = torch.cat([before, text.token_ids])
    reached = [length for length in lengths if length <= len(tokens)]
    # The window starts with the special ids, too, as every prompt does.
    recent = settings.window - len(before)
    older = {n: n - recent if n > settings.window else 0 for n in reached}
    if reached:
        with _remembering(settings, loaded, tokens[: older[reached[-1]]]) as memories:
            for length in reached:
                whole = tokens[:length]
                window = torch.cat([before, whole[-recent:]]) if older[length] else whole
                yield (
                    length,
                    {
                        "text": text.name,
                        "length": length,
                        "older": older[length],
                        "scored": settings.scored,
                        **memories.measure(whole, window, older[length]),
                    },
                )
    for length in lengths[len(reached) :]:
        missing = f"the text has {len(tokens)} tokens"
        yield length, {"text": text.name, "length": length, "nats": {}, "left_out": missing}


@dataclass(frozen=True)
class _Remembering:
    """A model with the memories of one text, of each kind of sinks."""

    settings: PerplexitySettings
    loaded: LoadedModel
    memory: Memory
    backends: Mapping[str, MemoryBackend]
    growing: GrowingMemory

    def measure(self, whole: Tensor, window: Tensor, older: int) -> dict[str, Any]:
        """Score the last tokens of `whole` in all conditions, after `older` tokens of memories."""
        started = time.perf_counter()
        self.growing.grow(older)
        seconds = {"remembering": _since(started)}
        nats: dict[str, float] = {}
        record: dict[str, Any] = {"nats": nats, "seconds": seconds}
        positions = max_positions(self.loaded.model.config.get_text_config())
        for name in self.settings.conditions():
            if not older and name != WINDOW:  # no condition sees more than the window
                nats[name] = nats[WINDOW]
            elif name == FULL and positions is not None and len(whole) > positions:
                record["without_full"] = f"the model has {positions} positions"
            else:
                started = time.perf_counter()
                nats[name] = self._score(name, whole if name == FULL else window)
                seconds[name] = _since(started)
        return record

    def _score(self, name: str, token_ids: Tensor) -> float:
        """Return the nats of the last tokens in one condition."""
        options: dict[str, Any] = {"enabled": False}
        if name not in (WINDOW, FULL):
            sinks, topk = self.settings.memory_conditions()[name]
            self.memory.backend = self.backends[sinks]
            options = {"topk": topk}
        with self.memory.using(**options):
            return nats_of_last(self.loaded.model, token_ids, self.settings.scored)


@contextmanager
def _remembering(
    settings: PerplexitySettings, loaded: LoadedModel, token_ids: Tensor
) -> Iterator[_Remembering]:
    """Attach memories that can grow to `token_ids` (T,), and detach at the end."""
    config = MemoryConfig.from_dict(settings.memory)
    model, tokenizer = loaded.model, loaded.tokenizer
    backends: dict[str, MemoryBackend] = {}
    for sinks in settings.sinks:
        if backends:
            detach(model)
        memory = attach(model, config.replace(sinks=sinks), tokenizer=tokenizer)
        backends[sinks] = memory.backend
    dropped = special_ids(config, tokenizer, model.config)
    growing = GrowingMemory(memory, token_ids, backends.values(), dropped)
    try:
        yield _Remembering(settings, loaded, memory, backends, growing)
    finally:
        detach(model)
        for backend in backends.values():
            backend.close()


def _since(started: float) -> float:
    return round(time.perf_counter() - started, 4)


def _key(text: LongText, length: int) -> str:
    return f"{text.name} / {length}"
