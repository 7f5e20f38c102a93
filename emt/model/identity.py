"""The identity of a model: shapes, RoPE, and a hash and a sketch of its weights.

A store keeps that of the model that wrote it; `memory_backends/store/identity.py` compares the two.
The hash tells weights apart that are in one dtype; the sketch is for the same ones in another.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from emt.model.devices import weights
from memory_backends import MemoryLayout
from memory_backends.store.sketch import Sketch

_SAMPLED_VALUES = 32


def identity_of(
    model: nn.Module,
    decoder: PreTrainedModel,
    layout: MemoryLayout,
    tokenizer: PreTrainedTokenizerBase | None,
) -> dict[str, Any]:
    """Describe a model as plain JSON types; two models with equal descriptions share memories.

    A store does not compare fields that are left out, as the tokenizer's is without one.
    """
    config, layers = decoder.config, layout.layers.values()
    fingerprint = weights_fingerprint(model)
    identity: dict[str, Any] = {
        "model_type": _model_type(decoder),
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": _common([layer.num_key_value_heads for layer in layers]),
        "head_dim": _common([layer.head_dim for layer in layers]),
        "dtype": str(layout.dtype).removeprefix("torch."),
        "rope": getattr(config, "rope_parameters", None),
        "weights": fingerprint,
        "sketch": None if fingerprint is None else sketch_of(model, decoder).to_json(),
    }
    if tokenizer is not None:
        vocabulary = json.dumps(tokenizer.get_vocab(), sort_keys=True)
        identity["tokenizer"] = hashlib.sha256(vocabulary.encode()).hexdigest()[:16]
    return {key: value for key, value in identity.items() if value is not None}


def _common(numbers: list[int]) -> int | list[int]:
    """Return the number that all layers share, or else each layer's."""
    return numbers[0] if len(set(numbers)) == 1 else numbers


def weights_fingerprint(model: nn.Module) -> str | None:
    """Hash some values of every weight, which any fine-tune changes.

    Of PEFT's adapters only those count that are in use and not merged into the model's own weights.

    Returns:
        16 hex digits; None if the values of a weight are nowhere.
    """
    samples: dict[str, bytes] = {}
    for name, tensor in _weights_in_use(model):
        if tensor is None:
            return None
        flat = tensor.detach().flatten()
        sample = flat[:: max(flat.numel() // _SAMPLED_VALUES, 1)][:_SAMPLED_VALUES]
        samples[name] = sample.to("cpu", torch.float32).numpy().tobytes()
    return hashlib.sha256(b"".join(samples[name] for name in sorted(samples))).hexdigest()[:16]


def sketch_of(model: nn.Module, decoder: PreTrainedModel) -> Sketch:
    """Take a sketch of a model's weights, those in use as for `weights_fingerprint`.

    Weights go by their names in the decoder, which are the same in a model of text and images.
    Those whose values are nowhere are left out.
    """
    path = next((name for name, module in model.named_modules() if module is decoder), "")
    prefix = f"{path}." if path else ""
    named = (
        (_plain_name(name.removeprefix(prefix)), tensor)
        for name, tensor in _weights_in_use(model)
        if tensor is not None
    )
    return Sketch.of(_model_type(decoder), decoder.config.num_hidden_layers, named)


def _model_type(decoder: PreTrainedModel) -> str:
    """Return the architecture; the published classes have the weights and rows of stock ones."""
    return str(decoder.config.model_type).removeprefix("extended-")


def _plain_name(name: str) -> str:
    """Return a weight's name without the wrappers of PEFT and of torch.compile."""
    return name.replace(".base_layer.", ".").replace("_orig_mod.", "")


def _weights_in_use(model: nn.Module) -> Iterator[tuple[str, Tensor | None]]:
    """Yield the weights by name, without idle adapters; None if the values are nowhere."""
    idle = set(_idle_adapter_weights(model))
    for name, tensor in weights(model):
        if name not in idle:
            yield name, tensor


def _idle_adapter_weights(model: nn.Module) -> Iterator[str]:
    """Yield the names of parameters of adapters that a model holds and does not use now."""
    for prefix, module in model.named_modules():
        if not hasattr(module, "adapter_layer_names") or not hasattr(module, "merged_adapters"):
            continue
        used = set(module.active_adapters) - set(module.merged_adapters)
        if module.disable_adapters:
            used = set()
        for part in module.adapter_layer_names:
            for name, _ in getattr(module, part).named_parameters():
                if name.partition(".")[0] not in used:
                    yield f"{prefix}.{part}.{name}"
