"""The command line: run a subcommand, and say in one line what is wrong."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from emt.cli import documents, generate, index, info, profile, search, store
from emt.errors import EMTError


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exit with 2 after a mistake of the user's."""
    options = _parser().parse_args(arguments)
    try:
        code = options.run(options)
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
    parser.set_defaults(interrupted="")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for subcommand in (index, generate, search, documents, profile, info, store):
        subcommand.add_to(commands)
    return parser
