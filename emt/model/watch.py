"""Watch the attention calls of one forward, which computes as if the model had no memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from emt.model.attention_call import AttentionCall, AttentionFunction
from emt.model.forward import signature_of


@dataclass
class Watched:
    """What `watching` saw of one forward: attention calls, and what RoPE each module was given."""

    compute: AttentionFunction = AttentionCall.compute
    calls: list[AttentionCall] = field(default_factory=list)
    position_embeddings: dict[nn.Module, Any] = field(default_factory=dict)


_watched: ContextVar[Watched | None] = ContextVar("emt_watched", default=None)


def watcher() -> Watched | None:
    """Return what this thread collects its attention calls in; None unless it is `watching`."""
    return _watched.get()


@contextlib.contextmanager
def watching(
    model: nn.Module, compute: AttentionFunction = AttentionCall.compute
) -> Iterator[Watched]:
    """Collect the attention calls this thread makes; the model computes as if not attached.

    `compute` takes a call and stands in for its attention.
    """
    seen = Watched(compute)
    hooks = [
        module.register_forward_pre_hook(_keep_embeddings(seen), with_kwargs=True)
        for module in model.modules()
        if "position_embeddings" in signature_of(module).parameters
    ]
    token = _watched.set(seen)
    try:
        yield seen
    finally:
        _watched.reset(token)
        for hook in hooks:
            hook.remove()


def _keep_embeddings(seen: Watched) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _watched.get() is not seen:  # another thread runs the same model
            return
        given = signature_of(module).bind_partial(*args, **kwargs).arguments
        seen.position_embeddings[module] = given.get("position_embeddings")

    return hook
