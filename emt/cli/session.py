"""What subcommands start from: the path of a store, and a model with its memory."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import Any

from emt.attach import attach
from emt.cli.model_options import load_model
from emt.cli.printing import say
from emt.config import MemoryConfig
from emt.errors import StoreError
from emt.memory.memory import Memory
from memory_backends.catalog import FILE_NAME as CATALOG_FILE_NAME
from memory_backends.catalog import Catalog
from memory_backends.registry import SHARDED
from memory_backends.sharded import Placements
from memory_backends.store.directory import check_directory, has_no_store, is_sharded


class Session:
    """A model with its memory over a store, from command-line options.

    Args:
        options: with `store`, `config` and those of `add_model_options`.
        writing: make the store if there is none.

    Attributes:
        is_new: whether there was no store.
        source: the folder, hub name or file of the model.
    """

    def __init__(self, options: argparse.Namespace, *, writing: bool) -> None:
        store = Path(options.store) if writing else existing(options.store)
        self.is_new = writing and _is_free(store)
        settings: dict[str, Any] = {}
        source = None
        if not self.is_new:
            with contextlib.closing(Catalog.open(store)) as catalog:
                settings = catalog.setting("config") or {}
                source = catalog.setting("model")
        defaults = {"memory_type": "vector_db", **settings}  # a store outlives the process
        if options.config is not None:
            config = MemoryConfig.from_yaml(options.config, defaults=defaults)
        else:
            config = MemoryConfig.from_dict(defaults)
        self.config = _with_shards(config.replace(path=str(store)), options, is_new=self.is_new)
        loaded = load_model(options, source)
        self.source = loaded.source
        self.model = loaded.model
        self.memory = attach(loaded.model, self.config, tokenizer=loaded.tokenizer)
        if self.memory.missing_shards:
            numbers = ", ".join(map(str, self.memory.missing_shards))
            say(f"missing shards, whose documents are not found: {numbers}. See `emt info`.")

    def remember(self) -> None:
        """Keep the model's name and the settings in the store, for `generate`."""
        settings = {key: value for key, value in self.config.to_dict().items() if key != "path"}
        if settings.get("memory_type") == SHARDED:  # that it is sharded is seen from its files
            settings["memory_type"] = "vector_db"
        self.memory.backend.catalog.set_setting("config", settings)
        self.memory.backend.catalog.set_setting("model", self.source)


def _with_shards(
    config: MemoryConfig, options: argparse.Namespace, *, is_new: bool
) -> MemoryConfig:
    """Return a config for as many shards as `--shards` asks for.

    Raises:
        StoreError: there is a store that has another number.
    """
    wanted = getattr(options, "shards", None)
    if wanted is None:
        return config
    path = Path(str(config.path))
    if is_new:
        return config.replace(memory_type=SHARDED, num_shards=wanted)
    if not is_sharded(path):
        raise StoreError(
            f"'{path}' is one store without shards. Make another of it with "
            f"`emt split {path} --shards {wanted} --into DIR`, or leave out --shards."
        )
    with contextlib.closing(Placements(path)) as placements:
        if len(placements.shards) != wanted:
            raise StoreError(
                f"'{path}' has {len(placements.shards)} shards, which cannot be changed to "
                f"{wanted}. Leave out --shards, or `emt merge` it and `emt split` that."
            )
    return config


def missing_shards(memory: Memory) -> dict[str, Any]:
    """Return what JSON says of shards that were not asked; nothing if there are none."""
    return {"missing_shards": list(memory.missing_shards)} if memory.missing_shards else {}


def existing(store: str) -> Path:
    """Return the path of a store that must be there.

    Raises:
        StoreError: there is none, or something else.
    """
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
