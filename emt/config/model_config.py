"""`ModelConfig`: how the command line loads a model, in the same YAML file as the memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from emt.config import yaml_form
from emt.config.setting import check_names, documented, setting, settings_of
from emt.errors import ConfigError

GROUP = "model"
"""The group of a YAML file. `MemoryConfig` passes over it: a memory does not load its model."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Settings of loading a model, named as in `from_pretrained`.

    Raises:
        ConfigError: a value of a wrong type.
    """

    name: str | None = setting(
        None,
        "A folder, a hub name or a .gguf file. null for the model that wrote the store, or "
        "SmolLM2-135M for a new one. The command line sets it with --model.",
        values="the name of a model",
    )
    device: str | None = setting(
        None,
        "Where the model runs. null for the CPU.",
        values="a torch device such as 'cpu' or 'cuda:0'",
    )
    dtype: Literal["auto", "float16", "bfloat16", "float32", "float64"] = setting(
        "auto", "The dtype of its weights; 'auto' for the checkpoint's own."
    )
    attn_implementation: str | None = setting(
        None,
        "What computes its attention. null for transformers' choice.",
        values="'sdpa', 'eager' or another name that transformers knows",
    )

    def __post_init__(self) -> None:
        for name, each in MODEL_SETTINGS.items():
            object.__setattr__(self, name, each.checked(getattr(self, name)))

    @classmethod
    def from_yaml(cls, path: Path | str) -> Self:
        """Read the group `model` of a file; without one, nothing is set.

        Raises:
            ConfigError: the file is missing or not a YAML mapping, the group is not a mapping, or a
                setting in it is unknown or wrong.
        """
        group = yaml_form.load(path).get(GROUP) or {}
        try:
            if not isinstance(group, Mapping):
                raise ConfigError(
                    f"'{GROUP}' is a group of settings ({', '.join(MODEL_SETTINGS)}) and must be a "
                    f"mapping; got {group!r:.100}."
                )
            check_names(group, MODEL_SETTINGS, of="model")
            return cls(**group)
        except ConfigError as error:
            raise ConfigError(f"config '{path}': {error}") from error


MODEL_SETTINGS = settings_of(ModelConfig)
"""The settings by name."""

ModelConfig.__doc__ = documented(ModelConfig.__doc__ or "", MODEL_SETTINGS)
