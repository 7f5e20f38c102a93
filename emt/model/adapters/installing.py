"""Put adapters into a model, and take them out.

An adapter computes what one attention class's `forward` does, except that it sends queries, keys
and values through `dispatch` (`emt.model.hook`). It takes the place of `forward` on each attention
module of a model. A module that is neither bound nor watched runs its class's own.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from emt.errors import UnsupportedModelError
from emt.model.adapters import bloom, codegen, falcon, gptj, mpt
from emt.model.hook import is_heard

_ADAPTERS: dict[str, Callable[..., Any]] = {
    adapter.ATTENTION: adapter.forward for adapter in (bloom, codegen, falcon, gptj, mpt)
}


@dataclass(frozen=True)
class Adapted:
    """An attention module with an adapter, and whether it had a `forward` of its own before."""

    module: nn.Module
    had_forward: bool


def install(model: nn.Module) -> list[Adapted]:
    """Put adapters on all attention modules of a model that have one; return them for `remove`.

    Raises:
        UnsupportedModelError: the forward of such a module was replaced by other code.
    """
    modules = [module for module in model.modules() if _adapter_of(type(module)) is not None]
    for module in modules:
        _check_forward(module)
    adapted = []
    for module in modules:
        slot = _slot(module)
        had_forward = slot in vars(module) and not _is_ours(vars(module)[slot])
        vars(module)[slot] = types.MethodType(_forward, module)
        adapted.append(Adapted(module, had_forward))
    return adapted


def remove(adapted: list[Adapted]) -> None:
    """Undo `install`, also where hooks of accelerate were added or removed since."""
    for attention in adapted:
        own = vars(attention.module)
        slot = next((slot for slot in ("forward", "_old_forward") if _is_ours(own.get(slot))), None)
        if slot == "forward" and not attention.had_forward:
            del own[slot]
        elif slot is not None:
            own[slot] = types.MethodType(type(attention.module).forward, attention.module)


def _adapted_forward(module: Any, *args: Any, **kwargs: Any) -> Any:
    """Run a module's adapter if its attention is heard, else the class's own forward.

    It is a bound method in the module's `__dict__`, so that a deep copy, which has no memory, binds
    it to itself.
    """
    adapter = _adapter_of(type(module)) if is_heard(module) else None
    return (type(module).forward if adapter is None else adapter)(module, *args, **kwargs)


# Methods are pickled by name: an attached model is loaded as a plain one.
_adapted_forward.__name__ = "forward"
_forward = cast(Callable[..., Any], torch.compiler.disable)(_adapted_forward)


def _adapter_of(kind: type[nn.Module]) -> Callable[..., Any] | None:
    """Return the adapter of a class; None for other classes, derived and changed ones included."""
    adapter = _ADAPTERS.get(f"{kind.__module__}.{kind.__qualname__}")
    return adapter if adapter and _parameters(adapter) == _parameters(kind.forward) else None


@functools.cache  # asked at every forward
def _parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)


def _slot(module: nn.Module) -> str:
    """Return the attribute with the forward that hooks of accelerate wrap."""
    return "_old_forward" if "_old_forward" in vars(module) else "forward"


def _is_ours(forward: object) -> bool:
    return getattr(forward, "__func__", None) is _forward


def _check_forward(module: nn.Module) -> None:
    forward = vars(module).get(_slot(module))
    kind = type(module)
    if forward is None or _is_ours(forward) or getattr(forward, "__func__", None) is kind.forward:
        return
    raise UnsupportedModelError(
        f"expected {kind.__name__}.forward as transformers defines it; "
        f"an instance has {forward!r}, which this family's adapter would bypass. "
        "Attach before it is replaced, or undo that."
    )
