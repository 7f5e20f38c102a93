"""The command line: what may be said, and what is said when it goes wrong."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from emt.cli import profiling, reading, stores
from emt.errors import EMTError
from memory_backends.catalog.metadata import is_value

Command = Callable[[argparse.Namespace], int | None]

_STORE_COMMANDS: dict[str, tuple[Command, str]] = {
    "info": (stores.info, "describe a store"),
    "verify": (stores.verify, "read every file of a store and name those that are damaged"),
    "compact": (stores.compact, "give back the space of removed documents"),
    "rebuild": (stores.rebuild, "make the FAISS files anew from the rows"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits with 2 after an error of the user's."""
    options = _parser().parse_args(arguments)
    command: Command = options.command
    try:
        code = command(options)
        sys.stdout.flush()
    except EMTError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _fail(f"interrupted. {options.interrupted}".strip(), code=130)
    except BrokenPipeError:  # the reader of a pipe went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    if code:
        raise SystemExit(code)


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
    _add_index(commands)
    _add_generate(commands)
    _add_profile(commands)
    for name, (command, what) in _STORE_COMMANDS.items():
        added = commands.add_parser(name, help=what)
        added.set_defaults(command=command, interrupted="The store is whole; run it again.")
        added.add_argument("store", metavar="DIR")
        if name in ("info", "verify"):
            added.set_defaults(interrupted="")
            added.add_argument("--json", action="store_true", help="print one object")
    remove = commands.add_parser("remove", help="remove documents from a store")
    remove.set_defaults(command=stores.remove, interrupted="`emt info` lists what is left.")
    remove.add_argument("store", metavar="DIR")
    remove.add_argument("document", nargs="+")
    return parser


def _add_index(commands: Any) -> None:
    index = commands.add_parser(
        "index",
        help="read documents into a store",
        description="Read documents into a store. Those that it has already are skipped, those "
        "that have changed are replaced; so the same command goes on where it was stopped.",
    )
    index.set_defaults(
        command=reading.index,
        interrupted="What was finished before is kept; the same command goes on from there.",
    )
    index.add_argument("source", nargs="+", help=".txt, .md or .jsonl files, or folders of them")
    index.add_argument("--store", required=True, metavar="DIR", help="the store; made if missing")
    index.add_argument(
        "--model",
        help="a folder, a hub name or a .gguf file (default: the store's, or SmolLM2-135M)",
    )
    index.add_argument("--config", metavar="FILE", help="memory settings in YAML")


def _add_generate(commands: Any) -> None:
    generate = commands.add_parser("generate", help="answer a prompt from a store")
    generate.set_defaults(command=reading.answer, interrupted="")
    generate.add_argument("prompt")
    generate.add_argument("--store", required=True, metavar="DIR")
    generate.add_argument("--model", help="(default: the model that wrote the store)")
    generate.add_argument("--config", metavar="FILE", help="memory settings in YAML")
    generate.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="use the chat template (default: if the model has one)",
    )
    generate.add_argument(
        "--mode",
        choices=("token", "passage", "auto"),
        help="how the memory is used (default: the store's setting)",
    )
    generate.add_argument("--max-new-tokens", type=_positive, default=64, metavar="N")
    generate.add_argument(
        "--topk", type=_topk, metavar="K", help="memories for each query, or auto"
    )
    generate.add_argument(
        "--uncertainty",
        type=_uncertainty,
        metavar="ENTROPY:K",
        help="redo a step whose entropy, in nats, is above ENTROPY with K memories: 1.0:12",
    )
    generate.add_argument(
        "--documents", nargs="+", metavar="NAME", help="read these documents only"
    )
    generate.add_argument(
        "--where",
        type=_where,
        action="append",
        metavar="KEY=VALUE",
        help="read only documents with this metadata; of one key, any value given will do",
    )
    generate.add_argument(
        "--citations", action="store_true", help="print the passages that were used"
    )
    generate.add_argument("--json", action="store_true", help="print one object")
    generate.add_argument("--no-memory", action="store_true", help="the plain model")


def _add_profile(commands: Any) -> None:
    profile = commands.add_parser(
        "profile",
        help="find the heads of a model that know which passage is meant",
        description="Find the heads of a model that know which passage is meant, for the passage "
        "mode. They are found by questions: those of --data, or else some that are made from the "
        "text of --store.",
    )
    profile.set_defaults(command=profiling.profile, interrupted="", config=None)
    profile.add_argument("--model", help="(default: the store's, or SmolLM2-135M)")
    profile.add_argument(
        "--data",
        metavar="FILE",
        help=".json in SQuAD's layout, or .jsonl with context, question and answer",
    )
    profile.add_argument("--store", metavar="DIR", help="keep the profile here, without --output")
    profile.add_argument("--output", metavar="FILE", help="write the profile here")


def _topk(text: str) -> int | str:
    return text if text == "auto" else _positive(text)


def _uncertainty(text: str) -> dict[str, Any]:
    entropy, _, topk = text.partition(":")
    try:
        return {"entropy": float(entropy), "topk": int(topk)}
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be an entropy and a whole number, such as 1.0:12; got {text!r}"
        ) from None


def _where(text: str) -> tuple[str, list[Any]]:
    """Read KEY=VALUE; a value that looks like a number or a truth value may be that, or text."""
    key, is_pair, value = text.partition("=")
    if not key or not is_pair:
        raise argparse.ArgumentTypeError(f"must be KEY=VALUE, such as year=1999; got {text!r}")
    try:
        meant = json.loads(value)
    except (ValueError, RecursionError):
        meant = None
    return key, [value, meant] if is_value(meant) and not isinstance(meant, str) else [value]


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1; got {text!r}")
    return number
