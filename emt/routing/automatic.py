"""Passage mode: a prompt's passages are found and recalled by the forward that reads it.

A hook before the decoder sees each new prompt (a forward whose cache is empty), asks the router for
the passages it is about, and puts their rows in front of the question. The cache remembers what it
was computed with, so the steps of `generate` that follow, beams and copies of the cache included,
attend to the same rows; nothing else of `generate` changes. A prompt that nothing in the memory is
relevant for is the plain model's, bit for bit.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from emt.errors import MemoryUseError
from emt.hook import is_watching
from emt.recall import Recall, angles_of, end_of_forward, forget_recall, recall_of
from emt.recall_positions import Angles
from emt.recall_rows import Passage, places, repeats
from emt.recall_tokens import NewTokens
from emt.routing.prompt import same_runs, unpadded
from emt.routing.router import Routed, Router

if TYPE_CHECKING:
    from emt.memory import AttachedModel, Memory
    from emt.routing.profile import HeadProfile

_LEAST_ROWS = 16  # fewer are not worth a passage


class PassageMode:
    """Finds and recalls passages for the prompts of one memory's model.

    Args:
        memory: whose model.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._hooks: list[Any] = []
        self._router: Router | None = None
        self._angles: Angles | None = None
        self._signature: inspect.Signature | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> PassageMode:
        """Return itself: a copy of the decoder has its hooks, but is not attached."""
        return self

    def switch(self, on: bool, model: AttachedModel | None) -> None:
        """Watch a model's forwards from now on, or no longer."""
        decoder = None if model is None else model.decoder()
        if not on or decoder is None:
            for hook in self._hooks:
                hook.remove()
            self._hooks = []
        elif not self._hooks:
            self._signature = inspect.signature(decoder.forward)
            self._hooks = [
                decoder.register_forward_pre_hook(self._before, with_kwargs=True),
                decoder.register_forward_hook(self._after, with_kwargs=True, always_call=True),
            ]

    def router(self, model: AttachedModel, profile: HeadProfile) -> Router:
        """Return the router of a model with a profile."""
        decoder = model.decoder()
        if decoder is None:
            raise MemoryUseError("cannot route: the model is gone. Keep a reference to it.")
        self._angles = self._angles or angles_of(model)
        if self._router is None or self._router.profile is not profile:
            self._router = Router(
                decoder, profile, model.unrotations, self._angles, self._memory.tokenizer
            )
        return self._router

    def route(self, prompts: Sequence[Tensor]) -> list[Routed]:
        """Find the passages of prompts, each (T,) int64 without padding.

        Raises:
            MemoryUseError: the model is gone, or passages are given for other numbers of prompts.
        """
        memory = self._memory
        model, profile = memory.attached_model("route"), memory.head_profile
        router, config = self.router(model, profile), memory.in_force
        assert self._angles is not None
        longest, found = self._angles.longest, []
        for number, prompt in enumerate(prompts):
            room = config.recall_rows
            if longest is not None:  # leave as much for the answer
                room = min(room, (longest - len(prompt)) // 2)
            found.append(
                router.route(
                    prompt.cpu(),
                    memory.backend,
                    num_rows=max(room, 0) if room >= _LEAST_ROWS else 0,
                    num_passages=config.recall_passages,
                    routing=config.routing,
                    **memory.search_options(number, len(prompts)),
                )
            )
        return found

    def _before(self, module: nn.Module, args: tuple[Any, ...], *keywords: Any) -> Any:
        memory = self._memory
        if not keywords or is_watching() or not memory.recalls_itself(module):
            return None
        assert self._signature is not None
        new = NewTokens.of(self._signature, args, keywords[0])
        if new.num_tokens > new.num_new:
            recall = recall_of(new.cache)
        else:
            given = self._signature.bind_partial(*args, **keywords[0]).arguments
            recall = self._recall_for(new, given)
            forget_recall(new.cache)  # what a cache of fixed size held before
        return None if recall is None else recall.begin(module, args, keywords[0])

    def _after(self, module: nn.Module, args: tuple[Any, ...], *keywords_and_output: Any) -> None:
        if not is_watching() and self._memory.recalls_itself(module):
            end_of_forward(keywords_and_output[-1])

    def _recall_for(self, new: NewTokens, given: Mapping[str, Any]) -> Recall | None:
        """Find what the prompts of a forward are about, and read it."""
        token_ids = given.get("input_ids")
        if not isinstance(token_ids, Tensor):
            raise MemoryUseError(
                "passages are found by a prompt's tokens; got inputs_embeds. Pass input_ids, or "
                'use memory.using(mode="token").'
            )
        memory = self._memory
        prompts = unpadded(token_ids, new)
        times = same_runs(prompts)
        asked = memory.num_scopes
        if asked > 1:
            times = min(times, repeats(len(prompts), asked))
        prompts = prompts[::times]
        routed = self.route(prompts)
        for recording in memory.recordings:
            recording.route(routed)
        if not any(one.passages for one in routed):
            return None
        chosen = [in_order(one) for one in routed]
        found = places(memory.backend, chosen, [one.question.at for one in routed], None)
        assert self._angles is not None
        model = memory.attached_model("recall")
        return Recall.of(model, memory.backend, found, self._angles, retrieves=False)


def in_order(routed: Routed) -> list[Passage]:
    """Return passages as they are put into a prompt: the best last, next to the question."""
    return [one.passage for one in reversed(routed.passages)]


def prompts_of(model: Any, token_ids: Tensor) -> list[Tensor]:
    """Return (T,) or (B, T) token ids as prompts."""
    del model
    return [token_ids] if token_ids.ndim == 1 else list(torch.atleast_2d(token_ids))
