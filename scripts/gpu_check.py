"""What a machine with a GPU must show, in one command of some minutes: `make gpu-check`.

    python scripts/gpu_check.py [--device cuda:0] [--rows 16384] [--model M]

Runs the tests marked `gpu`; then asks the demo's questions of one memory, which the CPU reads in
float32 and the device in bfloat16, with the store on the CPU and on the device: first token and
decode step against the plain model, in turns, and how many of the answers' tokens are those of the
CPU. `--device cpu` tries the script without a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from experiments.about import about
from experiments.command import one_line_errors

import emt
from emt.cli import quiet
from emt.errors import ConfigError
from emt.ingest.corpus import Corpus
from emt.model.chat import prompt_ids
from emt.model.loading import DEFAULT_MODEL, load

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "scripts" / "demo"
BOOK = ROOT / "scripts" / "data" / "the_prince.txt"
NEW_TOKENS = 16


def main() -> None:
    """Run the tests, measure, and print a table."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--rows", type=int, default=16_384, help="tokens of the memory, about")
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with one_line_errors():
        device = _device(options.device)
        tests = _tests()
        with tempfile.TemporaryDirectory() as folder:
            rows = _measured(options, device, Path(folder) / "store")
    print(f"\n{about()}\n\ntests marked gpu: {tests}\n")
    print(
        "| mode, store | first token, ms | ratio | decode step, ms | ratio | tokens as on the CPU |"
    )
    print("|---|---|---|---|---|---|")
    print("\n".join(rows))


def _device(name: str) -> torch.device:
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"device '{name}' needs a GPU and torch with CUDA; there is none. `--device cpu` tries "
            "the script without."
        )
    return device


def _tests() -> str:
    """Run the tests marked `gpu`; return pytest's last line."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout[-4000:], file=sys.stderr)
    return done.stdout.strip().rpartition("\n")[2]


def _measured(options: argparse.Namespace, device: torch.device, store: Path) -> list[str]:
    """Return the lines of the table."""
    with quiet():
        found = load(options.model)
    model, tokenizer = found.model, found.tokenizer
    config = emt.MemoryConfig(memory_type="vector_db", path=str(store), mode="passage")
    memory = emt.attach(model, config, tokenizer=tokenizer)
    memory.write_all(_documents(tokenizer, options.rows))
    lines = (DEMO / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    questions = [json.loads(line)["question"] for line in lines][: options.questions]
    prompts = [prompt_ids(tokenizer, question)[None] for question in questions]
    expected = {}
    for mode in ("passage", "token"):
        with memory.using(mode=mode, relevance=None):
            expected[mode] = [_answer(model, prompt)[2] for prompt in prompts]
    memory.close()
    emt.detach(model)
    model.to(device, torch.bfloat16)
    prompts = [prompt.to(device) for prompt in prompts]
    rows = []
    for place in (None, str(device)) if device.type == "cuda" else (None,):
        memory = emt.attach(model, config.replace(memory_device=place), tokenizer=tokenizer)
        rows += _lines(memory, model, prompts, expected, options.rounds, place or "CPU")
        memory.close()
        emt.detach(model)
    return rows


def _documents(tokenizer: Any, num_tokens: int) -> list[tuple[str, str]]:
    """Return the demo's documents, and as much of a book as fills the memory."""
    documents = [(each.name, each.text) for each in Corpus([str(DEMO / "documents")])]
    left = num_tokens - sum(len(tokenizer(text).input_ids) for _, text in documents)
    offsets = tokenizer(BOOK.read_text(encoding="utf-8"), return_offsets_mapping=True)
    ends = [end for _, end in offsets["offset_mapping"]][: max(left, 0)]
    if ends:
        documents.append((BOOK.name, BOOK.read_text(encoding="utf-8")[: ends[-1]]))
    return documents


def _lines(
    memory: emt.Memory,
    model: Any,
    prompts: Sequence[torch.Tensor],
    expected: dict[str, list[list[int]]],
    rounds: int,
    place: str,
) -> list[str]:
    ways = {"plain": {"enabled": False}, "passage": {"mode": "passage"}, "token": {"mode": "token"}}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    same: dict[str, list[bool]] = {name: [] for name in ways}
    for turn in range(rounds + 1):  # the first is for warming up
        for number, prompt in enumerate(prompts):
            for name, settings in ways.items():
                with memory.using(relevance=None, **settings):
                    first, step, ids = _answer(model, prompt)
                if turn:
                    times[name].append((first, step))
                elif name in expected:
                    pairs = zip(ids, expected[name][number], strict=True)
                    same[name] += [one == other for one, other in pairs]
    medians = {
        name: [statistics.median(column) for column in zip(*measured, strict=True)]
        for name, measured in times.items()
    }
    return [
        f"| {name}, {place}, {len(memory):,} rows | {1e3 * first:.1f} | "
        f"{first / medians['plain'][0]:.2f} | {1e3 * step:.2f} | "
        f"{step / medians['plain'][1]:.2f} | "
        + (f"{sum(same[name]) / len(same[name]):.0%} |" if same[name] else "|")
        for name, (first, step) in medians.items()
    ]


@torch.no_grad()
def _answer(model: Any, prompt: torch.Tensor) -> tuple[float, float, list[int]]:
    """Return seconds to the first token and for each further one, and the greedy tokens."""
    started = _now(prompt.device)
    output = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    token = output.logits[:, -1:].argmax(-1)
    first = _now(prompt.device) - started
    ids, cache = [int(token)], output.past_key_values
    started = _now(prompt.device)
    for _ in range(NEW_TOKENS - 1):
        output = model(input_ids=token, past_key_values=cache, logits_to_keep=1)
        token = output.logits[:, -1:].argmax(-1)
        ids.append(int(token))
    return first, (_now(prompt.device) - started) / (NEW_TOKENS - 1), ids


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    main()
