"""What one call of a model asks of its memory; no other thread's calls see it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass

from emt.citations.recording import Recording
from emt.config import MemoryConfig


@dataclass(frozen=True)
class Asked:
    """What holds for one memory in this thread.

    Attributes:
        config: instead of the memory's own; None if that holds.
        recordings: beside the memory's own.
    """

    config: MemoryConfig | None = None
    recordings: tuple[Recording, ...] = ()


_NOTHING = Asked()
_asked: ContextVar[Mapping[object, Asked]] = ContextVar("emt_asked", default={})  # noqa: B039


@contextlib.contextmanager
def asking(
    memory: object, config: MemoryConfig | None, recordings: Sequence[Recording] = ()
) -> Iterator[None]:
    """Ask something of a memory in a `with` block.

    Args:
        memory: the memory.
        config: the settings in force, or None for those that are.
        recordings: what is retrieved is added to them.
    """
    before = asked_of(memory)
    asked = Asked(before.config if config is None else config, (*before.recordings, *recordings))
    token = _asked.set({**_asked.get(), memory: asked})
    try:
        yield
    finally:
        _asked.reset(token)


def asked_of(memory: object) -> Asked:
    """Return what is asked of a memory in this thread."""
    return _asked.get().get(memory, _NOTHING)
