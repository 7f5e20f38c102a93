"""What passages cost: first token and decode step, against the plain model and BM25-RAG.

    python scripts/bench_passages.py --store DIR [--questions FILE] [--rounds 5]

Each round asks each question in three ways, in turn: without memory; with passages of the store,
routed, read and recalled; and with the same passages' text put into the prompt after BM25 has found
them, which is what retrieval-augmented generation prefills. Medians, and ratios to the plain model.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from experiments.about import about
from experiments.command import one_line_errors, remembering
from experiments.items import load_items
from experiments.spans import text_of

import emt
from emt.model.chat import prompt_ids
from emt.model.loading import DEFAULT_MODEL

_QUESTIONS = Path("configs/experiments/data/counterfactual.jsonl")


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--store", required=True, type=Path)
    parser.add_argument("--questions", type=Path, default=_QUESTIONS, help="items with questions")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=int, default=8, help="questions")
    parser.add_argument("--steps", type=int, default=16, help="decode steps timed")
    with one_line_errors():
        _bench(parser.parse_args())


def _bench(options: argparse.Namespace) -> None:
    found, memory = remembering(options.model, options.store)
    questions = [item.question for item in load_items(options.questions)[: options.limit]]
    bench = _Bench(memory, found.model, found.tokenizer, options.steps)
    seconds: dict[str, list[tuple[float, float, float]]] = {}
    with memory.using(relevance=None):  # whatever the store is about
        for turn in range(options.rounds + 1):  # the first is for warming up
            for question in questions:
                for name, way in bench.ways().items():
                    measured = way(question)
                    if turn:
                        seconds.setdefault(name, []).append(measured)
    medians = {
        name: [statistics.median(column) for column in zip(*rows, strict=True)]
        for name, rows in seconds.items()
    }
    plain = medians["plain"]
    print(f"{len(memory):,} rows, {len(questions)} questions, {options.rounds} rounds; {about()}")
    print()
    print("| | prompt tokens and rows | first token, ms | ratio | decode step, ms | ratio |")
    print("|---|---|---|---|---|---|")
    for name, (first, step, length) in medians.items():
        print(
            f"| {name} | {length:.0f} | {1e3 * first:.1f} | {first / plain[0]:.2f} | "
            f"{1e3 * step:.2f} | {step / plain[1]:.2f} |"
        )


class _Bench:
    """Ways to ask a question, each returning seconds to the first token, a step, and a length."""

    def __init__(self, memory: emt.Memory, model: Any, tokenizer: Any, steps: int) -> None:
        self._memory = memory
        self._model = model
        self._tokenizer = tokenizer
        self._steps = steps

    def ways(self) -> dict[str, Callable[[str], tuple[float, float, float]]]:
        """Return the ways, by name."""
        return {"plain": self._plain, "passages": self._passages, "BM25-RAG": self._rag}

    def _plain(self, question: str) -> tuple[float, float, float]:
        with self._memory.using(enabled=False):
            ids = prompt_ids(self._tokenizer, question)[None]
            return (*self._timed(lambda: ids), float(ids.shape[1]))

    def _passages(self, question: str) -> tuple[float, float, float]:
        ids = prompt_ids(self._tokenizer, question)[None]
        passages = [routed.passage for routed in self._memory.route(ids[0]).passages]
        rows = sum(passage.stop - passage.first for passage in passages)
        return (*self._timed(lambda: ids), float(ids.shape[1] + rows))

    def _rag(self, question: str) -> tuple[float, float, float]:
        lengths: list[int] = []

        def prompt() -> torch.Tensor:
            ids = prompt_ids(self._tokenizer, question)
            with self._memory.using(routing="words", candidates=0):
                passages = self._memory.route(ids).passages
            texts = [text_of(self._memory, routed.passage) for routed in reversed(passages)]
            ids = prompt_ids(self._tokenizer, "\n\n".join([*texts, question]))[None]
            lengths.append(ids.shape[1])
            return ids

        prompt()  # so that no time has the reading of words
        with self._memory.using(enabled=False):
            seconds = self._timed(prompt)
        return (*seconds, float(lengths[-1]))

    @torch.no_grad()
    def _timed(self, prompt: Callable[[], torch.Tensor]) -> tuple[float, float]:
        started = time.perf_counter()
        output = self._model(input_ids=prompt(), use_cache=True, logits_to_keep=1)
        first = time.perf_counter() - started
        cache = output.past_key_values
        token = output.logits[:, -1:].argmax(-1)
        started = time.perf_counter()
        for _ in range(self._steps):
            output = self._model(input_ids=token, past_key_values=cache, logits_to_keep=1)
            token = output.logits[:, -1:].argmax(-1)
        return first, (time.perf_counter() - started) / self._steps


if __name__ == "__main__":
    main()
