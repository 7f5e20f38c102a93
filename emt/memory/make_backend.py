"""From a config to the backend that keeps and searches a memory's rows."""

from __future__ import annotations

import torch

from emt.config import MemoryConfig
from emt.model.attached import AttachedModel, reading_layers
from memory_backends import MemoryBackend, option_names


def make_backend(model: AttachedModel, config: MemoryConfig) -> MemoryBackend:
    """Open the store at `config.path`, or start a new memory there, or in RAM if it is None.

    Raises:
        ConfigError: `config.layers` names a layer that is not there, or there are none.
        MemoryMismatchError: another model wrote the store, or there is no such device.
        StoreError: the store is damaged.
    """
    settings = {
        "device": config.memory_device,
        "index": config.index,
        "recall": config.search_recall,
        "overfetch": config.overfetch,
        "cache_bytes": config.cache_bytes,
        "indexed_layers": reading_layers(model, config),
    }
    return MemoryBackend(
        model.layout,
        config.memory_type,
        path=config.path,
        identity=model.identity,
        sinks=config.sinks,
        row_codec=_codec(config, model.layout.dtype),
        **{name: settings[name] for name in option_names(config.memory_type) if name in settings},
    )


def _codec(config: MemoryConfig, dtype: torch.dtype) -> str:
    """Return how a new store keeps the rows of a model that computes in `dtype`."""
    if config.row_codec != "auto":
        return config.row_codec
    return "float16" if dtype == torch.float32 else "exact"
