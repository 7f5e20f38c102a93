"""One forward of a model with a memory: a `Turn` says what holds for it, a `Mode` uses the memory.

The decoder's hook makes a turn, once for all layers, and the layers read it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from emt.calls import GenerateOptions, Overrides
from emt.citations.generated import ChosenTokens
from emt.citations.recording import Recording
from emt.config import MemoryConfig
from emt.errors import MemoryUseError
from emt.model.attention_call import AttentionCall
from emt.model.forward import Forward
from emt.passage import Retrieved
from memory_backends import MemoryBackend, Scope

Scopes = Scope | tuple[Scope, ...] | None


class Attended(NamedTuple):
    """What a layer's attention gives.

    Attributes:
        output: (B, Q, H, Dv), as transformers wants it.
        retrieved: what the queries retrieved or recalled, of all of them or of the last ones; None
            if there is nothing to record.
        weights: (B, H, Q, columns), memories first, then recalled rows, then local keys; None if
            they were not asked for.
    """

    output: Tensor
    retrieved: Retrieved | None
    weights: Tensor | None


@dataclass(eq=False)
class Turn:
    """What holds for one forward of one model.

    Attributes:
        memory: whose forward it is, to tell turns of several models apart.
        config: the settings in force.
        backend: where the rows are.
        scopes: the rows that may be read, for all prompts alike or for each; None for all rows.
        layers: those that retrieve single memories.
        recordings: what the queries attend to is added to them.
        chosen: the tokens that the forward's last queries choose.
        overrides: what this thread asks for besides.
        mode: how the memory is used; None for the plain model.
        state: what a mode keeps between the layers of this forward, by mode.
    """

    memory: object
    config: MemoryConfig
    backend: MemoryBackend
    scopes: Scopes
    layers: frozenset[int]
    recordings: Sequence[Recording]
    overrides: Overrides
    mode: Mode | None = None
    chosen: ChosenTokens = field(default_factory=ChosenTokens)
    state: dict[Mode, Any] = field(default_factory=dict)

    @cached_property
    def num_searchable(self) -> list[int]:
        """How many rows a query may find, in each of the scopes."""
        scopes = self.scopes if isinstance(self.scopes, tuple) else (self.scopes,)
        return [self.backend.num_searchable(scope) for scope in scopes]

    def scope_of(self, prompt: int, num_prompts: int) -> Scope | None:
        """Return the rows that one of several prompts may find; None for all.

        Raises:
            MemoryUseError: documents were given for another number of prompts.
        """
        if not isinstance(self.scopes, tuple):
            return self.scopes
        if num_prompts % len(self.scopes):
            raise MemoryUseError(
                f"documents were given for {len(self.scopes)} prompts; got {num_prompts}. Give a "
                "list for each prompt of the batch, or one for all of them."
            )
        return self.scopes[prompt // (num_prompts // len(self.scopes))]

    def needs_weights(self, call: AttentionCall) -> bool:
        """Tell whether the caller of the model wants a layer's attention weights."""
        return bool(call.options.get("output_attentions")) or self.overrides.needs_weights

    @property
    def is_recorded(self) -> bool:
        """Whether somebody records one of the forward's queries."""
        return any(
            recording.whole_prompt or self.chosen.num_tokens for recording in self.recordings
        )

    def first_recorded(self, num_queries: int) -> int:
        """Return the first of a layer's queries that somebody records."""
        whole = any(recording.whole_prompt for recording in self.recordings)
        return 0 if whole else num_queries - self.chosen.num_tokens

    def begin(self, forward: Forward) -> Forward:
        """Begin the forward; return the call that is made instead."""
        generation = self.overrides.generation
        if generation is not None:
            generation.last_turn = self
            if not generation.begin(forward):
                self.recordings = ()  # nobody asks what it attends to
            elif self.recordings:
                self.chosen = generation.chosen_tokens(forward)
        return forward if self.mode is None else self.mode.begin(self, forward)

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        """Compute a layer's attention, and record it: output (B, Q, H, Dv), and weights or None."""
        if self.mode is None:
            return call.compute()
        attended = self.mode.attend(self, call)
        if attended.retrieved is not None:
            for recording in self.recordings:
                recording.add(attended.retrieved, self.chosen)
        return attended.output, attended.weights

    def end(self, output: Any) -> None:
        """End the forward with what the decoder returned; None if it failed."""
        if self.mode is not None:
            self.mode.end(self, output)


class Mode(Protocol):
    """A way to use a memory. One object serves all forwards; `Turn.state` has what is of one."""

    @property
    def retrieves(self) -> bool:
        """Whether queries retrieve single memories: an uncertain step can be redone with more."""

    def check(self, turn: Turn, options: GenerateOptions) -> None:
        """Refuse a `generate()` call with options that this mode cannot serve.

        Raises:
            ConfigError: naming the option.
        """

    def begin(self, turn: Turn, forward: Forward) -> Forward:
        """Prepare a forward of the decoder; return the call to make instead."""

    def attend(self, turn: Turn, call: AttentionCall) -> Attended:
        """Compute one layer's attention."""

    def end(self, turn: Turn, output: Any) -> None:
        """Take notice of what the decoder returned; None if it failed."""

    def heads_to_index(
        self, config: MemoryConfig, backend: MemoryBackend
    ) -> Mapping[int, Sequence[int]] | None:
        """Return the KV heads that are searched, by layer; None for all of the reading layers."""


_turn: ContextVar[Turn | None] = ContextVar("emt_turn", default=None)


def begun_turn(memory: object) -> Turn | None:
    """Return the turn of the forward of a memory's model that this thread runs, if any."""
    turn = _turn.get()
    return turn if turn is not None and turn.memory is memory else None


def set_turn(turn: Turn | None) -> None:
    """Let this thread's layers follow a turn."""
    _turn.set(turn)


@contextlib.contextmanager
def keeping_turn() -> Iterator[None]:
    """Let this thread follow the same turn after a `with` block as before it.

    Torch ends no forward that a KeyboardInterrupt breaks off: its turn would stay, with the memory.
    """
    token = _turn.set(_turn.get())
    try:
        yield
    finally:
        _turn.reset(token)
