"""The identity of a model: shapes, RoPE, and a hash of its weights.

A store keeps that of the model that wrote it; `memory_backends/store/identity.py` compares the two.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from emt.model.devices import weights
from memory_backends import MemoryLayout

_SAMPLED_VALUES = 32


def identity_of(
    model: nn.Module,
    config: PreTrainedConfig,
    layout: MemoryLayout,
    tokenizer: PreTrainedTokenizerBase | None,
) -> dict[str, Any]:
    """Describe a model as plain JSON types; two models with equal descriptions share memories.

    `config` is that of its text decoder. A store does not compare fields that are left out, as the
    tokenizer's is without one.
    """
    layers = layout.layers.values()
    identity: dict[str, Any] = {
        "model_type": config.model_type.removeprefix("extended-"),  # the same weights and rows
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": _common([layer.num_key_value_heads for layer in layers]),
        "head_dim": _common([layer.head_dim for layer in layers]),
        "dtype": str(layout.dtype).removeprefix("torch."),
        "rope": getattr(config, "rope_parameters", None),
        "weights": weights_fingerprint(model),
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
    digest = hashlib.sha256()
    idle = set(_idle_adapter_weights(model))
    for name, tensor in sorted(weights(model), key=lambda named: named[0]):
        if name in idle:
            continue
        if tensor is None:
            return None
        flat = tensor.detach().flatten()
        sample = flat[:: max(flat.numel() // _SAMPLED_VALUES, 1)][:_SAMPLED_VALUES]
        digest.update(sample.to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()[:16]


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
