"""Memory settings under their published names, as checkpoints and calls have them.

Source: the configuration classes and the README of the published implementation
(https://github.com/normal-computing/extended-mind-transformers).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from emt.config import PUBLISHED_METHOD, SETTINGS, MemoryConfig, check_names
from emt.errors import ConfigError
from emt.model.positions import max_positions

PUBLISHED = {alias: name for name, each in SETTINGS.items() for alias in each.published}
"""The setting that each published name stands for."""
NAMES = (*PUBLISHED, *SETTINGS)


def absolute(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings whose `path`, if any, is found again from any directory."""
    path = settings.get("path")
    if isinstance(path, str | Path) and str(path):
        return {**settings, "path": str(Path(path).expanduser().resolve())}
    return dict(settings)


def memory_config(
    settings: Mapping[str, Any], defaults: Mapping[str, Any], model_config: PreTrainedConfig
) -> MemoryConfig:
    """Translate published settings.

    Args:
        settings: published names, or those of `MemoryConfig`.
        defaults: what holds where `settings` say nothing; published names, too. Where they say
            nothing either, the published method does. Windows that nobody asked for are at most as
            long as the model has positions, and strides as windows.
        model_config: of the model's text decoder.

    Raises:
        ConfigError: a name that is unknown or given twice, or a value that is wrong.
    """
    check_names(settings, NAMES)
    values: dict[str, Any] = {}
    for name, value in settings.items():
        new_name = PUBLISHED.get(name, name)
        if new_name in values:
            raise ConfigError(f"'{name}' and another name of the same setting are given. Keep one.")
        values[new_name] = _translated(name, value, model_config)
    if values.get("layers") == [] and "use_external_mind_by_layer" in settings:
        values |= {"layers": None, "enabled": False}  # switched off one by one
    for name, value in (*defaults.items(), *PUBLISHED_METHOD.items()):
        values.setdefault(PUBLISHED.get(name, name), value)
    longest = values.get("max_length")
    if "stride" not in values and isinstance(longest, int):
        values["stride"] = min(MemoryConfig.stride, longest)
    config = MemoryConfig.from_dict(values)
    positions = max_positions(model_config)
    longest = config.max_length
    if isinstance(longest, str) or positions is None or longest <= positions:
        return config
    if "max_length" not in settings:
        stride = min(config.stride, positions) if "stride" not in settings else config.stride
        config = config.replace(max_length=max(positions, stride), stride=stride)
    return config


def _translated(name: str, value: Any, model_config: PreTrainedConfig) -> Any:
    """Return a published value as `MemoryConfig` has it; what is wrong stays, to be refused."""
    if name == "memory_type" and value == "faiss":
        return "vector_db"
    if name == "memory_device" and isinstance(value, str | torch.device):
        return None if str(value) == "cpu" else str(value)
    if name == "use_external_mind_by_layer" and value is not None:
        return _layers(value, model_config.num_hidden_layers)
    return value


def _layers(by_layer: Any, num_layers: int) -> list[int] | None:
    """Return which layers read memories, from a list of switches.

    A longer list is cut: published MPT configs have 32 switches whatever the model's depth.
    """
    switches = by_layer if isinstance(by_layer, list | tuple) else ()
    if len(switches) < num_layers or not all(isinstance(on, bool) for on in switches):
        raise ConfigError(
            f"use_external_mind_by_layer must be a list of {num_layers} true or false, one a "
            f"layer; got {by_layer!r}."
        )
    return [idx for idx, on in enumerate(switches[:num_layers]) if on]
