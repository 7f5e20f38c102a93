"""The `emt` command: index, generate, info, remove. Thin: each subcommand is a few calls of the
library.

Results go to stdout, progress and errors to stderr. A mistake of the user's is one line and exit
code 2; what is no mistake of the user's keeps its traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from emt.config import MemoryConfig
from emt.corpus import Corpus
from emt.errors import DocumentError, EMTError, StoreError
from emt.generation import generate
from emt.indexing import estimate
from emt.integration import attach
from emt.loading import DEFAULT_MODEL, load
from memory_backends import VectorDBBackend
from memory_backends.catalog import FILE_NAME as CATALOG_FILE_NAME
from memory_backends.catalog import Catalog
from memory_backends.validation import check_directory, has_no_store

Command = Callable[[argparse.Namespace], None]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits with 2 after an error of the user's."""
    options = _parser().parse_args(arguments)
    command: Command = options.command
    try:
        command(options)
        sys.stdout.flush()
    except EMTError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _fail("interrupted. What was finished before is kept.", code=130)
    except BrokenPipeError:  # the reader of a pipe went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, code: int = 2) -> NoReturn:
    print(f"emt: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        _fail(f"{message} (see `{self.prog} --help`)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="emt", description="A memory of millions of tokens for any causal language model."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    index = commands.add_parser("index", help="read documents into a store")
    index.set_defaults(command=_index)
    index.add_argument("source", nargs="+", help=".txt, .md or .jsonl files, or folders of them")
    index.add_argument("--store", required=True, metavar="DIR", help="the store; made if missing")
    index.add_argument(
        "--model",
        help="a folder, a hub name or a .gguf file (default: the store's, or SmolLM2-135M)",
    )
    index.add_argument("--config", metavar="FILE", help="memory settings in YAML")

    generate = commands.add_parser("generate", help="answer a prompt from a store")
    generate.set_defaults(command=_generate)
    generate.add_argument("prompt")
    generate.add_argument("--store", required=True, metavar="DIR")
    generate.add_argument("--model", help="(default: the model that wrote the store)")
    generate.add_argument("--config", metavar="FILE", help="memory settings in YAML")
    generate.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="use the chat template (default: if the model has one)",
    )
    generate.add_argument("--max-new-tokens", type=_positive, default=64, metavar="N")
    generate.add_argument("--topk", type=_positive, metavar="K", help="memories for each query")
    generate.add_argument(
        "--citations", action="store_true", help="print the passages that were used"
    )
    generate.add_argument("--json", action="store_true", help="print one object")
    generate.add_argument("--no-memory", action="store_true", help="the plain model")

    info = commands.add_parser("info", help="describe a store")
    info.set_defaults(command=_info)
    info.add_argument("store", metavar="DIR")
    info.add_argument("--json", action="store_true", help="print one object")

    remove = commands.add_parser("remove", help="remove documents from a store")
    remove.set_defaults(command=_remove)
    remove.add_argument("store", metavar="DIR")
    remove.add_argument("document", nargs="+")
    return parser


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1; got {text!r}")
    return number


# -- index --------------------------------------------------------------------------------------


def _index(options: argparse.Namespace) -> None:
    corpus = Corpus(options.source)
    session = _Session(options, writing=True)
    memory = session.memory
    expected = estimate(session.model, memory, corpus)
    print(
        f"{_count(len(corpus.names), 'document')}, {_count(expected.tokens, 'token')}: "
        f"about {_size(expected.bytes)} and {_duration(expected.seconds)}",
        file=sys.stderr,
    )
    if session.is_new:  # becomes part of the store with its first document
        session.remember()
    started = time.perf_counter()
    with tqdm(total=expected.rows, unit="tok", disable=None, smoothing=0.05) as bar:
        memory.write_all(((d.name, d.text) for d in corpus), on_rows=bar.update)
    seconds = time.perf_counter() - started
    session.remember()
    names = set(corpus.names)
    written = [size for size in memory.backend.catalog.document_sizes() if size[0] in names]
    tokens, rows = sum(size[1] for size in written), sum(size[2] for size in written)
    print(
        f"{_count(len(written), 'document')}, {_count(tokens, 'token')}, {_count(rows, 'row')} in "
        f"{seconds:.1f} s ({tokens / seconds:,.0f} tokens/s); "
        f"'{options.store}' has {_size(_bytes_in(Path(options.store)))}"
    )


# -- generate -----------------------------------------------------------------------------------


def _generate(options: argparse.Namespace) -> None:
    started = time.perf_counter()
    session = _Session(options, writing=False)
    opened = time.perf_counter()
    answer = generate(
        session.model,
        session.memory,
        options.prompt,
        chat=options.chat,
        max_new_tokens=options.max_new_tokens,
        use_memory=not options.no_memory,
        topk=options.topk,
    )
    if options.json:
        timings = {"open_seconds": round(opened - started, 3), **answer.timings}
        _print_json({**answer.to_json(), "timings": timings})
        return
    print(answer.text)
    if options.citations:
        print()
        for rank, citation in enumerate(answer.citations, start=1):
            where = "" if citation.start is None else f" {citation.start}-{citation.end}"
            print(f"[{rank}] {citation.share:5.1%}  {citation.document}{where}")
            print(f"      {' '.join(citation.text.split())}")
        if not answer.citations:
            print("No memory was used.")


