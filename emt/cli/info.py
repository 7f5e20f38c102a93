"""`emt info`: describe a store, without reading its rows."""

from __future__ import annotations

import argparse
import contextlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from emt.cli.documents import document_line
from emt.cli.printing import bytes_used, count, index_in_words, one_line, print_json, size
from emt.cli.session import existing
from emt.cli.store_index import index_files_of, index_of
from emt.errors import ConfigError, StoreError
from emt.profiles.choice import PROFILE, known_profiles, shipped_profiles
from emt.routing.head_profile import HeadProfile
from memory_backends.catalog import Catalog
from memory_backends.sharded import shards_at
from memory_backends.store.directory import is_sharded
from memory_backends.store.identity import SKETCH, sketch_in

_LAYERS_NAMED = 8
_DOCUMENTS_NAMED = 20


def add_to(commands: Any) -> None:
    """Add the subcommand to a parser's."""
    parser = commands.add_parser("info", help="describe a store")
    parser.set_defaults(run=info)
    parser.add_argument("store", metavar="DIR")
    parser.add_argument("--json", action="store_true", help="print one object")


def info(options: argparse.Namespace) -> None:
    """Describe a store."""
    store = existing(options.store)
    with contextlib.closing(Catalog.open(store)) as catalog:
        described = _describe(store, catalog)
    if options.json:
        print_json(described)
    else:
        _print(described)


def _describe(store: Path, catalog: Catalog) -> dict[str, Any]:
    """Return what a store has, as plain JSON types."""
    documents = catalog.document_sizes()
    identity = {key: value for key, value in catalog.identity.items() if key != SKETCH}
    shards = shards_at(store)
    described = {
        "store": str(store),
        "format_version": catalog.setting("format_version"),
        "model": {"source": catalog.setting("model"), **identity},
        "config": catalog.setting("config"),
        "documents": [
            {"name": name, "tokens": tokens, "rows": rows} for name, tokens, rows in documents
        ],
        "tokens": sum(tokens for _, tokens, _ in documents),
        "rows": len(catalog.searchable_rows("all")),
        "layers": len(catalog.layout.layers),
        "row_codec": catalog.row_codec,
        "index": {**index_of(shards), **index_files_of(shards)},
        "profile": _profile(catalog),
        "bytes": {
            "rows": sum(bytes_used(shard / "rows") for shard in shards),
            "index": sum(bytes_used(shard / "index") for shard in shards),
            "total": bytes_used(store),
            "per_row": catalog.bytes_per_row,
        },
    }
    if is_sharded(store):
        described["shards"] = [_shard(shard) for shard in shards]
    return described


def _shard(path: Path) -> dict[str, Any]:
    """Return what one shard has; null for one that is not there or cannot be read."""
    try:
        with contextlib.closing(Catalog.open(path)) as catalog:
            sizes = catalog.document_sizes()
    except StoreError as error:
        return {"path": str(path), "documents": None, "rows": None, "error": str(error)}
    rows = sum(rows for *_, rows in sizes)
    return {"path": str(path), "documents": len(sizes), "rows": rows, "bytes": bytes_used(path)}


def _profile(catalog: Catalog) -> dict[str, Any] | None:
    """Return the store's head profile, or the one of its model; None if there is none."""
    kept = catalog.setting(PROFILE)
    if kept is None:
        profile = next(iter(known_profiles(sketch_in(catalog.identity))), None)
    else:
        try:
            profile = HeadProfile.from_json(kept)
        except ConfigError as error:
            return {"error": str(error)}
    if profile is None:
        return None
    return {
        "kept": kept is not None,
        "shipped": profile in shipped_profiles(),
        "model": profile.model,
        "source": profile.source,
        "heads": [asdict(head) for head in profile.heads],
    }


def _print(described: dict[str, Any]) -> None:
    model, index, sizes = described["model"], described["index"], described["bytes"]
    print(f"store      {one_line(described['store'])}")
    print(f"model      {model['source']} ({model.get('model_type')})")
    print(f"documents  {len(described['documents']):,}")
    print(f"tokens     {described['tokens']:,}")
    print(f"rows       {described['rows']:,} in each of {described['layers']} layers")
    shards = described.get("shards", [])
    if shards:
        print(f"shards     {len(shards):,}{_missing_in_words(shards)}")
    print(f"index      {index_in_words(index)}")
    if index:
        print(f"heads      {_heads_in_words(index)}")
    print(f"profile    {_profile_in_words(described['profile'])}")
    print(
        f"size       {size(sizes['total'])}: rows {size(sizes['rows'])} "
        f"({sizes['per_row']:,} bytes a token, {described['row_codec']}), "
        f"index {size(sizes['index'])}"
    )
    documents = described["documents"]
    for document in documents[:_DOCUMENTS_NAMED]:
        print(f"  {document_line(document)}")
    if len(documents) > _DOCUMENTS_NAMED:
        print(f"  and {len(documents) - _DOCUMENTS_NAMED:,} more; `emt list` lists them")


def _missing_in_words(shards: list[dict[str, Any]]) -> str:
    missing = [str(number) for number, shard in enumerate(shards) if "error" in shard]
    if not missing:
        return ""
    return f"; cannot be read: {', '.join(missing)} (--json says why)"


def _heads_in_words(index: dict[str, Any]) -> str:
    """Say which heads are indexed, as layer.head, and what it saves that the others are not."""
    num_heads, of_all = index["num_heads"], index["all_heads"]
    files = f"FAISS files {size(index['file_bytes'])}"
    if num_heads == of_all:
        return f"all {count(of_all, 'head')}, {files}"
    names = [_heads_of_layer(layer_idx, heads) for layer_idx, heads in index["heads"].items()]
    named = ", ".join(names[:_LAYERS_NAMED])
    if len(names) > _LAYERS_NAMED:
        named += f" and those of {count(len(names) - _LAYERS_NAMED, 'layer')} more"
    words = f"{num_heads} of {count(of_all, 'head')}" + (f" ({named})" if named else "")
    if not index["file_bytes"]:
        return words
    saved = size(index["saved_bytes_estimate"])
    return f"{words}, {files}: about {saved} less than all heads, estimated from these files"


def _heads_of_layer(layer_idx: str, heads: list[int]) -> str:
    """Name heads of one layer: "17.1", "17.0, 17.2" or, for a run of them, "17.0-2"."""
    if len(heads) > 1 and heads == list(range(heads[0], heads[-1] + 1)):
        return f"{layer_idx}.{heads[0]}-{heads[-1]}"
    return ", ".join(f"{layer_idx}.{head}" for head in heads)


def _profile_in_words(profile: dict[str, Any] | None) -> str:
    if profile is None:
        return "none (`emt profile` makes one)"
    if "error" in profile:
        return f"cannot be read: {profile['error']}"
    heads = profile["heads"]
    named = ", ".join(f"{head['layer']}.{head['head']}" for head in heads)
    words = f"{count(len(heads), 'query head')} ({named}) of {profile['model']}"
    if profile["source"]:
        words += f", from {profile['source']}"
    if profile["kept"]:
        return words
    return f"{words}; {'comes with emt' if profile['shipped'] else 'in the user cache'}"
