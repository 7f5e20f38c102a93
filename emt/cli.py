"""The `emt` command: index, generate, info, remove. Thin: each subcommand is a few calls of the
library.

Results go to stdout, progress and errors to stderr. A mistake of the user's is one line and exit
code 2.
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
from memory_backends.catalog import Catalog

Command = Callable[[argparse.Namespace], None]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits with 2 after an error of the user's."""
    options = _parser().parse_args(arguments)
    command: Command = options.command
    try:
        command(options)
    except EMTError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _fail("interrupted; documents that were finished are stored.", code=130)
    except BrokenPipeError:  # the reader of a pipe went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, code: int = 2) -> NoReturn:
    print(f"emt: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
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
    for name in corpus.names:
        if memory.backend.catalog.has_document(name):
            _fail(
                f"document '{name}' is already in '{options.store}'. "
                "Remove it first with `emt remove`, or leave it out."
            )
    expected = estimate(session.model, memory, corpus)
    print(
        f"{corpus.num_documents} documents, about {expected.tokens:,} tokens: "
        f"about {_size(expected.bytes)} and {_duration(expected.seconds)}.",
        file=sys.stderr,
    )
    session.remember()
    started = time.perf_counter()
    with tqdm(total=expected.tokens, unit="tok", disable=None, smoothing=0.05) as bar:
        memory.write_all(((d.name, d.text) for d in corpus), on_rows=bar.update)
    seconds = time.perf_counter() - started
    written = [
        size for size in memory.backend.catalog.document_sizes() if size[0] in set(corpus.names)
    ]
    tokens, rows = sum(size[1] for size in written), sum(size[2] for size in written)
    print(
        f"{len(written)} documents, {tokens:,} tokens, {rows:,} rows, "
        f"{_size(_bytes_in(Path(options.store)))} in '{options.store}', "
        f"{seconds:.1f} s ({tokens / seconds:,.0f} tokens/s)"
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
    catalog = Catalog.open(store)
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
    catalog.close()
    if options.json:
        _print_json(described)
        return
    sizes = described["bytes"]
    print(f"store      {store}")
    print(f"model      {described['model']['source']} ({catalog.identity.get('model_type')})")
    print(f"documents  {len(documents):,}")
    print(f"tokens     {described['tokens']:,}")
    print(f"rows       {described['rows']:,} in each of {described['layers']} layers")
    print(f"index      {index.get('factory', 'none yet')}")
    print(
        f"size       {_size(sizes['total'])}: rows {_size(sizes['rows'])} "
        f"({sizes['per_row']:,} bytes a token), index {_size(sizes['index'])}"
    )
    for name, tokens, rows in documents:
        print(f"  {name}  {tokens:,} tokens, {rows:,} rows")


def _remove(options: argparse.Namespace) -> None:
    store = _existing(options.store)
    catalog = Catalog.open(store)
    unknown = [name for name in options.document if not catalog.has_document(name)]
    catalog.close()
    if unknown:
        raise DocumentError(
            f"no document '{unknown[0]}' in '{store}'; nothing was removed. "
            "`emt info` lists the documents."
        )
    backend = VectorDBBackend.open(store)
    removed = {name: backend.remove_document(name) for name in dict.fromkeys(options.document)}
    backend.close()
    print(f"removed {len(removed)} documents, {sum(removed.values()):,} rows, from '{store}'")


# -- shared -------------------------------------------------------------------------------------


class _Session:
    """A model, its tokenizer and its memory over a store, from command-line options."""

    def __init__(self, options: argparse.Namespace, *, writing: bool) -> None:
        store = Path(options.store)
        exists = store.is_dir() and any(store.iterdir())
        if not writing or (store.exists() and not store.is_dir()):
            _existing(options.store)
        settings: dict[str, Any] = {}
        self.source = options.model
        if exists:
            catalog = Catalog.open(store)
            settings = catalog.setting("config") or {}
            self.source = self.source or catalog.setting("model")
            catalog.close()
        if options.config is not None:
            config = MemoryConfig.from_yaml(options.config)
        else:
            config = MemoryConfig.from_dict({"memory_type": "vector_db", **settings})
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
    path = Path(store)
    if not path.is_dir():
        state = "it is a file" if path.exists() else "there is nothing"
        raise StoreError(f"expected a store directory at '{path}'; {state}. Correct the path.")
    return path


def _print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False))


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


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
