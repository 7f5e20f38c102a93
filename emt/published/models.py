"""The published model classes, and their registration with transformers."""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaForCausalLM,
    MptForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from emt.published.configuration import ExtendedLlamaConfig, ExtendedMptConfig
from emt.published.mind import ExtendedMind


class ExtendedLlamaForCausalLM(ExtendedMind, LlamaForCausalLM):
    """Extended Mind Llama: `LlamaForCausalLM` with memories and its published defaults."""

    config_class = ExtendedLlamaConfig

    @classmethod
    def memory_defaults(cls, config: PreTrainedConfig) -> dict[str, Any]:
        """Return the published defaults of Llama: ids 0, bos and eos leave no memories."""
        special = {0}
        for ids in (config.bos_token_id, config.eos_token_id):
            special.update([ids] if isinstance(ids, int) else ids or [])
        return {"tokenizer_all_special_ids": sorted(special)}


class ExtendedMptForCausalLM(ExtendedMind, MptForCausalLM):
    """Extended Mind MPT: `MptForCausalLM` with memories and its published defaults."""

    config_class = ExtendedMptConfig

    @classmethod
    def memory_defaults(cls, config: PreTrainedConfig) -> dict[str, Any]:
        """Return the published defaults of MPT: masked by similarity, no special ids removed."""
        return {
            "mask_by_sim": True,
            "remove_special_ids": False,
            "tokenizer_all_special_ids": [0, 50278],
        }


_WHERE = (  # options that say where a checkpoint is, and how to get it
    "cache_dir",
    "force_download",
    "gguf_file",
    "local_files_only",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)


class ExtendedMindForCausalLM:
    """Any supported causal language model with memories; the published method's defaults.

    `from_pretrained` returns the stock class's model with the interface of `ExtendedMind`. A folder
    that such a model's `save_pretrained` writes is a stock checkpoint, too.
    """

    def __init__(self) -> None:
        raise TypeError("ExtendedMindForCausalLM is made by its from_pretrained().")

    @classmethod
    def from_pretrained(cls, source: str, *args: Any, **options: Any) -> Any:
        """Load any causal language model that transformers knows, with memories.

        Args:
            source: a folder or a hub name.
            *args: as in `AutoModelForCausalLM.from_pretrained`, like `options`.
            **options: also `external_memories` and memory settings; see `ExtendedMind`.

        Raises:
            ConfigError: a memory setting that is unknown or of a wrong value.
        """
        where = {name: options[name] for name in _WHERE if name in options}
        config = options.pop("config", None) or AutoConfig.from_pretrained(source, **where)
        with torch.device("meta"):  # which class it is: no weights, no memory
            stock = type(cast(Any, AutoModelForCausalLM).from_config(config))
        if not isinstance(config, stock.config_class):
            config = config.get_text_config()
        return extended(cast(Any, stock)).from_pretrained(source, *args, config=config, **options)


@functools.cache
def extended(stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Return a stock model class's subclass with memories.

    It has the stock name, which `save_pretrained` writes and `pipeline` looks for.
    """
    if issubclass(stock, ExtendedMind):
        return stock
    parts = {
        "__doc__": f"`{stock.__name__}` with memories; see `ExtendedMind`.",
        "__reduce__": lambda self: (_new, (stock,), self.__getstate__()),
    }
    return type(stock.__name__, (ExtendedMind, stock), parts)


def _new(stock: type[PreTrainedModel]) -> PreTrainedModel:
    """Make an empty model for pickle, which does not find a class that is made on demand."""
    kind = extended(cast(Any, stock))
    return kind.__new__(kind)


# Let transformers find these classes by their `model_type`, instead of remote code.
for _model in (ExtendedLlamaForCausalLM, ExtendedMptForCausalLM):
    AutoConfig.register(_model.config_class.model_type, _model.config_class, exist_ok=True)
    AutoModelForCausalLM.register(_model.config_class, _model, exist_ok=True)
