"""What a dry run found out about a model, and which of its layers read memories."""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import ReferenceType

from transformers import PreTrainedConfig, PreTrainedModel

from emt.config import MemoryConfig
from emt.errors import ConfigError
from emt.model.devices import input_device, no_autocast
from emt.model.positions import Angles
from emt.model.references import alive
from emt.model.rope import Unrotation
from memory_backends import MemoryLayout
from memory_backends.store.identity import sketch_in
from memory_backends.store.sketch import Sketch

_making_angles = threading.Lock()


@dataclass(frozen=True)
class AttachedModel:
    """A model that a memory is attached to, as the dry run of `attach` saw it.

    Attributes:
        model: the causal language model.
        decoder: the same without its language-model head.
        config: the decoder's config.
        layout: the shape and dtype of its keys and values.
        unrotations: layer -> how to bring its keys to position 0; None where they are not rotated.
        query_heads: layer -> its number of query heads.
        full_attention_layers: layers that see the whole context.
        identity: the description that a store compares; see `emt.model.identity`.
    """

    model: ReferenceType[PreTrainedModel]
    decoder: ReferenceType[PreTrainedModel]
    config: PreTrainedConfig
    layout: MemoryLayout
    unrotations: Mapping[int, Unrotation | None]
    query_heads: Mapping[int, int]
    full_attention_layers: tuple[int, ...]
    identity: Mapping[str, Any]

    @property
    def angles(self) -> Angles:
        """The cosines and sines of the layers that rotate keys; made once, by running one token."""
        with _making_angles:
            return self._angles

    @functools.cached_property
    def sketch(self) -> Sketch | None:
        """The sketch of its weights, as its identity has it; None if their values are nowhere."""
        return sketch_in(self.identity)

    @functools.cached_property
    def _angles(self) -> Angles:
        decoder = alive(self.decoder, "recall")
        rotated = [idx for idx, unrotation in self.unrotations.items() if unrotation is not None]
        with no_autocast(input_device(decoder)):
            return Angles(decoder, rotated)


def reading_layers(model: AttachedModel, config: MemoryConfig) -> frozenset[int]:
    """Return the layers that read memories.

    Raises:
        ConfigError: `config.layers` names a layer without attention; or it names none, and all
            layers have a sliding window.
    """
    layers = sorted(model.layout.layers)
    if config.layers is None:
        if not model.full_attention_layers:
            raise ConfigError(
                f"all layers of this {model.config.model_type} have a sliding window, and those "
                f"read memories only if asked to. Set layers to some of 0 to {layers[-1]}."
            )
        return frozenset(model.full_attention_layers)
    wrong = [idx for idx in config.layers if idx not in layers]
    if wrong:
        raise ConfigError(
            f"layers must be layers with attention, 0 to {layers[-1]}; got {wrong[0]}."
        )
    return frozenset(config.layers)
