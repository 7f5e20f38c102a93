"""What a store costs as it grows: disk, memory, opening, decoding, and what its search finds.

    python scripts/bench_store.py [--rows 10000 100000 1000000] [--folder DIR]

Writes stores of SmolLM2's rows of a book, and of rows mixed from them where the book ends
(`synthetic_rows.py`), measures each, and writes `benchmarks/store.md` and `benchmarks/store.png`.
Stores that are in the folder already are used again; an unfinished one is finished.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import faiss
import numpy as np
from bench_decode import PROMPT_TOKENS, ROOT, STEPS, machine
from store_measures import (
    CONFIG,
    PREFILL,
    QUERY_TOKENS,
    SCORE_ERROR,
    K,
    Setup,
    Timing,
    available_bytes,
    decoding,
    likeliest,
    prefilling,
    real_queries,
    recall,
    served,
    timed,
)
from synthetic_rows import LENGTH, OTHER, OWN, Book, write_empty_store
from tqdm import tqdm
from transformers import PreTrainedModel

from emt import attach, detach
from emt.cli import quiet
from emt.model.loading import LoadedModel, load
from memory_backends import MemoryBackend
from memory_backends.faiss.index import bytes_per_key, factory_for
from memory_backends.rows.codecs import row_codec

HELD_OUT = 2048  # the book's last tokens: prompts and queries, and no store has them
FORCED = (2, 128)  # prompts and their tokens
EXACT_ROWS = 400_000  # larger stores keep their rows as int4
CACHE_BYTES = 256 * 2**20
EMPTY_ROWS = 10_000_000
SHARE_OF_RAM = 0.6  # of what is available, for rows and indexes of one kind
GIB = 2**30


# -- stores -------------------------------------------------------------------------------------


def codec_for(rows: int) -> str:
    """Return the codec of a store, which depends on its size."""
    return "exact" if rows <= EXACT_ROWS else "int4"


def bytes_needed(book: Book, rows: int) -> tuple[int, int]:
    """Estimate the bytes of a store's rows and of its index."""
    layers, codec = book.layout.layers.values(), row_codec(codec_for(rows), book.layout.dtype)
    factory = factory_for("auto", rows, book.layout.largest_head_dim)
    return (
        rows * sum(ll.num_key_value_heads * codec.record_bytes(ll) for ll in layers),
        rows * sum(ll.num_key_value_heads * bytes_per_key(factory, ll.head_dim) for ll in layers),
    )


def disk_bytes(folder: Path) -> int:
    """Return the bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def check_disk(folder: Path, needed: int, what: str) -> None:
    """End the run if the folder's disk has no room for so many more bytes."""
    free = shutil.disk_usage(folder).free
    if needed * 1.05 > free:
        sys.exit(
            f"{what} need {needed / GIB:.1f} GiB more in '{folder}'; {free / GIB:.1f} GiB are "
            "free. Give a --folder on another disk, or fewer --rows."
        )


def write_book(model: PreTrainedModel, ids: torch.Tensor, path: Path) -> Book:
    """Encode tokens as documents of `LENGTH`, those that are not there yet."""
    memory = attach(model, CONFIG.replace(path=str(path)))
    missing = len(ids) - memory.backend.catalog.num_rows
    check_disk(path.parent, missing * memory.backend.catalog.bytes_per_row, "the book's rows")
    documents = ((f"{at:06d}", part) for at, part in enumerate(ids.split(LENGTH)))
    with tqdm(desc="encode the book", total=missing, unit="row", disable=None) as bar:
        memory.write_all(documents, on_rows=bar.update)
    memory.close()
    detach(model)
    return Book(MemoryBackend.open(path, "vector_db", index_files=False))


