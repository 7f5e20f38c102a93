"""`emt index`: read documents into a store."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tqdm import tqdm

from emt.cli.generate import positive
from emt.cli.model_options import add_model_options, named_model
from emt.cli.printing import bytes_used, count, duration, say, size
from emt.cli.profile import profile_if_needed
from emt.cli.session import Session
from emt.errors import ConfigError, CorpusError, StoreError
from emt.ingest.changes import Written
from emt.ingest.corpus import Corpus
from emt.ingest.estimate import estimate
from emt.ingest.names import DocumentNames
from emt.ingest.reading import SUFFIXES
from emt.memory.memory import Memory
from emt.profiles.ranking import MAX_BUILT_IN
from memory_backends.layout import Metadata
from memory_backends.sharded import adopt, is_sharded
from memory_backends.store.directory import has_no_store

_SHOWN = 10  # names in a list
_SHARDS_OF_A_WORKER = 2  # in a new store: more workers can be of use later


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
    parser.add_argument(
        "source", nargs="+", help=f"{', '.join(SUFFIXES)} files, or folders of them"
    )
    parser.add_argument("--store", required=True, metavar="DIR", help="the store; made if missing")
    parser.add_argument(
        "--shards",
        type=positive,
        metavar="N",
        help="make a sharded store of so many shards, which are searched at the same time",
    )
    parser.add_argument(
        "--skip-errors",
        action="store_true",
        help="name the files and lines that cannot be read, and read the others",
    )
    parser.add_argument(
        "--prune",
        action="store_true",
        help="remove the documents whose files are gone from these folders, or lines from these "
        ".jsonl files",
    )
    parser.add_argument(
        "--replace",
        action="store_true",
        help="replace documents of the same name that came from other files, as after a move "
        "(default: both are kept, and a part of the path comes before the new one's name)",
    )
    parser.add_argument(
        "--workers",
        type=positive,
        metavar="N",
        help="read with so many models at once, each in a process of Ray's, into a sharded store",
    )
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="with --workers: the Ray cluster that they run on, or auto (default: this machine)",
    )
    add_model_options(parser)
    parser.add_argument("--config", metavar="FILE", help="memory settings in YAML")


def index(options: argparse.Namespace) -> None:
    """Read documents into a store; skip those that it has, replace those that have changed."""
    _check_workers(options)
    names = DocumentNames.of_store(Path(options.store), replace=options.replace)
    with _bad_files_named(options):
        corpus = Corpus(
            options.source,
            names=names,
            skip_errors=options.skip_errors,
            may_be_empty=options.prune,
        )
    session = Session(options, writing=True)
    memory = session.memory
    with _bad_files_named(options):
        expected = estimate(
            memory.encoder,
            memory.backend,
            memory.heads_to_index,
            corpus,
            other_tokens=_other_tokens(memory),
        )
    _say_what_is_left_out(corpus)
    print(
        f"{count(len(corpus.names), 'document')}, {count(expected.tokens, 'token')}: "
        f"about {size(expected.bytes)} and {duration(expected.seconds)}",
        file=sys.stderr,
    )
    num_errors = len(corpus.errors)
    gone = corpus.gone() if options.prune else []
    if session.is_new:  # becomes part of the store with its first document
        session.remember()
    started = time.perf_counter()
    try:
        written = _write(session, options, corpus, expected.rows, gone)
    finally:  # what was written before an error has its files, too
        names.keep(memory.backend.catalog)
    seconds = time.perf_counter() - started
    session.remember()
    for error in corpus.errors[num_errors:]:  # of files that have changed meanwhile
        say(f"left out: {error}")
    used = size(bytes_used(Path(options.store)))
    print(f"{_in_words(written, len(gone), memory, seconds)}; '{options.store}' has {used}")


def _check_workers(options: argparse.Namespace) -> None:
    """Refuse workers where there are none to be had; choose how many shards a new store has.

    Raises:
        ConfigError: Ray is not installed, or an address is given without workers.
        StoreError: the store has no shards.
    """
    if options.workers is None:
        if options.ray is not None:
            raise ConfigError("--ray says where workers run. Say how many with --workers.")
        return
    if find_spec("ray") is None:
        raise ConfigError(
            "--workers needs the package ray. Install it with `pip install 'emt[ray]'`."
        )
    store = Path(options.store)
    if not is_sharded(store) and options.shards is None:
        if not has_no_store(store):
            raise StoreError(
                f"'{store}' is one store without shards, which has one writer. Make another of it "
                f"with `emt split {store} --shards N --into DIR`, or leave out --workers."
            )
        options.shards = max(_SHARDS_OF_A_WORKER * options.workers, 4)


def _write(
    session: Session, options: argparse.Namespace, corpus: Corpus, num_rows: int, gone: list[str]
) -> Written:
    """Write documents, about `num_rows` rows, and remove those that are gone, with a bar."""
    memory = session.memory

    def before_save() -> None:
        bar.set_description("making the index")
        memory.remove(*filter(memory.backend.catalog.has_document, gone))
        profile_if_needed(memory)

    documents = _to_write(corpus, memory)
    with tqdm(total=num_rows, unit="tok", disable=None, smoothing=0.05) as bar:
        if options.workers is None:
            written = memory.write_all(documents, on_rows=bar.update, before_save=before_save)
        else:
            written = _by_workers(session, options, documents, bar.update, before_save)
        bar.total = bar.n  # what was there already took no time
        bar.refresh()
    return written


def _by_workers(
    session: Session,
    options: argparse.Namespace,
    documents: Iterator[tuple[str, str, Metadata | None]],
    on_rows: Callable[[int], object],
    before_save: Callable[[], object],
) -> Written:
    """Do what `Memory.write_all` does, with workers that read into the shards."""
    from emt.cluster.indexing import index_workers

    memory, store = session.memory, Path(options.store)
    if session.is_new:
        memory.before_first_write(memory.backend)
        memory.backend.save()  # makes the store
    _, how = named_model(options)
    with index_workers(session.source, how, memory.config, options.workers, options.ray) as workers:
        try:
            written = workers.write(documents, on_rows)
        finally:  # also what was read before an error
            adopt(store)
            memory.refresh()
        before_save()
        workers.write_files(memory.heads_to_index)
    memory.save()
    return written


def _to_write(corpus: Corpus, memory: Memory) -> Iterator[tuple[str, str, Metadata | None]]:
    """Yield documents as `write_all` takes them, which has locked the store meanwhile."""
    for document in corpus:
        corpus.document_names.check_still_free(document, memory.backend.catalog)
        yield document.name, document.text, document.metadata


def _other_tokens(memory: Memory) -> int:
    """Return how many tokens are read beside documents: of questions, to know what heads find."""
    return MAX_BUILT_IN if memory.lacks_profile else 0


@contextlib.contextmanager
def _bad_files_named(options: argparse.Namespace) -> Iterator[None]:
    """Print a line for each bad file, if there are several."""
    try:
        yield
    except CorpusError as error:
        for each in error.errors:
            say(str(each))
        if not error.errors or options.skip_errors:
            raise
        raise CorpusError(
            f"{len(error.errors):,} files or lines cannot be read, so nothing was written. "
            "Correct what is named above, or leave it out with --skip-errors."
        ) from error


def _say_what_is_left_out(corpus: Corpus) -> None:
    """Print what of the sources is not read, and which names are not as expected."""
    for path, reason in corpus.unread.items():
        say(f"left out: '{path}' cannot be read: {reason}.")
    for suffix, number in corpus.not_installed.items():
        say(
            f"left out: {count(number, suffix + ' file')}, for lack of a package. Install it with "
            "`pip install 'emt[documents]'`."
        )
    for error in corpus.errors:
        say(f"left out: {error}")
    longer = corpus.document_names.lengthened
    if longer:
        shown = ", ".join(f"'{name}'" for name in longer[:_SHOWN])
        more = f" and {len(longer) - _SHOWN:,} more" if len(longer) > _SHOWN else ""
        say(
            f"{count(len(longer), 'document')} of another file had the name already, so a part of "
            f"the path comes before it: {shown}{more}. --replace replaces the others instead."
        )


def _in_words(written: Written, num_removed: int, memory: Memory, seconds: float) -> str:
    """Say how many documents were added, replaced, skipped and removed, and how fast."""
    added, replaced, skipped = written
    parts = [f"{count(added, 'document')} added"]
    if replaced:
        parts.append(f"{replaced:,} replaced")
    if skipped:
        parts.append(f"{skipped:,} {'was' if skipped == 1 else 'were'} there already")
    if num_removed:
        parts.append(f"{num_removed:,} removed")
    words = ", ".join(parts)
    if added + replaced:
        documents = memory.backend.catalog.document_sizes()[-(added + replaced) :]
        tokens, rows = sum(each[1] for each in documents), sum(each[2] for each in documents)
        words += (
            f"; {count(tokens, 'token')}, {count(rows, 'row')} in {seconds:.1f} s "
            f"({tokens / seconds:,.0f} tokens/s)"
        )
    return words
