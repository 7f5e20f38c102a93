"""The dry run of `attach`: prove that every layer is reached and that its keys can be stored.

One token is run at two positions, and every attention call is watched. Which layers are reached,
the shapes of keys and values, and the way to bring keys back to position 0 are all observed, not
configured.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from emt.attention.alibi import HIDDEN
from emt.errors import UnsupportedModelError
from emt.model.attention_call import AttentionCall, check_options
from emt.model.devices import input_device
from emt.model.forward import signature_of
from emt.model.rope import Unrotation, find_unrotation, is_at_zero
from emt.model.watch import watching
from memory_backends import LayerLayout, MemoryLayout

_DRY_RUN_POSITION = 5  # at the fastest frequency 5 radians: a rotation that cannot be missed
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# Layers of any other kind, unknown ones included, must be reached.
_WITHOUT_ATTENTION = {"linear_attention", "mamba", "conv", "recurrent", "moe", "mlp"}


@dataclass(frozen=True)
class ReachedLayer:
    """One layer as the dry run saw it.

    Attributes:
        call: its attention call at position 0.
        unrotation: how to bring its keys to position 0; None if it does not rotate them.
        is_sliding: whether it sees a window of the context only.
    """

    call: AttentionCall
    unrotation: Unrotation | None
    is_sliding: bool


def dry_run(decoder: PreTrainedModel) -> dict[int, ReachedLayer]:
    """Run one token at two positions; return each layer with attention.

    A token that stands alone attends to itself only, so its keys differ between positions by their
    rotation and nothing else. (Learned position embeddings change the values too; such models have
    no rotation.)

    Raises:
        UnsupportedModelError: a layer was not reached, or its keys cannot be brought to position 0.
    """
    at_zero = _attention_calls(decoder, 0)
    expected = _layers_with_attention(decoder.config)
    missing = [idx for idx in expected if idx not in at_zero]
    if missing:
        reached = "none of its" if len(missing) == len(expected) else f"not layers {missing} of its"
        raise UnsupportedModelError(
            f"{decoder.config.model_type}: attention must go through transformers' "
            f"AttentionInterface; a dry run reached {reached} {len(expected)} layers. "
            "This family computes attention inline and needs an adapter."
        )
    has_positions = "position_ids" in signature_of(decoder).parameters
    if not at_zero:
        raise UnsupportedModelError(
            f"{decoder.config.model_type}: none of its layers has softmax attention, so there are "
            "no keys and values to remember."
        )
    _check_two_tokens(decoder, has_positions)
    moved = _attention_calls(decoder, _DRY_RUN_POSITION) if has_positions else at_zero
    return {
        idx: ReachedLayer(
            call, _unrotation_of(call, *moved[idx]), _is_sliding(decoder.config, call)
        )
        for idx, (call, _) in sorted(at_zero.items())
    }


@torch.no_grad()
def _check_two_tokens(decoder: PreTrainedModel, has_positions: bool) -> None:
    """Refuse what only a second token shows: biases in masks, rotation without position_ids."""
    tokens = torch.full((1, 2), decoder.config.vocab_size // 2, device=input_device(decoder))
    with _evaluating(decoder), watching(decoder) as seen:
        decoder(input_ids=tokens, use_cache=False)
    for call in seen.calls:
        _check_mask(call)
    if not has_positions:
        _check_unplaced(seen.calls[0])


def _check_unplaced(call: AttentionCall) -> None:
    """Refuse a first layer that gives the same token twice equal values and different keys."""
    tolerance = _TOLERANCE.get(call.key.dtype, _TOLERANCE[torch.float32])
    (first_key, second_key), (first, second) = (
        part.float().unbind(dim=2) for part in (call.key, call.value)
    )
    is_same_value = (first - second).norm() <= tolerance * first.norm()
    if is_same_value and (first_key - second_key).norm() > tolerance * first_key.norm():
        raise UnsupportedModelError(
            f"{type(call.module).__name__}, layer {call.layer_idx}: its keys depend on the "
            "position, and the model takes no position_ids, so they cannot be brought to position "
            "0. This family needs an adapter."
        )


@torch.no_grad()
def _attention_calls(
    decoder: PreTrainedModel, position: int
) -> dict[int, tuple[AttentionCall, Any]]:
    token = torch.full((1, 1), decoder.config.vocab_size // 2, device=input_device(decoder))
    position_ids = {"position_ids": torch.full_like(token, position)} if position else {}
    with _evaluating(decoder), watching(decoder, _attend_to_itself) as seen:
        decoder(input_ids=token, use_cache=False, **position_ids)
    calls: dict[int, tuple[AttentionCall, Any]] = {}
    for call in seen.calls:
        check_options(call)
        _check_mask(call)
        if getattr(call.module, "is_causal", True) is False:
            raise UnsupportedModelError(
                f"{decoder.config.model_type}: layer {call.layer_idx} must attend causally; "
                "it attends to later tokens too. Only causal language models have memories."
            )
        if call.layer_idx in calls:
            raise UnsupportedModelError(
                f"{decoder.config.model_type}: layer {call.layer_idx} attends twice in one "
                "forward, so its memories cannot be told apart."
            )
        calls[call.layer_idx] = (call, seen.position_embeddings.get(call.module))
    return calls


def _attend_to_itself(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """Return the value of a token that stands alone, without attention sinks.

    The share that a sink takes depends on a logit, which is rounded differently at each position.
    In half precision that is enough to hide a rotation some layers later.
    """
    group = call.query.shape[1] // call.value.shape[1]
    output = call.value.repeat_interleave(group, dim=1)  # (B, H, 1, Dv)
    return output.transpose(1, 2).contiguous(), None


def _check_mask(call: AttentionCall) -> None:
    """Refuse a mask that adds a bias to the logit of a visible key."""
    mask = call.attention_mask
    if mask is None or mask.dtype == torch.bool or not mask[mask > HIDDEN].any():
        return
    raise UnsupportedModelError(
        f"{type(call.module).__name__}, layer {call.layer_idx}: it adds a bias of its own to the "
        "logits of visible keys, and the one that memories should get is not known."
    )


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.train(False)
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _layers_with_attention(config: PreTrainedConfig) -> list[int]:
    """List the layers that the config says have softmax attention."""
    types = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    if types is None:
        return list(range(config.num_hidden_layers))
    return [idx for idx, kind in enumerate(types) if kind not in _WITHOUT_ATTENTION]


def _is_sliding(config: PreTrainedConfig, call: AttentionCall) -> bool:
    types = getattr(config, "layer_types", None)
    if types is not None and call.layer_idx < len(types):
        return any(word in types[call.layer_idx] for word in ("sliding", "chunked", "window"))
    return call.options.get("sliding_window") is not None


def _unrotation_of(
    at_zero: AttentionCall, moved: AttentionCall, embeddings: Any
) -> Unrotation | None:
    tolerance = _TOLERANCE.get(at_zero.key.dtype, _TOLERANCE[torch.float32])
    if is_at_zero(moved.key, at_zero.key, moved.key, tolerance):
        return None  # no rotation in this layer
    value = at_zero.value.float()
    if (moved.value.float() - value).norm() > tolerance * value.norm():
        if embeddings is not None:
            raise UnsupportedModelError(
                f"{type(at_zero.module).__name__}, layer {at_zero.layer_idx}: it rotates its keys, "
                "and its values depend on the position too. Values cannot be brought to position 0."
            )
        return None  # positions were added to the embeddings
    unrotation = find_unrotation(
        at_zero.module, moved.key, at_zero.key, embeddings, tolerance, at_zero.rotate
    )
    if unrotation is None:
        raise UnsupportedModelError(
            f"{type(at_zero.module).__name__}, layer {at_zero.layer_idx}: its keys depend on the "
            "position, and its apply_rotary_pos_emb does not bring them back to position 0. "
            "This family needs an adapter."
        )
    return unrotation


def layout_of(layers: dict[int, ReachedLayer]) -> MemoryLayout:
    """Return the shape and dtype of a model's keys and values.

    Raises:
        UnsupportedModelError: the layers' keys have different dtypes.
    """
    dtypes = {layer.call.key.dtype for layer in layers.values()}
    if len(dtypes) > 1:
        raise UnsupportedModelError(
            f"all layers must have keys of one dtype; got {sorted(map(str, dtypes))}."
        )
    shapes = {idx: (layer.call.key.shape, layer.call.value.shape) for idx, layer in layers.items()}
    return MemoryLayout(
        {
            idx: LayerLayout(num_key_value_heads=key[1], head_dim=key[3], value_head_dim=value[3])
            for idx, (key, value) in shapes.items()
        },
        dtypes.pop(),
    )
