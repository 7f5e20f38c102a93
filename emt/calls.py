"""What one thread's calls ask of a memory, instead of or beside what holds for everybody.

`generate()` and the published classes override settings and recordings for the time of a call; the
turns that the thread's forwards take meanwhile follow them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from emt.citations.recording import Recording
from emt.config import MemoryConfig


@dataclass
class Generation:
    """One call of `generate()`, while it runs.

    Attributes:
        width: tokens of its prompts, padding counted; None if not known. A forward does not tell:
            without a cache every step has all tokens again, and drafted tokens come with the
            prompt. The first `width` tokens are the prompt.
        num_forwards: how many forwards have begun.
        last_turn: the `Turn` of the latest of them.
        prompts: (B, width), the prompts that passages were looked for; None if none were.
        passages: what was recalled for them; None for nothing.
    """

    width: int | None = None
    num_forwards: int = 0
    last_turn: Any = None
    prompts: Tensor | None = None
    passages: Any = None


@dataclass(frozen=True)
class Overrides:
    """What holds for one memory in this thread, instead of or beside what holds for all.

    Attributes:
        config: the settings; None for the memory's own.
        recordings: beside the memory's own.
        needs_weights: whether attention weights are wanted, also where a family does not tell its
            attention function so.
        generation: the `generate()` call that runs.
    """

    config: MemoryConfig | None = None
    recordings: tuple[Recording, ...] = ()
    needs_weights: bool = False
    generation: Generation | None = None


_NONE = Overrides()
_overrides: ContextVar[Mapping[object, Overrides]] = ContextVar("emt_overrides", default={})  # noqa: B039


def overrides_of(memory: object) -> Overrides:
    """Return what this thread overrides of a memory."""
    return _overrides.get().get(memory, _NONE)


@contextlib.contextmanager
def overriding(
    memory: object,
    *,
    config: MemoryConfig | None = None,
    recordings: Sequence[Recording] = (),
    needs_weights: bool = False,
    generation: Generation | None = None,
) -> Iterator[None]:
    """Let something else hold for a memory in a `with` block, in this thread.

    Args:
        memory: the memory.
        config: settings in place of those that hold; None to leave them.
        recordings: more recordings of this thread's forwards.
        needs_weights: ask for attention weights.
        generation: the `generate()` call that runs; None to leave the one that does.
    """
    before = overrides_of(memory)
    changed = replace(
        before,
        config=config or before.config,
        recordings=(*before.recordings, *recordings),
        needs_weights=needs_weights or before.needs_weights,
        generation=generation or before.generation,
    )
    token = _overrides.set({**_overrides.get(), memory: changed})
    try:
        yield
    finally:
        _overrides.reset(token)


class GenerateOptions:
    """The options of one `generate()` call: its keywords, and else its generation config.

    Args:
        model: the causal language model.
        keywords: of the call.
    """

    def __init__(self, model: nn.Module, keywords: Mapping[str, Any]) -> None:
        self._keywords = keywords
        config = keywords.get("generation_config")
        self._config = config or getattr(model, "generation_config", None)

    @property
    def prompt_width(self) -> int | None:
        """Tokens of the call's prompts, padding counted; None if they are no token ids."""
        prompts = self._keywords.get("inputs")
        prompts = self._keywords.get("input_ids") if prompts is None else prompts
        return prompts.shape[1] if isinstance(prompts, Tensor) and prompts.ndim == 2 else None

    def get(self, name: str) -> Any:
        """Return an option's value; None if nobody sets it."""
        value = self._keywords.get(name)
        return getattr(self._config, name, None) if value is None else value

    def chosen(self, *names: str) -> list[str]:
        """Return which of some options are switched on."""
        return [name for name in names if self.get(name)]
