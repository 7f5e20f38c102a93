"""What a memory knows of its model, and which layers of it read memories."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import ReferenceType

from transformers import PreTrainedConfig, PreTrainedModel

from emt.config import MemoryConfig
from emt.errors import ConfigError
from emt.model.devices import input_device, living
from emt.model.positions import Angles
from emt.model.precision import no_autocast
from emt.model.rope import Unrotation
from memory_backends import MemoryLayout


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

    @cached_property
    def angles(self) -> Angles:
        """The model's cosines and sines, found when they are first needed.

        Raises:
            MemoryUseError: the model is gone.
        """
        decoder = living(self.decoder, "recall")
        rotated = [idx for idx, unrotation in self.unrotations.items() if unrotation is not None]
        with no_autocast(input_device(decoder)):
            return Angles(decoder, rotated)


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
