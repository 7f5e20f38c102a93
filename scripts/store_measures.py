"""Measure one store: times against no memory, a process that serves it, what its search finds.

Linux only: memory is read from /proc.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import numpy as np
from bench_decode import PROMPT_TOKENS, milliseconds_a_token
from synthetic_rows import LENGTH, Queries
from transformers import PreTrainedModel

import emt
from emt.cli import quiet
from emt.model.loading import load
from emt.model.watch import watching
from memory_backends import MemoryBackend, Searcher, SearchResult, register_searcher
from memory_backends.faiss.calibration import Nearest
from memory_backends.search.scores import Precision

K = 10
CONFIG = emt.MemoryConfig.published(topk=K, sinks="one", stride=LENGTH, max_length=LENGTH)
PREFILL = 1024
QUERY_TOKENS = 64
RECALL_SHARE = 7  # one layer of so many
SCORE_ERROR = 1e-5
_SCANNED_AT_ONCE = 16_384

Run = Callable[[PreTrainedModel], float]  # returns milliseconds


class Timing(NamedTuple):
    """Medians of milliseconds, and of the ratio to no memory in the same round.

    Attributes:
        plain: milliseconds without a memory.
        milliseconds: with one.
        ratio: of both.
        layers: how many of `all_layers` had memories; if not all, the others are scaled.
    """

    plain: float
    milliseconds: float
    ratio: float
    layers: int
    all_layers: int

    @property
    def is_scaled(self) -> bool:
        """Whether it was measured on some layers and scaled to all."""
        return self.layers < self.all_layers

    def __str__(self) -> str:
        scaled = f", from {self.layers} of {self.all_layers} layers" if self.is_scaled else ""
        return f"{'≈' if scaled else ''}{self.milliseconds:.1f} ({self.ratio:.2f}{scaled})"


class Served(NamedTuple):
    """What a process that opens a store and decodes sees: seconds, and MiB of resident memory.

    Attributes:
        open_seconds: to open the store.
        first_token_seconds: the same, and to the first token of a prompt.
        growth: of memory since before opening, median over forwards.
        peak: the same, largest.
        timing: of decoding.
    """

    open_seconds: float
    first_token_seconds: float
    growth: float
    peak: float
    timing: Timing


class Setup(NamedTuple):
    """What every store is measured with.

    Attributes:
        model: it reads the memories.
        held_out: tokens that no store has.
        queries: of some layers, of such tokens.
        rounds: to take medians of.
    """

    model: PreTrainedModel
    held_out: torch.Tensor
    queries: Queries
    rounds: int


class Scan(Searcher):
    """Exact search that reads the stored keys each time, so that memory stays flat."""

    @property
    def precision(self) -> Precision:
        """Tell that the scores mean nothing."""
        return "coarse"  # so the stored keys are compared again, in float64

    def candidates(
        self, layer_idx: int, unit_queries: torch.Tensor, k: int, heads: Sequence[int] | None
    ) -> SearchResult:
        """Read all keys, some rows at a time."""
        ids, dim = self.rows.ids, unit_queries.shape[-1]
        nearest = [Nearest(np.ascontiguousarray(part), k) for part in unit_queries.numpy()]
        for first in range(0, self.rows.stored.num_rows, _SCANNED_AT_ONCE):
            last = min(first + _SCANNED_AT_ONCE, self.rows.stored.num_rows)
            rows = self.rows.stored.span(layer_idx, first, last, heads)
            start, stop = np.searchsorted(ids, (first, first + len(rows)))
            keys = rows[torch.from_numpy(ids[start:stop] - first)][..., :dim].float()
            unit = torch.nn.functional.normalize(keys, dim=-1).transpose(0, 1).contiguous()
            for one, some in zip(nearest, unit.numpy() if start < stop else (), strict=False):
                one.look_at(some, int(start))
        found = torch.from_numpy(np.stack([ids[one.positions] for one in nearest]))
        return SearchResult(torch.zeros(found.shape), found)


register_searcher("scan", Scan)


def resident_bytes() -> int:
    """Return the resident memory of this process."""
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def available_bytes() -> int:
    """Return the memory that the machine can still give."""
    text = Path("/proc/meminfo").read_text(encoding="ascii")
    found = re.search(r"MemAvailable:\s+(\d+) kB", text)
    return int(found[1]) * 1024 if found else 0


@contextlib.contextmanager
def using(
    model: PreTrainedModel, backend: MemoryBackend, layers: list[int] | None = None
) -> Iterator[None]:
    """Let a model read a memory in a `with` block."""
    memory = emt.attach(model, CONFIG.replace(layers=layers))
    memory.backend = backend
    try:
        yield
    finally:
        emt.detach(model)


def timed(
    model: PreTrainedModel,
    backend: MemoryBackend,
    run: Run,
    rounds: int,
    layers: list[int] | None = None,
) -> Timing:
    """Time a run without and with a memory in turns; with a memory of some layers, scale."""
    times = []
    for turn in range(rounds + 1):
        plain = run(model)
        with using(model, backend, layers):
            spent = run(model)
        if turn:  # the first turn warms up and loads the indexes
            times.append((plain, spent))
    num_layers = len(backend.layout.layers)
    scale = num_layers / len(layers) if layers else 1.0
    return Timing(
        statistics.median(plain for plain, _ in times),
        statistics.median(plain + scale * (spent - plain) for plain, spent in times),
        statistics.median(1 + scale * (spent / plain - 1) for plain, spent in times),
        len(layers) if layers else num_layers,
        num_layers,
    )


def decoding(held_out: torch.Tensor) -> Run:
    """Return what measures the milliseconds of a greedy step."""
    return lambda model: milliseconds_a_token(model, held_out[None, :PROMPT_TOKENS])


def prefilling(held_out: torch.Tensor) -> Run:
    """Return what measures the milliseconds of a prefill."""

    @torch.no_grad()
    def run(model: PreTrainedModel) -> float:
        started = time.perf_counter()
        model(held_out[None, :PREFILL], use_cache=True)
        return 1000 * (time.perf_counter() - started)

    return run


def serve(path: Path, held_out: list[int], cache_bytes: int | None, rounds: int) -> Served:
    """Open a store and decode; for a process of its own."""
    with quiet():
        model = load().model
    ids = torch.tensor(held_out)
    run = decoding(ids)
    run(model)  # what the model alone takes
    before = resident_bytes()
    started = time.perf_counter()
    backend = MemoryBackend.open(path, "vector_db", sinks="one", cache_bytes=cache_bytes)
    opened = time.perf_counter() - started
    with using(model, backend), torch.no_grad():
        started = time.perf_counter()
        model(ids[None, :PROMPT_TOKENS], use_cache=True).logits[:, -1].argmax()
        first = opened + time.perf_counter() - started
    seen = [resident_bytes()]
    hook = model.register_forward_hook(lambda *_: seen.append(resident_bytes()))
    timing = timed(model, backend, run, rounds)
    hook.remove()
    growth = [(found - before) / 2**20 for found in seen]
    return Served(opened, first, statistics.median(growth), max(growth), timing)


def served(path: Path, held_out: torch.Tensor, cache_bytes: int | None, rounds: int) -> Served:
    """Run `serve` in a new process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(serve, path, held_out.tolist(), cache_bytes, rounds).result()


