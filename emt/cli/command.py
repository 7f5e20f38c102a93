"""The command line: run a subcommand, and say in one line what is wrong."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn, TextIO

from emt.cli import (
    chat,
    documents,
    generate,
    index,
    info,
    profile,
    search,
    serve,
    shards,
    store,
)
from emt.cli.printing import prepare_streams, say
from emt.errors import EMTError


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exit with 2 after a mistake of the user's."""
    prepare_streams()
    hint = ""
    try:
        try:
            options = _parser().parse_args(arguments)
        finally:
            sys.stdout.flush()  # of --help
        hint = options.interrupted
        code = options.run(options)
        sys.stdout.flush()
    except EMTError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _fail(f"interrupted. {hint}".strip(), code=130)
    except BrokenPipeError:  # the reader of a pipe went away
        _mute(sys.stdout, sys.stderr)
        return
    except OSError as error:
        _mute(sys.stdout)
        place = "reading or writing failed" if error.filename is None else f"'{error.filename}'"
        _fail(f"{place}: {error.strerror or error}")
    if code:
        raise SystemExit(code)


def _fail(message: str, code: int = 2) -> NoReturn:
    try:
        say(message)
    except OSError:  # nobody hears it
        _mute(sys.stderr)
    raise SystemExit(code)


def _mute(*streams: TextIO) -> None:
    """Let what is still in a stream's buffer go nowhere, when the interpreter ends."""
    for stream in streams:
        with contextlib.suppress(OSError):  # it is no file
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        _fail(f"{message} (see `{self.prog} --help`)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="emt", description="A memory of millions of tokens for any causal language model."
    )
    parser.set_defaults(interrupted="")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    modules = (index, generate, chat, serve, search, documents, profile, info, store, shards)
    for subcommand in modules:
        subcommand.add_to(commands)
    return parser
