"""`emt index`: read documents into a store."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from emt.cli.model_options import add_model_options
from emt.cli.printing import bytes_used, count, duration, size
from emt.cli.profile import profile_if_needed
from emt.cli.session import Session
from emt.ingest.changes import Written
from emt.ingest.corpus import Corpus
from emt.ingest.estimate import estimate
from emt.memory.memory import Memory


def add_to(commands: Any) -> None:
    """Add the subcommand to a parser's."""
    parser = commands.add_parser(
        "index",
        help="read documents into a store",
        description="Read documents into a store. Those that it has already are skipped, those "
        "that have changed are replaced; so the same command goes on where it was stopped.",
    )
    parser.set_defaults(
        run=index,
        interrupted="What was finished before is kept; the same command goes on from there.",
    )
    parser.add_argument("source", nargs="+", help=".txt, .md or .jsonl files, or folders of them")
    parser.add_argument("--store", required=True, metavar="DIR", help="the store; made if missing")
    add_model_options(parser)
    parser.add_argument("--config", metavar="FILE", help="memory settings in YAML")


def index(options: argparse.Namespace) -> None:
    """Read documents into a store; skip those that it has, replace those that have changed."""
    corpus = Corpus(options.source)
    session = Session(options, writing=True)
    memory = session.memory
    expected = estimate(memory.encoder, memory.backend, memory.layers, corpus)
    print(
        f"{count(len(corpus.names), 'document')}, {count(expected.tokens, 'token')}: "
        f"about {size(expected.bytes)} and {duration(expected.seconds)}",
        file=sys.stderr,
    )
    if session.is_new:  # becomes part of the store with its first document
        session.remember()
    started = time.perf_counter()
    with tqdm(total=expected.rows, unit="tok", disable=None, smoothing=0.05) as bar:
        written = memory.write_all(
            ((document.name, document.text, document.metadata) for document in corpus),
            on_rows=bar.update,
            before_save=lambda: profile_if_needed(memory),
        )
        bar.total = bar.n  # what was there already took no time
        bar.refresh()
    seconds = time.perf_counter() - started
    session.remember()
    used = size(bytes_used(Path(options.store)))
    print(f"{_in_words(written, memory, seconds)}; '{options.store}' has {used}")


def _in_words(written: Written, memory: Memory, seconds: float) -> str:
    """Say how many documents were added, replaced and skipped, and how fast."""
    added, replaced, skipped = written
    parts = [f"{count(added, 'document')} added"]
    if replaced:
        parts.append(f"{replaced:,} replaced")
    if skipped:
        parts.append(f"{skipped:,} {'was' if skipped == 1 else 'were'} there already")
    words = ", ".join(parts)
    if added + replaced:
        documents = memory.backend.catalog.document_sizes()[-(added + replaced) :]
        tokens, rows = sum(each[1] for each in documents), sum(each[2] for each in documents)
        words += (
            f"; {count(tokens, 'token')}, {count(rows, 'row')} in {seconds:.1f} s "
            f"({tokens / seconds:,.0f} tokens/s)"
        )
    return words