@torch.no_grad()
def real_queries(model: PreTrainedModel, held_out: torch.Tensor) -> Queries:
    """Return unit queries (Hkv, N, D) of some layers, of tokens that no store has."""
    emt.attach(model, CONFIG)
    with watching(model) as seen:
        model(held_out[None, -LENGTH:], use_cache=False)
    emt.detach(model)
    found = {}
    for call in seen.calls[RECALL_SHARE // 2 :: RECALL_SHARE]:
        query = call.query[0, :, -QUERY_TOKENS:].float()
        grouped = query.reshape(call.key.shape[1], -1, query.shape[-1])
        found[call.layer_idx] = torch.nn.functional.normalize(grouped, dim=-1)
    return found


def recall(backend: MemoryBackend, scan: MemoryBackend, queries: Queries) -> tuple[float, float]:
    """Return the share of the nearest rows that is found: of all rows, and of all but sinks."""
    sinks = torch.from_numpy(scan.catalog.sink_rows())
    hits, wanted = np.zeros(2), np.zeros(2)
    for layer_idx, asked in queries.items():
        exact, found = scan.search(layer_idx, asked, K), backend.search(layer_idx, asked, K)
        keys = backend.fetch(layer_idx, found.ids)[0].double()  # (Hkv, N, k, D)
        scores = torch.nn.functional.cosine_similarity(keys, asked.double().unsqueeze(2), dim=-1)
        hit = (scores >= exact.scores[..., -1:] - SCORE_ERROR) & (found.ids >= 0)
        hits += [hit.sum().item(), (hit & ~torch.isin(found.ids, sinks)).sum().item()]
        wanted += [exact.ids.numel(), (~torch.isin(exact.ids, sinks)).sum().item()]
    return float(hits[0] / wanted[0]), float(hits[1] / wanted[1])


@torch.no_grad()
def likeliest(model: PreTrainedModel, backend: MemoryBackend, prompts: torch.Tensor) -> np.ndarray:
    """Return the likeliest next token after each token of prompts."""
    with using(model, backend):
        return model(prompts).logits.argmax(-1).numpy()
