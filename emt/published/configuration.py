"""Configurations of published extended-mind checkpoints.

They are the stock ones with `memory_config`, the memory settings under their published names.
Published checkpoints have these at the top level, in `attn_config` or in `memory_config`.

Source: the configuration classes of the published implementation
(https://github.com/normal-computing/extended-mind-transformers), for names and defaults.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

from transformers import LlamaConfig, MptConfig, PreTrainedConfig

from emt.config import check_names
from emt.published.settings import NAMES, PUBLISHED


class _ExtendedConfig(PreTrainedConfig):
    """What both configurations share."""

    _stock: ClassVar[type[PreTrainedConfig]]

    memory_config: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        given = _taken(kwargs)
        attention = vars(self).get("attn_config")
        if isinstance(attention, dict):
            attention = dict(attention)  # the caller's stays as it is
            given = {**_taken(attention), **given}
            vars(self)["attn_config"] = attention
        self.memory_config = {**given, **(self.memory_config or {})}
        check_names(self.memory_config, NAMES)
        kwargs.pop("auto_map", None)  # to remote code, which is not needed
        cast(Any, super()).__post_init__(**kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in PUBLISHED:
            self.memory_config = {**(self.memory_config or {}), name: value}
        else:
            cast(Any, super()).__setattr__(name, value)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Make a config of plain types; memory settings are keywords like all others."""
        given = _taken(kwargs)
        made = cast(Any, super()).from_dict(config_dict, **kwargs)
        config = made[0] if isinstance(made, tuple) else made
        for name, value in given.items():
            setattr(config, name, value)
        return made

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read a folder's or a repository's config.json; a stock one has stock defaults."""
        values, unused = super().get_config_dict(*args, **kwargs)
        if values.get("model_type") == cls._stock.model_type:
            values = {**_defaults_of(cls._stock), **values, "model_type": cls.model_type}
        return values, unused


class ExtendedLlamaConfig(_ExtendedConfig, LlamaConfig):
    """`LlamaConfig` and `memory_config`, for `model_type` "extended-llama"."""

    model_type = "extended-llama"
    _stock = LlamaConfig

    rms_norm_eps: float = 1e-5


class ExtendedMptConfig(_ExtendedConfig, MptConfig):
    """`MptConfig` and `memory_config`, for `model_type` "extended-mpt"."""

    model_type = "extended-mpt"
    _stock = MptConfig

    d_model: int = 4096
    n_heads: int = 32
    n_layers: int = 32
    vocab_size: int = 50432

    def __post_init__(self, **kwargs: Any) -> None:
        self.max_seq_len = kwargs.pop("max_seq_len_inference", self.max_seq_len)
        super().__post_init__(**kwargs)


def _taken(values: dict[str, Any]) -> dict[str, Any]:
    """Remove the published memory settings from a dictionary, and return them."""
    return {name: values.pop(name) for name in PUBLISHED if name in values}


def _defaults_of(stock: type[PreTrainedConfig]) -> dict[str, Any]:
    """Return the stock defaults of what the extended classes have other defaults for."""
    names = ("rms_norm_eps", "d_model", "n_heads", "n_layers", "vocab_size")
    return {name: getattr(stock, name) for name in names if hasattr(stock, name)}
