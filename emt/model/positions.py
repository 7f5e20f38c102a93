"""The cosines and sines a model has for any positions, from the modules that make its own.

Rows that are recalled stand where no token of the prompt does, so their cosines and sines are not
among those a forward hands to its layers. Which module made a layer's is not configured but seen:
one token is run, and a layer's cosines are those that some module with `position_ids` returned.
That module is asked again, for the positions wanted. Where they come from elsewhere (tables inside
of attention modules), tokens that mean nothing are run at these positions, which costs a prefill.
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

from emt.model.devices import living
from emt.model.devices import input_device
from emt.model.hook import AttentionCall, Watched, watching
from emt.model.rope import PositionEmbeddings, as_cos_sin

_CHANGING = ("dynamic", "longrope")  # other frequencies for all positions once a prompt is long


def max_positions(config: object) -> int | None:
    """Return how many positions a model has, or None if it does not say."""
    for name in ("max_position_embeddings", "max_seq_len"):  # MPT has the second
        found = getattr(config, name, None)
        if isinstance(found, int):
            return found
    return None


@dataclass(frozen=True)
class _Source:
    """A module that turns positions into cosines and sines, and how a forward calls it."""

    module: ReferenceType[nn.Module]
    given: inspect.BoundArguments

    def at(self, positions: Tensor) -> PositionEmbeddings:
        given = self.given.arguments
        here = positions.to(given["position_ids"].device)
        called = inspect.BoundArguments(
            self.given.signature,
            OrderedDict({**given, "position_ids": here}),
        )
        module = living(self.module, "recall")
        return as_cos_sin(module(*called.args, **called.kwargs))


class Angles:
    """Cosines and sines of one model's layers; the model is not kept alive.

    Attributes:
        longest: positions below this are always rotated in the same way, and exist; None if there
            is no end to them.
    """

    def __init__(self, decoder: PreTrainedModel, layers: Collection[int]) -> None:
        """Find where the cosines come from.

        Args:
            decoder: the model without its language-model head.
            layers: those that rotate their keys.
        """
        self._decoder = ref(decoder)
        self._sources = _sources(decoder, layers) if layers else {}
        self._layers = frozenset(layers)
        modules = [living(source.module, "recall") for source in self._sources.values()]
        ends = [_end_of(module) for module in modules]
        known = [end for end in (*ends, max_positions(decoder.config)) if end is not None]
        self.longest = min(known) if known else None

    @torch.no_grad()
    def at(self, positions: Tensor) -> dict[int, PositionEmbeddings]:
        """Return each layer's cos and sin, (n, R, rotary dims), of positions (n, R) int64.

        Raises:
            MemoryUseError: the model is gone.
        """
        if not self._layers <= set(self._sources):
            seen = _run(living(self._decoder, "recall"), positions)
            return {
                call.layer_idx: as_cos_sin(seen.position_embeddings[call.module])
                for call in seen.calls
                if call.layer_idx in self._layers
            }
        found: dict[int, PositionEmbeddings] = {}
        made: dict[int, PositionEmbeddings] = {}  # all layers of a kind share one
        for layer_idx, source in self._sources.items():
            if id(source) not in made:
                made[id(source)] = source.at(positions)
            found[layer_idx] = made[id(source)]
        return found


def _sources(decoder: PreTrainedModel, layers: Collection[int]) -> dict[int, _Source]:
    """Run one token; return the modules that made what the layers were given."""
    returned: list[tuple[Any, _Source]] = []

    def keep(signature: inspect.Signature) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given = signature.bind_partial(*args, **kwargs)
            if isinstance(given.arguments.get("position_ids"), Tensor):
                returned.append((output, _Source(ref(module), given)))

        return hook

    hooks = []
    for module in decoder.modules():
        signature = inspect.signature(module.forward)
        if "position_ids" in signature.parameters and not list(module.children()):
            hooks.append(module.register_forward_hook(keep(signature), with_kwargs=True))
    try:
        seen = _run(decoder, torch.zeros(1, 1, dtype=torch.long))
    finally:
        for hook in hooks:
            hook.remove()
    found = {}
    for call in seen.calls:
        given = seen.position_embeddings.get(call.module)
        for output, source in returned:
            if call.layer_idx in layers and _is_same(output, given):
                found[call.layer_idx] = source
    return found


@torch.no_grad()
def _run(decoder: PreTrainedModel, positions: Tensor) -> Watched:
    """Run tokens of no meaning, each alone, at some positions (n, R)."""
    device = input_device(decoder)
    flat = positions.reshape(-1, 1).to(device)
    with watching(decoder, _attend_to_nothing) as seen:
        decoder(input_ids=torch.zeros_like(flat), position_ids=flat, use_cache=False)
    for module, given in seen.position_embeddings.items():
        if positions.numel() > 1 and given is not None:
            seen.position_embeddings[module] = tuple(
                part.reshape(*positions.shape, part.shape[-1]) for part in as_cos_sin(given)
            )
    return seen


def _attend_to_nothing(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    batch, num_heads, num_queries, _ = call.query.shape
    return call.value.new_zeros(batch, num_queries, num_heads, call.value.shape[-1]), None


def _is_same(output: Any, given: Any) -> bool:
    try:
        parts = zip(as_cos_sin(output), as_cos_sin(given), strict=True)
    except TypeError:
        return False
    return all(one.data_ptr() == other.data_ptr() for one, other in parts)


def _end_of(module: nn.Module) -> int | None:
    """Return from which position on a module rotates all positions in another way."""
    kinds = getattr(module, "rope_type", None)
    by_layer_type = kinds if isinstance(kinds, dict) else {None: kinds}
    ends: list[int] = []
    for layer_type, kind in by_layer_type.items():
        if isinstance(kind, str) and any(name in kind for name in _CHANGING):
            parameters = getattr(getattr(module, "config", None), "rope_parameters", None) or {}
            if layer_type is not None:
                parameters = parameters.get(layer_type, {})
            known = parameters.get("original_max_position_embeddings")
            ends.append(getattr(module, "original_max_seq_len", 0) if known is None else known)
    return min(ends) if ends else None
