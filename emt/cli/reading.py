"""The subcommands that run a model: index, generate."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from emt.answer import Answer, generate
from emt.citations.citing import Citation
from emt.citations.passages import CitedPassage
from emt.cli.printing import bytes_used, count, duration, print_json, size
from emt.cli.profiling import profile_if_needed
from emt.cli.session import Session
from emt.ingest.corpus import Corpus
from emt.ingest.estimate import estimate
from emt.model.loading import DEFAULT_MODEL


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
        added, replaced, skipped = memory.write_all(
            ((document.name, document.text, document.metadata) for document in corpus),
            on_rows=bar.update,
            before_save=lambda: profile_if_needed(memory, session.source or DEFAULT_MODEL),
        )
        bar.total = bar.n  # what was there already took no time
        bar.refresh()
    seconds = time.perf_counter() - started
    session.remember()
    parts = [f"{count(added, 'document')} added"]
    if replaced:
        parts.append(f"{replaced:,} replaced")
    if skipped:
        parts.append(f"{skipped:,} {'was' if skipped == 1 else 'were'} there already")
    done = ", ".join(parts)
    if added + replaced:
        written = memory.backend.catalog.document_sizes()[-(added + replaced) :]
        tokens, rows = sum(size[1] for size in written), sum(size[2] for size in written)
        done += (
            f"; {count(tokens, 'token')}, {count(rows, 'row')} in {seconds:.1f} s "
            f"({tokens / seconds:,.0f} tokens/s)"
        )
    print(f"{done}; '{options.store}' has {size(bytes_used(Path(options.store)))}")


def answer(options: argparse.Namespace) -> None:
    """Answer a prompt from a store."""
    started = time.perf_counter()
    session = Session(options, writing=False)
    opened = time.perf_counter()
    answer = generate(
        session.model,
        session.memory,
        options.prompt,
        chat=options.chat,
        max_new_tokens=options.max_new_tokens,
        use_memory=not options.no_memory,
        mode=options.mode,
        topk=options.topk,
        uncertainty=options.uncertainty,
        documents=options.documents,
        where=_joined(options.where),
    )
    if options.json:
        timings = {"open_seconds": round(opened - started, 3), **answer.timings}
        print_json({**answer.to_json(), "timings": timings})
        return
    print(answer.text)
    if options.citations:
        _print_sources(answer)


def _print_sources(answer: Answer) -> None:
    """Print the sentences that were used, and the passages they are from if those were recalled."""
    print()
    for rank, citation in enumerate(answer.citations, start=1):
        print(f"[{rank}] {citation.share:5.1%}  {_place(citation)}")
        print(f"      {' '.join(citation.text.split())}")
    if not answer.citations:
        print("No memory was used.")
    if answer.passages:
        print(f"\n{count(len(answer.passages), 'passage')} recalled:")
    for passage in answer.passages:
        score = "" if passage.score is None else f", score {passage.score:.2f}"
        print(f"      {_place(passage)}: {passage.attention:.1%} of the attention{score}")


def _place(cited: Citation | CitedPassage) -> str:
    where = "" if cited.start is None else f" {cited.start}-{cited.end}"
    return f"{cited.document}{where}"


def _joined(pairs: list[tuple[str, list[Any]]] | None) -> dict[str, list[Any]] | None:
    """Return what `--where` was given as one filter: of one key, any value will do."""
    if pairs is None:
        return None
    joined: dict[str, list[Any]] = {}
    for key, values in pairs:
        joined.setdefault(key, []).extend(values)
    return joined
