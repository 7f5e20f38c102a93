"""Where a model's weights are when accelerate has placed them: its devices, RAM, or a disk.

A weight that is offloaded is an empty tensor on the "meta" device; a hook of its module brings the
values for the time of a forward, and runs the forward on the hook's own device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar, cast
from weakref import ReferenceType

import torch
from torch import Tensor, nn
from accelerate.hooks import AlignDevicesHook, SequentialHook
from transformers import PreTrainedModel

from emt.errors import MemoryUseError

_Module = TypeVar("_Module", bound=nn.Module)


def input_device(model: PreTrainedModel) -> torch.device:
    """Return the device that a model, or its decoder, takes its token ids on."""
    embedding = cast(nn.Embedding, model.get_input_embeddings())
    if embedding.weight.device.type != "meta":
        return embedding.weight.device
    name = next(name for name, module in model.named_modules() if module is embedding)
    for hook, _ in _offloading(model, f"{name}.weight"):
        if hook.execution_device is not None:
            return torch.device(hook.execution_device)
    return embedding.weight.device


def weights(model: nn.Module) -> Iterator[tuple[str, Tensor | None]]:
    """Yield every parameter by name, tied ones once; the values of offloaded ones are brought.

    A tensor is None if it is on the "meta" device and nobody has its values.
    """
    parameters = dict(model.named_parameters())
    offloaded = {name for name, tensor in parameters.items() if tensor.device.type == "meta"}
    tied = getattr(model, "all_tied_weights_keys", {})
    for name, tensor in parameters.items():
        source = tied.get(name, name)
        if source != name and offloaded & {source, name}:
            continue  # the same values in a tensor of its own, which only offloading makes
        yield name, _offloaded(model, name) if name in offloaded else tensor


def _offloaded(model: nn.Module, name: str) -> Tensor | None:
    for hook, name_there in _offloading(model, name):
        kept = cast(Mapping[str, Tensor], hook.weights_map or {})
        if name_there in kept:
            return kept[name_there]
    return None


def _offloading(model: nn.Module, name: str) -> Iterator[tuple[AlignDevicesHook, str]]:
    """Yield the hooks that bring a parameter, nearest first, each with its name for it."""
    path = name.split(".")
    for at in range(len(path) - 1, -1, -1):
        module = model.get_submodule(".".join(path[:at]))
        is_own = at == len(path) - 1
        for hook in _hooks(getattr(module, "_hf_hook", None)):
            if hook.offload and (is_own or hook.place_submodules):
                yield hook, ".".join(path[at:])


def _hooks(hook: Any) -> Iterator[AlignDevicesHook]:
    if isinstance(hook, SequentialHook):
        for one in hook.hooks:
            yield from _hooks(one)
    elif isinstance(hook, AlignDevicesHook):
        yield hook


def living(module: ReferenceType[_Module], what: str) -> _Module:
    """Return a model, or a part of one, that its memory does not keep alive.

    Args:
        module: a weak reference to the module.
        what: the action that needs it, named in the error.

    Raises:
        MemoryUseError: the module is gone.
    """
    alive = module()
    if alive is None:
        raise MemoryUseError(f"cannot {what}: the model is gone. Keep a reference to it.")
    return alive
