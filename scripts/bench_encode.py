"""How fast documents are read into a store, against the plain model reading the same tokens.

Times `Memory.write_all` with the index built (`vector_db`, "auto") against a plain prefill of the
same tokens: the decoder alone, without its language-model head, in windows of `max_length` tokens,
or document by document. Making a head profile is timed against a plain prefill of 6,000 tokens. All
are timed in turns in one run, so that ratios hold on a noisy machine; `--cpu` counts the process's
CPU seconds instead, where others share the machine. Writes `benchmarks/encode.md`.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import faiss
from bench_decode import ROOT, machine, token_ids
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import emt
from emt.cli import quiet
from emt.model.loading import load

STRIDE, MAX_LENGTH = 512, 1024
DOCUMENT_TOKENS = 200
PROFILE_TOKENS = 6000

Documents = list[tuple[str, torch.Tensor]]
Run = Callable[[Documents], object]


def cut(ids: torch.Tensor, length: int) -> Documents:
    """Cut tokens into documents."""
    return [(f"part {at}", part) for at, part in enumerate(ids.split(length))]


@torch.no_grad()
def prefill(model: PreTrainedModel, documents: Documents) -> None:
    """Read documents with the plain model, in windows that share no tokens."""
    for _, ids in documents:
        for window in ids.split(MAX_LENGTH):
            model.base_model(input_ids=window[None], use_cache=False)


def write(model: PreTrainedModel, documents: Documents, **settings: object) -> None:
    """Read documents into a new store and build its index."""
    with tempfile.TemporaryDirectory() as folder:
        config = emt.MemoryConfig.published(
            memory_type="vector_db", path=f"{folder}/store", max_length=MAX_LENGTH
        ).replace(**settings)
        memory = emt.attach(model, config)
        try:
            memory.write_all(documents)  # and save()
            memory.close()
        finally:
            emt.detach(model)


def write_one_by_one(model: PreTrainedModel, documents: Documents) -> None:
    """Read documents into a new store, each in a call of its own."""
    with tempfile.TemporaryDirectory() as folder:
        config = emt.MemoryConfig.published(memory_type="vector_db", path=f"{folder}/store")
        memory = emt.attach(model, config)
        try:
            for name, ids in documents:
                memory.write(ids, document=name)
            memory.save()
            memory.close()
        finally:
            emt.detach(model)


def rank(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make a head profile, and keep it nowhere."""
    memory = emt.attach(model, emt.MemoryConfig(), tokenizer=tokenizer)
    try:
        memory.rank_heads()
        memory.close()
    finally:
        emt.detach(model)


def measure(
    runs: dict[str, Run], documents: Documents, rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Time all runs in turns; return seconds, round by round."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():  # warm up
        run([(name, ids[:64]) for name, ids in documents[:2]])
    for _ in range(rounds):
        for name, run in runs.items():
            started = clock()
            run(documents)
            times[name].append(clock() - started)
    return times


def table(times: dict[str, list[float]], tokens: int) -> list[str]:
    """Return lines: median tokens/s, and the median of each round's ratio to the first run."""
    plain = next(iter(times.values()))
    lines = ["| | tokens/s | of plain prefill |", "|---|---|---|"]
    for name, spent in times.items():
        ratio = statistics.median(base / mine for base, mine in zip(plain, spent, strict=True))
        lines.append(f"| {name} | {tokens / statistics.median(spent):,.0f} | {ratio:.2f} |")
    return lines


def main() -> None:
    """Measure, print and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "encode.md")
    parser.add_argument("--cpu", action="store_true", help="count CPU seconds, of one thread")
    options = parser.parse_args()
    if options.cpu:
        torch.set_num_threads(1)
        faiss.omp_set_num_threads(1)
    with quiet():
        loaded = load()
    model = loaded.model
    ids = token_ids(max(options.tokens, PROFILE_TOKENS))
    profiled, ids = ids[:PROFILE_TOKENS], ids[: options.tokens]
    clock = time.process_time if options.cpu else time.perf_counter
    plain: Run = functools.partial(prefill, model)
    book: dict[str, Run] = {
        f"plain prefill, windows of {MAX_LENGTH:,}": plain,
        f"carry_context, stride {STRIDE}": lambda documents: write(
            model, documents, carry_context=True, stride=STRIDE
        ),
        f"windows, stride {STRIDE}": lambda documents: write(model, documents, stride=STRIDE),
        f"windows, stride {MAX_LENGTH:,}: no context": lambda documents: write(
            model, documents, stride=MAX_LENGTH
        ),
    }
    short: dict[str, Run] = {
        "plain prefill, one by one": plain,
        "write_all": lambda documents: write(model, documents),
        "write, one by one": lambda documents: write_one_by_one(model, documents),
    }
    profile: dict[str, Run] = {
        f"plain prefill of {PROFILE_TOKENS:,} tokens": plain,
        "head profile": lambda documents: rank(model, loaded.tokenizer),
    }
    lines = [
        "# Reading documents",
        "",
        f"`python scripts/bench_encode.py` on {machine()}; SmolLM2-135M in float32, max_length "
        f"{MAX_LENGTH:,}, {options.tokens:,} tokens of a book, "
        f"{'CPU' if options.cpu else 'wall'} time, medians of {options.rounds} rounds. "
        "Tokens count once, however often they are read; the store is on disk, and building its "
        "index is part of the time. Ratios are measured in the same round.",
    ]
    for title, runs, documents in (
        ("One book", book, cut(ids, len(ids))),
        (f"Documents of {DOCUMENT_TOKENS} tokens", short, cut(ids, DOCUMENT_TOKENS)),
        ("A head profile", profile, cut(profiled, PROFILE_TOKENS)),
    ):
        tokens = sum(len(document) for _, document in documents)
        found = table(measure(runs, documents, options.rounds, clock), tokens)
        lines += ["", f"## {title}", "", *found]
        print("\n".join([title, *found]), flush=True)
    options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
