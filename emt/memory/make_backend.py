"""From a config to the backend that keeps and searches a memory's rows."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from emt.config import MemoryConfig
from emt.errors import ConfigError
from emt.ingest.rereading import Rereader
from emt.ingest.windows import Windows
from emt.model.attached import AttachedModel, reading_layers
from memory_backends import MemoryBackend, option_names
from memory_backends.registry import SHARDED
from memory_backends.sharded.options import Connect
from memory_backends.store.directory import is_sharded


def make_backend(model: AttachedModel, config: MemoryConfig) -> MemoryBackend:
    """Open the store at `config.path`, or start a new memory there, or in RAM if it is None.

    Raises:
        ConfigError: `config.layers` names a layer that is not there, or there are none.
        MemoryMismatchError: another model wrote the store, or there is no such device.
        StoreError: the store is damaged.
    """
    memory_type, options = config.memory_type, _options(config.memory_type, model, config)
    if memory_type == SHARDED or (config.path is not None and is_sharded(Path(config.path))):
        shard_type = "vector_db" if memory_type == SHARDED else memory_type
        memory_type, options = (
            SHARDED,
            {
                "num_shards": config.num_shards,
                "shard_type": shard_type,
                "shard_options": _options(shard_type, model, config),
                "missing_shards": config.missing_shards,
                "time_limit": config.shard_seconds,
                "connect": _connect(config),
            },
        )
    backend = MemoryBackend(
        model.layout,
        memory_type,
        path=config.path,
        identity=model.identity,
        sinks=config.sinks,
        row_codec=_codec(config, model.layout.dtype),
        **options,
    )
    max_length = Windows.of(config, model.config).max_length
    backend.row_source = Rereader(model, config.reread_context, max_length, config.reread_bytes)
    return backend


def _connect(config: MemoryConfig) -> Connect | None:
    """Return what opens shards somewhere else; None for shards in this process."""
    if config.ray is None:
        return None
    if find_spec("ray") is None:
        raise ConfigError("`ray` is not installed. Install it with `pip install 'emt[ray]'`.")
    from memory_backends.sharded.remote import connect_remotely

    return connect_remotely(config.ray, config.shard_seconds)


def _options(memory_type: str, model: AttachedModel, config: MemoryConfig) -> dict[str, Any]:
    """Return those of the options of a searcher that the settings have."""
    settings = {
        "device": config.memory_device,
        "index": config.index,
        "recall": config.search_recall,
        "overfetch": config.overfetch,
        "cache_bytes": config.cache_bytes,
        "indexed_layers": reading_layers(model, config),
    }
    return {name: settings[name] for name in option_names(memory_type) if name in settings}


def _codec(config: MemoryConfig, dtype: torch.dtype) -> str:
    """Return how a new store keeps the rows of a model that computes in `dtype`."""
    if config.row_codec != "auto":
        return config.row_codec
    return "float16" if dtype == torch.float32 else "exact"
