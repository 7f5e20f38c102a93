"""`emt merge` and `emt split`: one store of several, or of a sharded one, and the other way."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import Any

from emt.cli.generate import positive
from emt.cli.printing import bytes_used, count, say, size
from emt.cli.session import existing
from emt.cli.store import opened
from memory_backends.catalog import Catalog
from memory_backends.sharded import merge, shards_at, split

_INTERRUPTED = "The stores that were read are untouched. Delete '{into}.partial' if it is there."


def add_to(commands: Any) -> None:
    """Add the subcommands to a parser's."""
    parser = commands.add_parser(
        "merge",
        help="make one store of several, or of a sharded one",
        description="Make one ordinary store of several stores, or of a sharded one. Rows are "
        "copied, not read again by the model; the stores stay as they are.",
    )
    parser.set_defaults(run=merge_stores, interrupted=_INTERRUPTED.format(into="DIR"))
    parser.add_argument("store", metavar="STORE", nargs="+")
    parser.add_argument("--into", required=True, metavar="DIR", help="the new store")
    parser = commands.add_parser(
        "split",
        help="make a sharded store of a store",
        description="Make a sharded store of a store, with the documents in the shards that their "
        "names say. Rows are copied, not read again by the model; the store stays as it is.",
    )
    parser.set_defaults(run=split_store, interrupted=_INTERRUPTED.format(into="DIR"))
    parser.add_argument("store", metavar="STORE")
    parser.add_argument("--shards", required=True, type=positive, metavar="N")
    parser.add_argument("--into", required=True, metavar="DIR", help="the new store")


def merge_stores(options: argparse.Namespace) -> None:
    """Make one store of several."""
    stores, into = [existing(store) for store in options.store], Path(options.into)
    num_documents = merge(stores, into)
    _index(stores, into)
    print(f"merged {count(num_documents, 'document')}; '{into}' has {size(bytes_used(into))}")


def split_store(options: argparse.Namespace) -> None:
    """Make a sharded store of a store."""
    store, into = existing(options.store), Path(options.into)
    num_documents = split(store, into, options.shards)
    _index([store], into)
    shards = count(options.shards, "shard")
    print(
        f"split {count(num_documents, 'document')} into {shards}; "
        f"'{into}' has {size(bytes_used(into))}"
    )


def _index(stores: list[Path], into: Path) -> None:
    """Make index files of the heads that the first store with such has files of."""
    for directory in (single for store in stores for single in shards_at(store)):
        with contextlib.closing(Catalog.open(directory)) as catalog:
            has_index = bool(catalog.setting("index"))
        if has_index:
            say("making the index")
            with contextlib.closing(opened(into, like=directory)) as backend:
                backend.save()
            return
