"""How many prompts a second `emt serve` answers, and how long each waits, at 1, 4 and 8 clients.

    python scripts/bench_serve.py --store DIR [--model M] [--prompts 32] [--max-new-tokens 32]

Beside it stands a loop of plain `generate` over the same prompts: the model without its memory, and
with it, as `emt generate` answers. Prompts are questions of a file with one a line, or else of
sentences of the store's documents. The server runs in a process of its own; its clients are
OpenAI's. Prints a table.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openai

from emt.answer import answer
from emt.cli.session import Session

CLIENTS = (1, 4, 8)


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--store", required=True, metavar="DIR")
    parser.add_argument("--model")
    parser.add_argument("--questions", metavar="FILE", help="one a line")
    parser.add_argument("--prompts", type=int, default=32, metavar="N")
    parser.add_argument("--max-new-tokens", type=int, default=32, metavar="N")
    parser.add_argument("--max-batch", type=int, default=8, metavar="N")
    options = parser.parse_args()
    for name in ("config", "device", "dtype", "attn_implementation"):
        setattr(options, name, None)
    session = Session(options, writing=False)
    prompts = _prompts(session, options)
    rows = [
        (label, *_measured(_by_library(session, options.max_new_tokens, enabled), prompts, 1))
        for label, enabled in (("a loop, no memory", False), ("a loop, with memory", True))
    ]
    session.memory.close()
    rows += _served(options, prompts)
    print("| | prompts/s | p50 s | p95 s | new tokens/s |\n|---|---|---|---|---|")
    for label, per_second, p50, p95, tokens in rows:
        print(f"| {label} | {per_second:.2f} | {p50:.2f} | {p95:.2f} | {tokens:.1f} |")


def _prompts(session: Session, options: argparse.Namespace) -> list[str]:
    """Return the questions of a file, or about the first sentences of documents."""
    if options.questions:
        lines = Path(options.questions).read_text(encoding="utf-8").splitlines()
        asked = [line for line in lines if line.strip()]
    else:
        texts = [session.memory.read(name) for name in session.memory.documents]
        sentences = [s for text in texts for s in re.split(r"(?<=[.?!])\s+", str(text)) if s]
        asked = [f"What is said about this: {' '.join(s.split()[:12])}?" for s in sentences]
    every = max(len(asked) // options.prompts, 1)
    return (asked[::every] * options.prompts)[: options.prompts]


def _by_library(session: Session, max_new_tokens: int, enabled: bool) -> Callable[[str], int]:
    def ask(prompt: str) -> int:
        options = {"max_new_tokens": max_new_tokens, "enabled": enabled}
        return len(answer(session.model, session.memory, prompt, **options).token_ids)

    return ask


def _served(
    options: argparse.Namespace, prompts: Sequence[str]
) -> list[tuple[str, float, float, float, float]]:
    """Measure a server with each number of clients."""
    command = [sys.executable, "-m", "emt", "serve", "--store", options.store, "--port", "0"]
    command += ["--max-batch", str(options.max_batch)]
    command += [] if options.model is None else ["--model", options.model]
    rows = []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ) as server:
        try:
            said = ""
            assert server.stderr is not None
            while "http://" not in said:
                said = server.stderr.readline()
            url = said[said.index("http://") :].strip()
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600)
            model = next(iter(client.models.list())).id

            def ask(prompt: str) -> int:
                answered = client.chat.completions.create(
                    model=model,
                    messages=[{"role": "user", "content": prompt}],
                    max_tokens=options.max_new_tokens,
                )
                return answered.usage.completion_tokens if answered.usage else 0

            for num_clients in CLIENTS:
                label = f"served, {num_clients} client{'s' if num_clients > 1 else ''}"
                rows.append((label, *_measured(ask, prompts, num_clients)))
        finally:
            server.send_signal(signal.SIGTERM)
    return rows


def _measured(
    ask: Callable[[str], int], prompts: Sequence[str], num_clients: int
) -> tuple[float, float, float, float]:
    """Return prompts a second, the seconds that half and 95 % wait at most, tokens a second."""

    def timed(prompt: str) -> tuple[float, int]:
        started = time.perf_counter()
        num_tokens = ask(prompt)
        return time.perf_counter() - started, num_tokens

    timed(prompts[0])  # what is loaded late is loaded
    started = time.perf_counter()
    with ThreadPoolExecutor(num_clients) as pool:
        measured = list(pool.map(timed, prompts))
    seconds = time.perf_counter() - started
    p50, p95 = np.percentile([each for each, _ in measured], [50, 95])
    num_tokens = sum(number for _, number in measured)
    return len(prompts) / seconds, float(p50), float(p95), num_tokens / seconds


if __name__ == "__main__":
    main()
