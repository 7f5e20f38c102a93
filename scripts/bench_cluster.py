"""What many shards and many readers cost: `python scripts/bench_cluster.py [PART ...]`.

* `shards`: 100 shards of made-up rows, 10 million in all, of one layer with one KV head of 16
  dimensions in float16, so 64 bytes a row: opened and searched in one process, and how much of the
  RAM they take. 2 GB of disk.
* `readers`: `emt index` of the demo's documents, by one process and by 1 and 2 workers of Ray's,
  one thread each. Loading the model is part of it.
* `messages`: what one prompt sends to shards in Ray actors, and gets back.

Prints Markdown. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import numpy as np
from store_measures import resident_bytes

from emt.cli.session import Session
from emt.model.chat import prompt_ids
from memory_backends import Document, LayerLayout, MemoryBackend, MemoryLayout, Rows
from memory_backends.sharded import ShardedStore, make_sharded, shard_of

ROOT = Path(__file__).parent.parent
DOCUMENTS = ROOT / "scripts" / "demo" / "documents"
QUESTION = "What was the name of the blacksmith who made the hoe?"
LAYOUT = MemoryLayout({0: LayerLayout(1, 16, 16)}, torch.float16)
ROWS = 10_000  # of a document


def main() -> None:
    """Measure the parts that are asked for, or all."""
    parts: dict[str, Callable[[Path, argparse.Namespace], None]] = {
        "shards": shards,
        "readers": readers,
        "messages": messages,
    }
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("part", nargs="*", help=f"of {', '.join(parts)}; default: all")
    parser.add_argument("--shards", type=int, default=100)
    parser.add_argument("--documents", type=int, default=1000, help=f"of {ROWS:,} rows")
    options = parser.parse_args()
    for name in options.part or parts:
        with tempfile.TemporaryDirectory() as folder:
            parts[name](Path(folder), options)


def shards(folder: Path, options: argparse.Namespace) -> None:
    """Open and search many shards."""
    path = folder / "store"
    make_sharded(path, LAYOUT, num_shards=options.shards)
    names: list[list[str]] = [[] for _ in range(options.shards)]
    for number in range(options.documents):
        name = f"document {number}"
        names[shard_of(name, options.shards)].append(name)
    for number, of_shard in enumerate(names):
        shard = MemoryBackend.open(path / "shards" / f"{number:05}", "vector_db", index="Flat")
        for _ in shard.add_many((_document(name), [_rows(name)]) for name in of_shard):
            pass
        shard.save()
        shard.close()
    started = time.perf_counter()
    with contextlib.closing(_opened(path)) as memory:
        memory.save()  # adopts
    adopted = time.perf_counter() - started
    before, started = resident_bytes(), time.perf_counter()
    with contextlib.closing(_opened(path)) as memory:
        opened = time.perf_counter() - started
        seconds = []
        for seed in range(12):
            queries = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(seed))
            started = time.perf_counter()
            memory.search(0, queries, 64)
            seconds.append(time.perf_counter() - started)
        print(f"{options.shards} shards, {len(memory):,} rows of 64 bytes, Flat indexes:\n")
        print("| what | |\n|---|---|")
        print(f"| adopting all documents, s | {adopted:.1f} |\n| opening, s | {opened:.2f} |")
        print(f"| first search of 8 queries, s | {seconds[0]:.2f} |")
        print(f"| later searches, s, median of 11 | {np.median(seconds[1:]):.3f} |")
        print(f"| resident MiB that they add | {(resident_bytes() - before) / 2**20:,.0f} |\n")


def readers(folder: Path, _: argparse.Namespace) -> None:
    """Time `emt index` with one process, and with workers."""
    print("`emt index scripts/demo/documents`, one thread a model:\n")
    print("| | s | s of CPU |\n|---|---|---|")
    for label, more in {
        "one process": ["--shards", "4"],
        "1 worker": ["--shards", "4", "--workers", "1"],
        "2 workers": ["--shards", "4", "--workers", "2"],
    }.items():
        store = folder / label.replace(" ", "-")
        command = [sys.executable, "-m", "emt", "index", str(DOCUMENTS), "--store", str(store)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        started, used = time.perf_counter(), os.times()
        done = subprocess.run(
            [*command, *more], env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(done.stderr)
        now = os.times()
        cpu = now.children_user + now.children_system - used.children_user - used.children_system
        print(f"| {label} | {time.perf_counter() - started:.1f} | {cpu:.1f} |")
    print("\nCPU seconds of workers are Ray's to count, and not among these.\n")


def messages(folder: Path, _: argparse.Namespace) -> None:
    """Count what a prompt sends to remote shards."""
    store = folder / "store"
    command = [sys.executable, "-m", "emt", "index", str(DOCUMENTS), "--store", str(store)]
    subprocess.run([*command, "--shards", "4"], check=True, capture_output=True)
    settings = folder / "ray.yaml"
    settings.write_text("store:\n  ray: local\n", encoding="utf-8")
    names = ("model", "device", "dtype", "attn_implementation")
    options = argparse.Namespace(
        store=str(store), config=str(settings), **dict.fromkeys(names, None)
    )
    session = Session(options, writing=False)
    assert session.memory.tokenizer is not None
    ids = prompt_ids(session.memory.tokenizer, QUESTION)
    opened = session.memory.backend.store
    assert isinstance(opened, ShardedStore)
    session.memory.route(ids)  # the actors are told which rows may be found
    before = [_counted(shard) for shard in opened.shards]
    routed = session.memory.route(ids)
    after = [_counted(shard) for shard in opened.shards]
    sent = [[b - a for a, b in zip(*pair, strict=True)] for pair in zip(before, after, strict=True)]
    print(
        "A prompt routed over 4 shards in Ray actors:\n\n"
        "| shard | messages | bytes |\n|---|---|---|"
    )
    for number, (num_messages, num_bytes) in enumerate(sent):
        print(f"| {number} | {num_messages} | {num_bytes:,} |")
    print(f"\n{len(routed.passages)} passages were found.\n")


def _opened(path: Path) -> MemoryBackend:
    options = {"shard_type": "vector_db", "shard_options": {"index": "Flat"}}
    return MemoryBackend.open(path, "sharded", **options)


def _counted(shard: object) -> tuple[int, int]:
    return getattr(shard, "num_messages", 0), getattr(shard, "num_bytes", 0)


def _document(name: str) -> Document:
    return Document(name, np.arange(ROWS, dtype=np.int32))


def _rows(name: str) -> Rows:
    """Return rows that depend on the name alone."""
    generator = torch.Generator().manual_seed(int(name.split()[1]))
    parts = torch.randn(2, 1, ROWS, 16, generator=generator).half()
    tokens = np.arange(ROWS, dtype=np.int32)
    return Rows({0: parts[0]}, {0: parts[1]}, tokens, np.zeros(ROWS, dtype=bool))


if __name__ == "__main__":
    main()
