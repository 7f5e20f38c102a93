"""The devices of a model: where it takes token ids, where its weights are, and autocast there.

A weight that accelerate has offloaded is an empty tensor on the "meta" device. A hook of its module
brings the values for the time of a forward, and runs the forward on the hook's own device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from accelerate.hooks import AlignDevicesHook, SequentialHook
from transformers import PreTrainedModel


def input_device(model: PreTrainedModel) -> torch.device:
    """Return the device that a model, or its decoder, takes its token ids on."""
    embedding = cast(nn.Embedding, model.get_input_embeddings())
    if embedding.weight.device.type != "meta":
        return embedding.weight.device
    name = next(name for name, module in model.named_modules() if module is embedding)
    for hook, _ in _offloading_hooks(model, f"{name}.weight"):
        if hook.execution_device is not None:
            return torch.device(hook.execution_device)
    return embedding.weight.device


@contextlib.contextmanager
def no_autocast(device: torch.device) -> Iterator[None]:
    """Turn `torch.autocast` off on a device, and on the CPU, where memories may be.

    With it on, matrix products of float32 tensors are computed in half precision: a search would
    find other rows, and documents would leave rows of another dtype than the model's.
    """
    with contextlib.ExitStack() as stack:
        for kind in {device.type, "cpu"}:
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def weights(model: nn.Module) -> Iterator[tuple[str, Tensor | None]]:
    """Yield every parameter by name, tied ones once, with the values of offloaded ones.

    A tensor is None if it is on the "meta" device and no hook has its values.
    """
    parameters = dict(model.named_parameters())
    offloaded = {name for name, tensor in parameters.items() if tensor.device.type == "meta"}
    tied = getattr(model, "all_tied_weights_keys", {})
    for name, tensor in parameters.items():
        source = tied.get(name, name)
        if source != name and offloaded & {source, name}:
            continue  # the same values in a tensor of its own, which only offloading makes
        yield name, _offloaded_values(model, name) if name in offloaded else tensor


def _offloaded_values(model: nn.Module, name: str) -> Tensor | None:
    for hook, hook_name in _offloading_hooks(model, name):
        values = cast(Mapping[str, Tensor], hook.weights_map or {})
        if hook_name in values:
            return values[hook_name]
    return None


def _offloading_hooks(model: nn.Module, name: str) -> Iterator[tuple[AlignDevicesHook, str]]:
    """Yield the hooks that bring a parameter, nearest first, each with its name for it."""
    path = name.split(".")
    for depth in range(len(path) - 1, -1, -1):
        module = model.get_submodule(".".join(path[:depth]))
        is_own = depth == len(path) - 1
        for hook in _align_hooks(getattr(module, "_hf_hook", None)):
            if hook.offload and (is_own or hook.place_submodules):
                yield hook, ".".join(path[depth:])


def _align_hooks(hook: Any) -> Iterator[AlignDevicesHook]:
    if isinstance(hook, SequentialHook):
        for part in hook.hooks:
            yield from _align_hooks(part)
    elif isinstance(hook, AlignDevicesHook):
        yield hook
