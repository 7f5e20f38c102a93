"""Milliseconds a decoded token: no memory, `manual`, `vector_db`, at 1k, 4k and 16k rows.

    python scripts/bench_decode.py [--rows 1024 4096 16384] [--rounds 3]

All are timed in turns in one run, so that ratios hold on a noisy machine. Writes
`benchmarks/decode.md`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import faiss
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import emt
from emt.cli import quiet
from emt.model.loading import load
from memory_backends import MemoryBackend

ROOT = Path(__file__).resolve().parent.parent
PROMPT_TOKENS = 64
STEPS = 16
KINDS = {
    "manual": {"memory_type": "manual"},
    "vector_db Flat": {"memory_type": "vector_db", "index": "Flat"},
    "vector_db IVF128,SQfp16": {"memory_type": "vector_db", "index": "IVF128,SQfp16"},
    "vector_db auto": {"memory_type": "vector_db", "index": "auto"},
    "vector_db auto, heads of the profile": {
        "memory_type": "vector_db",
        "index": "auto",
        "heads": "profile",  # all heads of the random model, which has no profile
    },
}
CONFIG = emt.MemoryConfig.published(topk=10, stride=512, max_length=512)


def models() -> Iterator[tuple[str, PreTrainedModel]]:
    """Yield the small random multi-head model and SmolLM2."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=8192,
    )
    yield "random, 4 layers, 8 heads of 64", LlamaForCausalLM(config).eval()
    with quiet():
        yield "SmolLM2-135M, 30 layers, 9 query and 3 KV heads of 64", load().model


def token_ids(count: int) -> torch.Tensor:
    """Read the first tokens of the benchmark's book."""
    with quiet():
        tokenizer = load().tokenizer
    text = (ROOT / "scripts" / "data" / "the_prince.txt").read_text(encoding="utf-8")
    ids = tokenizer(text, verbose=False).input_ids
    assert len(ids) >= count, f"the book has {len(ids)} tokens; asked for {count}"
    return torch.tensor(ids[:count])


@torch.no_grad()
def milliseconds_a_token(model: PreTrainedModel, prompt: torch.Tensor) -> float:
    """Prefill, then return the median time of a greedy step."""
    output = model(prompt, use_cache=True)
    times = []
    for _ in range(STEPS):
        token = output.logits[:, -1:].argmax(-1)
        started = time.perf_counter()
        output = model(token, past_key_values=output.past_key_values, use_cache=True)
        times.append(time.perf_counter() - started)
    return 1000 * statistics.median(times)


def backends(model: PreTrainedModel, rows: int, folder: Path) -> dict[str, MemoryBackend]:
    """Encode the book once; return the same rows in each kind of memory, ready to be searched."""
    source = emt.attach(model, CONFIG)
    source.write(token_ids(rows), document="book")
    source.save(folder / "source")
    emt.detach(model)
    found: dict[str, MemoryBackend] = {}
    for number, (name, changes) in enumerate(KINDS.items()):
        store = folder / str(number)
        shutil.copytree(folder / "source", store)
        memory = emt.attach(model, CONFIG.replace(path=str(store), **changes))
        memory.save()
        found[name] = memory.backend
        emt.detach(model)
    return found


def measure(
    model: PreTrainedModel, found: dict[str, MemoryBackend], rounds: int
) -> dict[str, tuple[float, float]]:
    """Time all kinds in turns; return each kind's median ms/token and median ratio to no memory."""
    prompt = token_ids(PROMPT_TOKENS)[None]
    times: dict[str, list[float]] = {"no memory": [], **{name: [] for name in found}}
    for turn in range(rounds + 1):
        for name in times:
            if name == "no memory":
                spent = milliseconds_a_token(model, prompt)
            else:
                heads = KINDS[name].get("heads", "all")
                memory = emt.attach(model, CONFIG.replace(heads=heads))
                memory.backend = found[name]
                spent = milliseconds_a_token(model, prompt)
                emt.detach(model)
            if turn:  # the first turn warms up and loads the indexes
                times[name].append(spent)
    plain = times["no memory"]
    return {
        name: (
            statistics.median(spent),
            statistics.median(mine / base for mine, base in zip(spent, plain, strict=True)),
        )
        for name, spent in times.items()
    }


def machine() -> str:
    """Name the machine and the versions."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
        else:
            name = platform.processor()
    return (
        f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads; torch "
        f"{torch.__version__}, transformers {transformers.__version__}, faiss {faiss.__version__}"
    )


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "decode.md")
    options = parser.parse_args()
    lines = [
        "# Decoding with memories",
        "",
        f"`python scripts/bench_decode.py` on {machine()}; float32, topk 10, batch 1, a prompt of "
        f"{PROMPT_TOKENS} tokens, median of {options.rounds} rounds of {STEPS} steps. In brackets: "
        "the ratio to no memory, measured in the same round.",
    ]
    for title, model in models():
        columns = " | ".join(f"{rows:,} rows" for rows in options.rows)
        lines += ["", f"## {title}", "", f"| ms/token | {columns} |"]
        lines.append("|---|" + "---|" * len(options.rows))
        cells: dict[str, list[str]] = {}
        for rows in options.rows:
            with tempfile.TemporaryDirectory() as folder:
                found = backends(model, rows, Path(folder))
                for name, (spent, ratio) in measure(model, found, options.rounds).items():
                    cells.setdefault(name, []).append(f"{spent:.1f} ({ratio:.2f})")
                    print(f"{title}: {rows:,} rows, {name}: {cells[name][-1]}", flush=True)
                for backend in found.values():
                    backend.close()
        lines += [f"| {name} | " + " | ".join(row) + " |" for name, row in cells.items()]
    options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
