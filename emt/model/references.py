"""Weak references to a model: a memory does not keep its model alive."""

from __future__ import annotations

from typing import TypeVar
from weakref import ReferenceType

from torch import nn

from emt.errors import MemoryUseError

_Module = TypeVar("_Module", bound=nn.Module)


def alive(reference: ReferenceType[_Module], action: str) -> _Module:
    """Return the module that a weak reference stands for; `action` names its use in the error.

    Raises:
        MemoryUseError: nobody keeps the model any more.
    """
    module = reference()
    if module is None:
        raise MemoryUseError(f"cannot {action}: the model is gone. Keep a reference to it.")
    return module
