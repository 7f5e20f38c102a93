"""From a config to the backend that keeps and searches a memory's rows."""

from __future__ import annotations

from emt.config import MemoryConfig
from emt.model.attached import AttachedModel, reading_layers
from memory_backends import ManualBackend, MemoryBackend, VectorDBBackend


def make_backend(model: AttachedModel, config: MemoryConfig) -> MemoryBackend:
    """Open the store at `config.path`, or start a new memory there, or in RAM if it is None.

    Raises:
        ConfigError: `config.layers` names a layer that is not there, or there are none.
        MemoryMismatchError: another model wrote the store, or there is no such device.
        StoreError: the store is damaged.
    """
    layers = reading_layers(model, config)
    if config.memory_type == "manual":
        return ManualBackend(
            model.layout,
            path=config.path,
            identity=model.identity,
            sinks=config.sinks,
            row_codec=config.row_codec,
            device=config.memory_device,
        )
    return VectorDBBackend(
        model.layout,
        path=config.path,
        identity=model.identity,
        sinks=config.sinks,
        row_codec=config.row_codec,
        index=config.index,
        recall=config.search_recall,
        overfetch=config.overfetch,
        cache_bytes=config.cache_bytes,
        indexed_layers=layers,
        device=config.memory_device,
    )
