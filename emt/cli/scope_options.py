"""The options that choose documents, `--documents` and `--where`; settings from options."""

from __future__ import annotations

import argparse
import json
from typing import Any

from emt.errors import ConfigError
from memory_backends.catalog.metadata import is_value


def add_scope_options(parser: argparse.ArgumentParser) -> None:
    """Add the options to a subcommand's parser."""
    parser.add_argument("--documents", nargs="+", metavar="NAME", help="read these documents only")
    parser.add_argument(
        "--where",
        type=_where,
        action="append",
        metavar="KEY=VALUE",
        help="read only documents with this metadata; of one key, any value given will do",
    )


def using_settings(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Return the settings of `Memory.using` that were given: some by name, and the documents."""
    settings = {name: getattr(options, name) for name in (*names, "documents")}
    if options.where is not None:
        where: dict[str, list[Any]] = {}
        for key, values in options.where:  # of one key, any value will do
            where.setdefault(key, []).extend(values)
        settings["where"] = where
    return {name: value for name, value in settings.items() if value is not None}


def metadata_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return metadata that `--where` finds, for what is written.

    Raises:
        ConfigError: there are several values of a key.
    """
    metadata = {}
    for key, values in options.where or ():
        if key in metadata:
            raise ConfigError(f"with --remember, --where must have one value of '{key}'.")
        metadata[key] = values[-1]
    return metadata


def _where(text: str) -> tuple[str, list[Any]]:
    """Read KEY=VALUE; a value that looks like a number or a truth value may be that, or text."""
    key, is_pair, value = text.partition("=")
    if not key or not is_pair:
        raise argparse.ArgumentTypeError(f"must be KEY=VALUE, such as year=1999; got {text!r}")
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):
        parsed = None
    is_other = is_value(parsed) and not isinstance(parsed, str)
    return key, [value, parsed] if is_other else [value]
