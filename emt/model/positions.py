"""The cosines and sines of a model at any positions, from the modules that make its own.

Rows that are recalled stand at positions of no token in the prompt. The module that makes a layer's
cosines is found by running one token: it returned the very tensors that the layer got. It is then
called for other positions. Where there is none (tables inside of attention modules), placeholder
tokens are run at these positions, which costs a prefill.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from emt.model.attention_call import AttentionCall
from emt.model.devices import input_device
from emt.model.forward import signature_of
from emt.model.references import alive
from emt.model.rope import PositionEmbeddings, as_cos_sin
from emt.model.watch import Watched, watching

_CHANGING = ("dynamic", "longrope")  # other frequencies for all positions once a prompt is long


def max_positions(config: object) -> int | None:
    """Return how many positions a model has, or None if its config does not say."""
    for name in ("max_position_embeddings", "max_seq_len"):  # MPT has the second
        positions = getattr(config, name, None)
        if isinstance(positions, int):
            return positions
    return None


class Angles:
    """Cosines and sines of one model's layers; the model is not kept alive.

    Attributes:
        longest: positions below this exist and are always rotated in the same way; None if there
            is no such limit.
    """

    def __init__(self, decoder: PreTrainedModel, layers: Collection[int]) -> None:
        """Run one token of a decoder, to see which modules make the cosines of rotating layers."""
        self._decoder = ref(decoder)
        self._layers = frozenset(layers)
        self._rotary_modules = _rotary_modules(decoder, layers) if layers else {}
        modules = [alive(rotary.module, "recall") for rotary in self._rotary_modules.values()]
        limits = [max_positions(decoder.config), *map(_first_changed_position, modules)]
        self.longest = min((limit for limit in limits if limit is not None), default=None)

    @torch.no_grad()
    def at(self, positions: Tensor) -> dict[int, PositionEmbeddings]:
        """Return each layer's cos and sin, (n, R, rotary dims), of positions (n, R) int64.

        Raises:
            MemoryUseError: the model is gone.
        """
        if not self._layers <= set(self._rotary_modules):
            seen = _run(alive(self._decoder, "recall"), positions)
            return {
                call.layer_idx: as_cos_sin(seen.position_embeddings[call.module])
                for call in seen.calls
                if call.layer_idx in self._layers
            }
        # Layers of one kind share a module: call it once.
        shared = {id(rotary): rotary for rotary in self._rotary_modules.values()}
        embeddings = {key: rotary.at(positions) for key, rotary in shared.items()}
        return {idx: embeddings[id(rotary)] for idx, rotary in self._rotary_modules.items()}


@dataclass(frozen=True)
class _RotaryModule:
    """A module that turns positions into cosines and sines, and how a forward called it."""

    module: ReferenceType[nn.Module]
    call: inspect.BoundArguments

    def at(self, positions: Tensor) -> PositionEmbeddings:
        """Return cos and sin, (n, R, rotary dims), of positions (n, R) int64."""
        arguments = self.call.arguments
        position_ids = positions.to(arguments["position_ids"].device)
        call = inspect.BoundArguments(
            self.call.signature, OrderedDict({**arguments, "position_ids": position_ids})
        )
        module = alive(self.module, "recall")
        return as_cos_sin(module(*call.args, **call.kwargs))


def _rotary_modules(decoder: PreTrainedModel, layers: Collection[int]) -> dict[int, _RotaryModule]:
    """Run one token; return the modules whose output the layers were given."""
    returned: list[tuple[Any, _RotaryModule]] = []

    def keep_output(signature: inspect.Signature) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            call = signature.bind_partial(*args, **kwargs)
            if isinstance(call.arguments.get("position_ids"), Tensor):
                returned.append((output, _RotaryModule(ref(module), call)))

        return hook

    hooks = []
    for module in decoder.modules():
        signature = signature_of(module)
        if "position_ids" in signature.parameters and not list(module.children()):
            hooks.append(module.register_forward_hook(keep_output(signature), with_kwargs=True))
    try:
        seen = _run(decoder, torch.zeros(1, 1, dtype=torch.long))
    finally:
        for hook in hooks:
            hook.remove()
    return {
        call.layer_idx: rotary
        for call in seen.calls
        for output, rotary in returned
        if call.layer_idx in layers and _is_same(output, seen.position_embeddings.get(call.module))
    }


@torch.no_grad()
def _run(decoder: PreTrainedModel, positions: Tensor) -> Watched:
    """Run placeholder tokens, each alone, at positions (n, R)."""
    flat = positions.reshape(-1, 1).to(input_device(decoder))
    with watching(decoder, _attend_to_nothing) as seen:
        decoder(input_ids=torch.zeros_like(flat), position_ids=flat, use_cache=False)
    for module, embeddings in seen.position_embeddings.items():
        if positions.numel() > 1 and embeddings is not None:
            seen.position_embeddings[module] = tuple(
                part.reshape(*positions.shape, part.shape[-1]) for part in as_cos_sin(embeddings)
            )
    return seen


def _attend_to_nothing(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    batch, num_heads, num_queries, _ = call.query.shape
    return call.value.new_zeros(batch, num_queries, num_heads, call.value.shape[-1]), None


def _is_same(output: Any, embeddings: Any) -> bool:
    """Tell whether a module's output is the very tensors that a layer was given."""
    try:
        pairs = zip(as_cos_sin(output), as_cos_sin(embeddings), strict=True)
    except TypeError:
        return False
    return all(made.data_ptr() == given.data_ptr() for made, given in pairs)


def _first_changed_position(module: nn.Module) -> int | None:
    """Return the prompt length beyond which a module rotates all positions in another way."""
    kinds = getattr(module, "rope_type", None)
    by_layer_type = kinds if isinstance(kinds, dict) else {None: kinds}
    limits: list[int] = []
    for layer_type, kind in by_layer_type.items():
        if isinstance(kind, str) and any(name in kind for name in _CHANGING):
            parameters = getattr(getattr(module, "config", None), "rope_parameters", None) or {}
            if layer_type is not None:
                parameters = parameters.get(layer_type, {})
            limit = parameters.get("original_max_position_embeddings")
            limits.append(getattr(module, "original_max_seq_len", 0) if limit is None else limit)
    return min(limits) if limits else None