def write_store(book: Book, path: Path, rows: int) -> float:
    """Bring a store up to its number of rows and its index up to date; return the minutes."""
    started, codec = time.perf_counter(), codec_for(rows)
    with contextlib.closing(
        MemoryBackend(
            book.layout,
            "vector_db",
            path=path,
            identity=book.identity,
            sinks="one",
            row_codec=codec,
        )
    ) as backend:
        numbers = range(len(backend.catalog.document_names()), -(-rows // LENGTH))
        documents = (book.document(n, min(LENGTH, rows - n * LENGTH)) for n in numbers)
        with tqdm(desc=f"write {rows:,} rows", total=rows, unit="row", disable=None) as bar:
            bar.update(backend.catalog.num_rows)
            for _, ids in backend.add_many(documents):
                bar.update(len(ids))
        print(f"{rows:,} rows: index", file=sys.stderr, flush=True)
        backend.save()
    return (time.perf_counter() - started) / 60


def open_empty(book: Book, folder: Path) -> float:
    """Return the median seconds that opening a store of `EMPTY_ROWS` rows takes."""
    path, times = folder / f"empty-{EMPTY_ROWS}", []
    shutil.rmtree(path, ignore_errors=True)
    write_empty_store(book.layout, path, EMPTY_ROWS)
    for _ in range(3):
        started = time.perf_counter()
        MemoryBackend.open(path, "vector_db", sinks="one").close()
        times.append(time.perf_counter() - started)
    shutil.rmtree(path)
    return statistics.median(times)


def layers_that_fit(book: Book, kind: str, rows: int) -> list[int] | None:
    """Return layers, evenly spaced, whose exact search fits into memory; None if all do."""
    numbers = list(book.layout.layers)
    layer = book.layout.layers[numbers[0]]
    floats = layer.head_dim + (layer.row_dim if kind == "manual" else 0)
    each = 4 * rows * layer.num_key_value_heads * floats
    count = int(SHARE_OF_RAM * available_bytes() / each)
    if count >= len(numbers):
        return None
    return [numbers[i * len(numbers) // count] for i in range(count)]


def exact_timings(setup: Setup, book: Book, path: Path, rows: int) -> dict[str, Timing]:
    """Time a step with exact searches, of as many layers as there is room for."""
    timings = {}
    for kind in ("manual", "exact"):
        layers = layers_that_fit(book, kind, rows)
        if layers == []:
            continue
        with contextlib.closing(
            MemoryBackend.open(path, sinks="one")
            if kind == "manual"
            else MemoryBackend.open(path, "vector_db", sinks="one", index="Flat")
        ) as backend:
            run = decoding(setup.held_out)
            timings[kind] = timed(setup.model, backend, run, setup.rounds, layers)
    return timings


def search_cells(
    setup: Setup, path: Path, cache_bytes: int | None
) -> tuple[Timing, dict[str, str]]:
    """Time a step with `auto`; return the timing, and the cells that tell how it searches."""
    model, held_out, queries, rounds = setup
    with (
        contextlib.closing(
            MemoryBackend.open(path, "vector_db", sinks="one", cache_bytes=cache_bytes)
        ) as backend,
        contextlib.closing(MemoryBackend.open(path, "scan", sinks="one")) as scan,
    ):
        rows, layers = len(backend), len(backend.layout.layers)
        stats = faiss.cvar.indexIVF_stats
        stats.reset()
        timing = timed(model, backend, decoding(held_out), rounds)
        scanned = stats.ndis / (stats.nq * rows) if stats.nq else 1.0
        efforts = [e for some in backend.searcher.efforts.values() for e in some if e is not None]
        expected = float(np.mean([e.scanned for e in efforts])) if efforts else 1.0
        prefill = timed(model, backend, prefilling(held_out), rounds)
        found, content = recall(backend, scan, queries)
        prompts = held_out[PREFILL : PREFILL + FORCED[0] * FORCED[1]].view(FORCED)
        agreed = likeliest(model, backend, prompts) == likeliest(model, scan, prompts)
        factory, kv_heads = backend.searcher.factory, backend.layout.layers[0].num_key_value_heads
    asked = layers * model.config.num_attention_heads / 1e6  # queries a token, in millions
    lists = re.match(r"IVF(\d+)", factory)
    work = asked * ((int(lists[1]) if lists else 0) + expected * rows)
    published = asked * kv_heads * rows
    return timing, {
        f"ms of a prefill of {PREFILL:,} tokens: no memory": f"{prefill.plain:,.0f}",
        f"ms of a prefill of {PREFILL:,} tokens: auto": str(prefill),
        "index": f"`{factory}`" + ("" if cache_bytes is None else ", mapped"),
        "scanned: by calibration, measured": f"{expected:.1%}, {scanned:.1%}",
        "recall@10 (sinks left out)": f"{found:.3f} ({content:.3f})",
        "top-1 agreement with exact search": f"{agreed.mean():.1%}",
        "inner products a token, millions": f"{work:,.2f}",
        "the same, one index of all heads": f"{published:,.2f} ({published / work:.1f} x)",
    }


def measure(
    setup: Setup, book: Book, path: Path, rows: int
) -> tuple[dict[str, str], dict[str, Timing]]:
    """Measure one store; return the table's cells, and the timings for the plot."""
    on_disk = {name: disk_bytes(path / name) / rows for name in ("rows", "index", ".")}
    in_ram = bytes_needed(book, rows)[1] < SHARE_OF_RAM * available_bytes()
    cache_bytes = None if in_ram else CACHE_BYTES
    process = served(path, setup.held_out, cache_bytes, setup.rounds)
    timings = exact_timings(setup, book, path, rows)
    timings["auto"], cells = search_cells(setup, path, cache_bytes)
    steps = {kind: str(timings.get(kind, "no room")) for kind in ("manual", "exact", "auto")}
    return {
        "mixed rows, of all": f"{max(1 - LENGTH * len(book) / rows, 0):.0%}",
        "rows kept as": codec_for(rows),
        "disk, bytes a token: rows": f"{on_disk['rows']:,.0f}",
        "disk, bytes a token: index": f"{on_disk['index']:,.0f}",
        "disk, bytes a token: all": f"{on_disk['.']:,.0f}",
        "resident MiB while serving (peak)": f"{process.growth:,.0f} ({process.peak:,.0f})",
        "opening, s": f"{process.open_seconds:.3f}",
        "opening to the first token, s": f"{process.first_token_seconds:.2f}",
        "ms/step: no memory": f"{timings['auto'].plain:.1f}",
        **{f"ms/step: {kind}": found for kind, found in steps.items()},
        **cells,
    }, timings


# -- reporting ----------------------------------------------------------------------------------


def plot(timings: dict[int, dict[str, Timing]], path: Path) -> None:
    """Draw milliseconds a step over rows; what was scaled from some layers is hollow."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for kind in ("manual", "exact", "auto"):
        points = [(rows, found[kind]) for rows, found in timings.items() if kind in found]
        (line,) = axes.plot([r for r, _ in points], [t.milliseconds for _, t in points], label=kind)
        for rows, timing in points:
            fill = "white" if timing.is_scaled else line.get_color()
            axes.plot(rows, timing.milliseconds, "o", color=line.get_color(), markerfacecolor=fill)
    plain = statistics.median(t.plain for found in timings.values() for t in found.values())
    axes.axhline(plain, color="grey", linestyle=":", label="no memory")
    axes.set(xscale="log", yscale="log", xlabel="rows", ylabel="ms/step", title="SmolLM2-135M")
    axes.grid(alpha=0.3)
    axes.legend()
    axes.set_xticks(list(timings), [f"{rows:,}" for rows in timings])
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(ticker.NullFormatter())
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def bench(loaded: LoadedModel, folder: Path, options: argparse.Namespace) -> list[str]:
    """Write and measure all stores; draw the plot; return the lines of the report."""
    model, rounds = loaded.model, options.rounds
    text = (ROOT / "scripts" / "data" / "the_prince.txt").read_text(encoding="utf-8")
    ids = torch.tensor(loaded.tokenizer(text, verbose=False).input_ids)
    real = min(options.real, len(ids) - HELD_OUT) // LENGTH * LENGTH
    held_out = ids[-HELD_OUT:]
    folder.mkdir(parents=True, exist_ok=True)
    book = write_book(model, ids[:real], folder / f"book-{real}")
    setup = Setup(model, held_out, real_queries(model, held_out), rounds)
    likeness = book.likeness(setup.queries)
    print("\n".join(likeness), flush=True)
    paths = {rows: folder / f"{rows}-{codec_for(rows)}-{real}" for rows in sorted(options.rows)}
    needed = sum(max(sum(bytes_needed(book, r)) - disk_bytes(p), 0) for r, p in paths.items())
    check_disk(folder, needed, f"stores of {', '.join(f'{rows:,}' for rows in paths)} rows")
    columns: dict[int, dict[str, str]] = {}
    timings: dict[int, dict[str, Timing]] = {}
    for rows, path in paths.items():
        minutes = write_store(book, path, rows)
        print(f"{rows:,} rows: written in {minutes:.1f} minutes", file=sys.stderr, flush=True)
        columns[rows], timings[rows] = measure(setup, book, path, rows)
        print(f"{rows:,} rows: {columns[rows]}", file=sys.stderr, flush=True)
        lines = table(columns, rounds)
        options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")  # so far
        plot(timings, options.output.with_suffix(".png"))
    largest = max(paths)
    small = served(paths[largest], held_out, CACHE_BYTES, rounds)
    seconds = open_empty(book, folder)
    layers = ", ".join(map(str, setup.queries))
    return [
        *table(columns, rounds),
        "",
        "![ms/step over rows](store.png)",
        "",
        f"* {largest:,} rows served with `cache_bytes` of {CACHE_BYTES // 2**20} MiB: resident "
        f"memory grows by {small.growth:,.0f} MiB (peak {small.peak:,.0f}); "
        f"{small.timing} ms/step.",
        f"* A store of {EMPTY_ROWS:,} rows opens in {seconds:.2f} s (median of 3): a catalogue of "
        f"documents of {LENGTH} tokens, {len(book.layout.layers)} sparse row files mapped, the ids "
        "of searchable rows. It has no index and no row was ever written.",
        *notes(real, layers),
        "",
        "Real and mixed rows, against the same queries:",
        "",
        *(f"* {line}" for line in likeness),
    ]


def table(columns: dict[int, dict[str, str]], rounds: int) -> list[str]:
    """Return the report's beginning, with the table."""
    head = " | ".join(f"{rows:,} rows" for rows in columns)
    names = next(iter(columns.values()))
    command = f"--rows {' '.join(map(str, columns))} --rounds {rounds}"
    return [
        "# What a store costs as it grows",
        "",
        f"`python scripts/bench_store.py {command}` on {machine()}; SmolLM2-135M in float32, "
        f"topk {K}, one set of sinks, a prompt of {PROMPT_TOKENS} tokens, {STEPS} greedy steps, "
        f"medians of {rounds} rounds. In brackets after ms: the ratio to no memory, timed in "
        "turns.",
        "",
        f"| | {head} |",
        "|---|" + "---|" * len(columns),
        *(
            f"| {name} | " + " | ".join(cells[name] for cells in columns.values()) + " |"
            for name in names
        ),
    ]


def notes(real: int, layers: str) -> list[str]:
    """Return what the numbers mean."""
    return [
        f"* The first {real:,} rows of each store are the book's, encoded as documents of {LENGTH} "
        f"tokens; the others are *mixed*: {OWN} of a real row's deviation from the mean, "
        f"{OTHER:.2f} of another's, and noise. They add no new topics, so where most rows are "
        "mixed, recall and agreement are of that mixture.",
        f"* Prompts and queries are of the book's last {HELD_OUT:,} tokens, which no store has and "
        f"no calibration saw. Recall: {QUERY_TOKENS} tokens, all heads of layers "
        f"{layers}; a found row counts if its cosine is at least the exact "
        f"10th's less {SCORE_ERROR:g}. Agreement: {FORCED[0] * FORCED[1]} teacher-forced tokens, "
        "against a scan of all stored keys; noise of 1e-4 alone changes some 2 % (codecs.md).",
        "* *exact* is `vector_db` with `Flat`. ≈: memories in as many layers as memory has room "
        "for, the time that they add scaled to all. Opening: files are in the system's cache.",
        "* Inner products are of one head's query and key, centroids included; *one "
        "index of all heads* is the published layout, which compares each query head with the "
        "concatenated keys of all KV heads, flat.",
    ]


def main() -> None:
    """Measure, print and write the table and the plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--real", type=int, default=35_328, help="rows of the book, at most")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="keeps the stores; a temporary one if left out")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "store.md")
    options = parser.parse_args()
    with quiet():
        loaded = load()
    with contextlib.ExitStack() as at_end:
        folder = options.folder
        if folder is None:
            folder = Path(at_end.enter_context(tempfile.TemporaryDirectory(prefix="emt-store-")))
        lines = bench(loaded, folder, options)
    print("\n".join(lines))
    options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
