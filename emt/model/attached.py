"""What a memory knows of its model, and which layers of it read memories."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import ReferenceType

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from emt.config import MemoryConfig
from emt.errors import ConfigError, MemoryUseError
from emt.model.rope import Unrotation
from memory_backends import MemoryLayout

_Module = TypeVar("_Module", bound=nn.Module)


@dataclass(frozen=True)
class AttachedModel:
    """What a memory knows of its model, found by the dry run of `attach`.

    Attributes:
        model: the causal language model.
        decoder: the same without its language-model head.
        config: the decoder's config.
        layout: the shape of its keys and values.
        unrotations: layer -> how to bring its keys to position 0; None where they are not rotated.
        query_heads: layer -> how many it has.
        full_attention_layers: layers that see the whole context.
        identity: what a store compares.
    """

    model: ReferenceType[PreTrainedModel]
    decoder: ReferenceType[PreTrainedModel]
    config: PreTrainedConfig
    layout: MemoryLayout
    unrotations: Mapping[int, Unrotation | None]
    query_heads: Mapping[int, int]
    full_attention_layers: tuple[int, ...]
    identity: Mapping[str, Any]


def reading_layers(model: AttachedModel, config: MemoryConfig) -> frozenset[int]:
    """Return the layers that read memories.

    Raises:
        ConfigError: `config.layers` names one that is not there, or there are none.
    """
    known = sorted(model.layout.layers)
    if config.layers is None:
        if not model.full_attention_layers:
            raise ConfigError(
                f"all layers of this {model.config.model_type} have a sliding window, and those "
                f"read memories only if asked to. Set layers to some of 0 to {known[-1]}."
            )
        return frozenset(model.full_attention_layers)
    wrong = [idx for idx in config.layers if idx not in known]
    if wrong:
        raise ConfigError(
            f"layers must be layers with attention, 0 to {known[-1]}; got {wrong[0]}."
        )
    return frozenset(config.layers)


def living(module: ReferenceType[_Module], what: str) -> _Module:
    """Return a model, or a part of one, that its memory does not keep alive.

    Args:
        module: it.
        what: is wanted of it, for the error.

    Raises:
        MemoryUseError: it is gone.
    """
    found = module()
    if found is None:
        raise MemoryUseError(f"cannot {what}: the model is gone. Keep a reference to it.")
    return found
