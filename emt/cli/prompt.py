"""A prompt or a query: an argument, or what stands on standard input."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path

from emt.cli.session import existing
from emt.errors import ConfigError, DocumentError
from memory_backends.catalog import Catalog


def add_prompt(parser: argparse.ArgumentParser, noun: str) -> None:
    """Add the argument to a subcommand's parser; it is called `noun`."""
    parser.add_argument(
        "prompt",
        nargs="?",
        metavar=noun,
        help="- or none to read it from standard input; before --documents",
    )
    parser.set_defaults(noun=noun)


def read_prompt(options: argparse.Namespace) -> str:
    """Return the prompt that was given, or that stands on standard input.

    Raises:
        ConfigError: there is none, or standard input cannot be read.
        DocumentError: `--documents` may have taken it for a name.
    """
    if options.prompt not in (None, "-"):
        return str(options.prompt)
    noun = options.noun
    if options.prompt is None:
        if options.documents:
            _check_names(existing(options.store), options.documents, noun)
        if sys.stdin.isatty():
            raise ConfigError(f"there is no {noun}. Give it {_place(noun)}, or on standard input.")
    try:
        return sys.stdin.read().removeprefix("\ufeff").rstrip("\r\n")
    except OSError as error:
        raise ConfigError(f"the {noun} cannot be read: {error.strerror}.") from error


def _check_names(store: Path, documents: list[str], noun: str) -> None:
    with contextlib.closing(Catalog.open(store)) as catalog:
        unknown = next((name for name in documents if not catalog.has_document(name)), None)
    if unknown is not None:
        raise DocumentError(
            f"there is no {noun}, and no document '{unknown}' in '{store}'. If this is the {noun}, "
            f"give it {_place(noun)}."
        )


def _place(noun: str) -> str:
    command = "generate" if noun == "prompt" else "search"
    return f'before the options: emt {command} "{noun.upper()}" --store DIR --documents NAME'
