"""Adapters in a model and out again.

An adapter is a function that does what one attention class's `forward` does, except that it sends
queries, keys and values through `dispatch` (`hook.py`) instead of attending itself. It takes the place
of `forward` on each attention module of a model, and only for modules that are bound to a memory or
being watched: all others run the class's own.
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
    """Put adapters on all attention modules of a model that have one.

    Returns:
        What `remove` needs; empty for families that need no adapter.

    Raises:
        UnsupportedModelError: such a module's forward was replaced by somebody else.
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
    """Undo `install`, also where hooks were added or removed since."""
    for each in adapted:
        own = vars(each.module)
        slot = next((slot for slot in ("forward", "_old_forward") if _is_ours(own.get(slot))), None)
        if slot == "forward" and not each.had_forward:
            del own[slot]
        elif slot is not None:
            own[slot] = types.MethodType(type(each.module).forward, each.module)


def _adapted_forward(module: Any, *args: Any, **kwargs: Any) -> Any:
    """Run a module's adapter if anybody listens, else the class's own forward.

    A bound method in the module's `__dict__`: a deep copy binds it to the copy, which is not bound
    to a memory.
    """
    adapter = _adapter_of(type(module)) if is_heard(module) else None
    return (type(module).forward if adapter is None else adapter)(module, *args, **kwargs)


# Pickled by name, an attached model comes back as a plain one.
_adapted_forward.__name__ = "forward"
_forward = cast(Callable[..., Any], torch.compiler.disable)(_adapted_forward)


def _adapter_of(kind: type[nn.Module]) -> Callable[..., Any] | None:
    """Return the adapter of a class, if it is the very class that the adapter was written for."""
    adapter = _ADAPTERS.get(f"{kind.__module__}.{kind.__qualname__}")
    return adapter if adapter and _parameters(adapter) == _parameters(kind.forward) else None


@functools.cache  # asked at every forward
def _parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)


def _slot(module: nn.Module) -> str:
    """Return where the forward is that hooks of accelerate call."""
    return "_old_forward" if "_old_forward" in vars(module) else "forward"


def _is_ours(forward: object) -> bool:
    return getattr(forward, "__func__", None) is _forward


def _check_forward(module: nn.Module) -> None:
    found = vars(module).get(_slot(module))
    kind = type(module)
    if found is None or _is_ours(found) or getattr(found, "__func__", None) is kind.forward:
        return
    raise UnsupportedModelError(
        f"expected {kind.__name__}.forward as transformers defines it; an instance has {found!r}, "
        "which this family's adapter would bypass. Attach before it is replaced, or undo that."
    )
