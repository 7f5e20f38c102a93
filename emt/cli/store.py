"""`emt remove`, `verify`, `compact` and `rebuild`: look after a store, without its model."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import Any

import memory_backends
from emt.cli.printing import bytes_used, count, index_in_words, print_json, say, size
from emt.cli.session import existing
from emt.cli.store_index import index_of
from emt.config import MemoryConfig
from emt.errors import DocumentError, StoreError
from memory_backends import MemoryBackend
from memory_backends.catalog import Catalog
from memory_backends.faiss.coverage import IndexedHeads, coverage_of
from memory_backends.sharded import shards_at

_WHOLE = "The store is whole; run it again."


def add_to(commands: Any) -> None:
    """Add the subcommands to a parser's."""
    parser = commands.add_parser("remove", help="remove documents from a store")
    parser.set_defaults(run=remove, interrupted="`emt list` shows what is left.")
    parser.add_argument("store", metavar="DIR")
    parser.add_argument("document", nargs="+")
    parser = commands.add_parser(
        "verify", help="read every file of a store and name those that are damaged"
    )
    parser.set_defaults(run=verify)
    parser.add_argument("store", metavar="DIR")
    parser.add_argument("--json", action="store_true", help="print one object")
    parser = commands.add_parser("compact", help="give back the space of removed documents")
    parser.set_defaults(run=compact, interrupted=_WHOLE)
    parser.add_argument("store", metavar="DIR")
    parser = commands.add_parser("rebuild", help="make the FAISS files anew from the rows")
    parser.set_defaults(run=rebuild, interrupted=_WHOLE)
    parser.add_argument("store", metavar="DIR")


def remove(options: argparse.Namespace) -> None:
    """Remove documents; their space is given back by `compact`."""
    store = existing(options.store)
    with contextlib.closing(Catalog.open(store)) as catalog:
        unknown = [name for name in options.document if not catalog.has_document(name)]
    if unknown:
        raise DocumentError(
            f"no document '{unknown[0]}' in '{store}'; nothing was removed. "
            "`emt list` lists the documents."
        )
    names = dict.fromkeys(options.document)
    with contextlib.closing(MemoryBackend.open(store, "vector_db", index_files=False)) as backend:
        rows = sum(backend.remove_document(name) for name in names)
    print(
        f"removed {count(len(names), 'document')}, {count(rows, 'row')}, from '{store}'; "
        "`emt compact` gives back their space"
    )


def verify(options: argparse.Namespace) -> int:
    """Read every file of a store; return 1 if one is damaged."""
    store = existing(options.store)
    damaged = memory_backends.verify(store)
    if options.json:
        files = [{"file": str(damage.file), "reason": damage.reason} for damage in damaged]
        print_json({"store": str(store), "damaged": files})
    elif damaged:
        for damage in damaged:
            print(f"{damage.file}: {damage.reason}")
        num_files = len({str(damage.file) for damage in damaged})
        verb = "is" if num_files == 1 else "are"
        say(f"{count(num_files, 'file')} of '{store}' {verb} damaged.")
    else:
        print(f"no damage in the {size(bytes_used(store))} of '{store}'")
    return 1 if damaged else 0


def compact(options: argparse.Namespace) -> None:
    """Give back the space of what was removed."""
    store = existing(options.store)
    with contextlib.closing(opened(store)) as backend:
        given_back = backend.compact()
    print(f"gave back {size(given_back)}; '{store}' has {size(bytes_used(store))}")


def rebuild(options: argparse.Namespace) -> None:
    """Make the FAISS files anew from the rows."""
    store = existing(options.store)
    with contextlib.closing(opened(store)) as backend:
        backend.rebuild()
    shards = shards_at(store)
    used = sum(bytes_used(shard / "index") for shard in shards)
    print(f"rebuilt {index_in_words(index_of(shards))}; the index has {size(used)}")


def opened(store: Path, *, like: Path | None = None) -> MemoryBackend:
    """Open a store as it was indexed: with the settings and for the heads it has.

    Args:
        store: its directory.
        like: the directory of another store, for whose heads it is opened instead.
    """
    with contextlib.closing(Catalog.open(store)) as catalog:
        config = catalog.setting("config") or {}
    with contextlib.closing(Catalog.open(like or shards_at(store)[0])) as catalog:
        heads = _heads_to_index(catalog)
    return MemoryBackend.open(
        store,
        "vector_db",
        index=config.get("index", MemoryConfig.index),
        sinks=config.get("sinks", MemoryConfig.sinks),
        recall=config.get("search_recall", MemoryConfig.search_recall),
        indexed_heads=heads,
        index_files=False,  # they may be what is damaged
    )


def _heads_to_index(catalog: Catalog) -> IndexedHeads | None:
    """Return which heads have FAISS files; None, for all, if there are none or nobody knows."""
    setting = catalog.setting("index")
    try:
        return coverage_of(setting, catalog.layout).heads if setting else None
    except StoreError:  # `rebuild` makes a damaged record anew
        return None