# -- info, remove -------------------------------------------------------------------------------


def _info(options: argparse.Namespace) -> None:
    store = _existing(options.store)
    with contextlib.closing(Catalog.open(store)) as catalog:
        documents = catalog.document_sizes()
        index = catalog.setting("index") or {}
        described = {
            "store": str(store),
            "model": {"source": catalog.setting("model"), **catalog.identity},
            "config": catalog.setting("config"),
            "documents": [{"name": n, "tokens": t, "rows": r} for n, t, r in documents],
            "tokens": sum(tokens for _, tokens, _ in documents),
            "rows": len(catalog.searchable_rows("all")),
            "layers": len(catalog.layout.layers),
            "index": {key: index[key] for key in ("factory", "num_rows") if key in index},
            "bytes": {
                "rows": _bytes_in(store / "rows"),
                "index": _bytes_in(store / "index"),
                "total": _bytes_in(store),
                "per_row": catalog.layout.bytes_per_row,
            },
        }
    if options.json:
        _print_json(described)
        return
    sizes = described["bytes"]
    print(f"store      {store}")
    print(f"model      {described['model']['source']} ({described['model'].get('model_type')})")
    print(f"documents  {len(documents):,}")
    print(f"tokens     {described['tokens']:,}")
    print(f"rows       {described['rows']:,} in each of {described['layers']} layers")
    print(f"index      {index.get('factory', 'none yet')}")
    print(
        f"size       {_size(sizes['total'])}: rows {_size(sizes['rows'])} "
        f"({sizes['per_row']:,} bytes a token), index {_size(sizes['index'])}"
    )
    for name, tokens, rows in documents:
        print(f"  {name}  {_count(tokens, 'token')}, {_count(rows, 'row')}")


def _remove(options: argparse.Namespace) -> None:
    store = _existing(options.store)
    with contextlib.closing(Catalog.open(store)) as catalog:
        unknown = [name for name in options.document if not catalog.has_document(name)]
    if unknown:
        raise DocumentError(
            f"no document '{unknown[0]}' in '{store}'; nothing was removed. "
            "`emt info` lists the documents."
        )
    names = dict.fromkeys(options.document)
    with contextlib.closing(VectorDBBackend.open(store)) as backend:
        rows = sum(backend.remove_document(name) for name in names)
    print(f"removed {_count(len(names), 'document')}, {_count(rows, 'row')}, from '{store}'")


# -- shared -------------------------------------------------------------------------------------


class _Session:
    """A model, its tokenizer and its memory over a store, from command-line options."""

    def __init__(self, options: argparse.Namespace, *, writing: bool) -> None:
        store = Path(options.store) if writing else _existing(options.store)
        self.is_new = writing and _is_free(store)
        settings: dict[str, Any] = {}
        self.source = options.model
        if not self.is_new:
            with contextlib.closing(Catalog.open(store)) as catalog:
                settings = catalog.setting("config") or {}
                self.source = self.source or catalog.setting("model")
        defaults = {"memory_type": "vector_db", **settings}  # a store outlives the process
        if options.config is not None:
            config = MemoryConfig.from_yaml(options.config, defaults=defaults)
        else:
            config = MemoryConfig.from_dict(defaults)
        self.config = config.replace(path=str(store))
        self._load()

    def _load(self) -> None:
        with quiet():
            loaded = load(self.source or DEFAULT_MODEL)
        self.source = loaded.source
        self.model = loaded.model
        self.memory = attach(loaded.model, self.config, tokenizer=loaded.tokenizer)

    def remember(self) -> None:
        """Keep the model's name and the settings in the store, for `generate`."""
        settings = {key: value for key, value in self.config.to_dict().items() if key != "path"}
        self.memory.backend.catalog.set_setting("config", settings)
        self.memory.backend.catalog.set_setting("model", self.source)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the warnings of loading a model off the screen, and its progress bars out of a pipe."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if sys.stderr.isatty():
        yield
    else:
        with contextlib.redirect_stderr(io.StringIO()):
            yield


def _existing(store: str) -> Path:
    """Return the path of a store that must be there."""
    path = Path(store)
    if _is_free(path):
        raise StoreError(f"expected a store at '{path}'; there is none. Correct the path.")
    return path


def _is_free(path: Path) -> bool:
    """Tell whether a store can be made at a path; False if there is one."""
    try:
        is_free = has_no_store(check_directory(path))
        is_store = is_free or (path / CATALOG_FILE_NAME).is_file()
    except StoreError:
        raise
    except OSError as error:  # no permission, too long a name, a file on the way
        raise StoreError(f"'{path}' cannot be a store: {error.strerror}.") from error
    if not is_store:
        raise StoreError(
            f"'{path}' has no {CATALOG_FILE_NAME}, so it is no store, but it is not empty. "
            "Give the directory of a store, or a new one."
        )
    return is_free


def _print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False))


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
