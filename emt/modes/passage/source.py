"""`PassageFinder`: what prompts, added messages and growing answers are about, and its rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from emt.errors import MemoryUseError
from emt.model.attached import living
from emt.model.forward import NewTokens
from emt.modes.passage.exchange import exchanged, with_others
from emt.modes.passage.generate_calls import call_of
from emt.modes.passage.recall import Recall, tokens_of
from emt.modes.passage.rows import RecalledRows, places
from emt.passage import Passage, Recalled, Routed
from emt.profiles.choice import ProfileChoice
from emt.routing.question import has_message, same_runs, unpadded
from emt.routing.relevance_store import RelevanceStore
from emt.routing.router import Router

if TYPE_CHECKING:
    from emt.memory.memory import Memory

_LEAST_ROWS = 16  # fewer are not worth a passage


class PassageFinder:
    """Finds passages for the prompts of one memory's model, and reads their rows.

    Args:
        memory: whose model.
        profiles: which head profile it has.
    """

    def __init__(self, memory: Memory, profiles: ProfileChoice) -> None:
        self._memory = memory
        self._profiles = profiles
        self._router: Router | None = None
        self._relevance = RelevanceStore()

    def route(
        self,
        prompts: Sequence[Tensor],
        *,
        num_generated: int = 0,
        num_before: int = 0,
        num_rows: Sequence[int] | None = None,
    ) -> list[Routed]:
        """Find the passages of prompts, each (T,) int64 without padding.

        Args:
            prompts: the prompts.
            num_generated: how many of the T tokens were generated, in each.
            num_before: how many tokens stand before them.
            num_rows: instead of `recall_rows`, for each prompt; 0 for no passages.

        Raises:
            ConfigError: there is no head profile.
            MemoryUseError: the model is gone, or documents were given for another number of
                prompts.
        """
        memory = self._memory
        router, config, longest = self.router(), memory.in_force, memory.angles.longest
        relevance = None
        # In training mode recall refuses; what is found then must not be kept for later.
        if config.relevance is not None and config.routing != "words" and not router.is_training:
            relevance = self._relevance.of(router, memory.backend)
        found = []
        for number, prompt in enumerate(prompts):
            room = config.recall_rows
            if num_rows is not None:
                room = num_rows[number]
            elif longest is not None:  # leave as much for the answer
                most = (longest - num_before - len(prompt)) // 2
                room = min(room, most) if most >= min(_LEAST_ROWS, room) else 0
            found.append(
                router.route(
                    prompt.cpu(),
                    memory.backend,
                    config,
                    num_rows=room,
                    num_generated=num_generated,
                    relevance=relevance,
                    **memory.search_options(number, len(prompts)),
                )
            )
        return found

    def router(self) -> Router:
        """Return what finds passages with the head profile in force.

        Raises:
            ConfigError: there is no head profile.
            MemoryUseError: the model is gone.
        """
        memory = self._memory
        profile = self._profiles.required(memory.in_force, memory.backend)
        model = memory.attached_model("route")
        living(model.decoder, "route")
        router = self._router
        if router is None or router.profile is not profile:
            router = Router(model, profile, memory.tokenizer, memory.angles)
            self._router = router
        return router

    def forget_model(self) -> None:
        """Let go of a model that was detached, or is gone."""
        self._router = None

    def keep_relevance(self) -> None:
        """Keep in the store what decides whether prompts are about it.

        Raises:
            ConfigError: there is no head profile.
            StoreError: the store cannot be written.
        """
        if self._memory.config.relevance is not None:
            self._relevance.keep(self.router(), self._memory.backend)

    def for_prompts(self, new: NewTokens, given: Mapping[str, Any]) -> Recall | None:
        """Find what the prompts of a forward are about, and read it.

        Args:
            new: the tokens of the forward.
            given: its arguments.

        Returns:
            None if nothing in the memory is relevant.

        Raises:
            MemoryUseError: it was given embeddings instead of tokens.
        """
        token_ids = given.get("input_ids")
        if not isinstance(token_ids, Tensor):
            raise MemoryUseError(
                "passages are found by a prompt's tokens; got inputs_embeds. Pass input_ids, or "
                'use memory.using(mode="token").'
            )
        memory, call = self._memory, call_of(self._memory)
        if call is not None:
            token_ids = token_ids[:, : call.width]
            if call.prompts is not None and torch.equal(call.prompts, token_ids):
                return call.recall
        prompts = unpadded(token_ids, new)
        # Beams and returned sequences are those of one prompt, unless each goes its own way.
        times = 1 if memory.in_force.reroute else same_runs(prompts)
        if isinstance(memory.scope, tuple):
            times = math.gcd(times, len(prompts) // len(memory.scope))
        routed = self.route(prompts[:: max(times, 1)])
        recall = self._recall(routed, [0] * len(routed))
        if recall is not None:
            recall.prompt_end = token_ids.shape[1]
        if call is not None:
            call.prompts, call.recall = token_ids, recall
        return recall

    def _recall(self, routed: Sequence[Routed], num_before: Sequence[int]) -> Recall | None:
        """Read what prompts are about, each of which has so many tokens before it."""
        memory = self._memory
        for recording in memory.recordings:
            recording.route(routed)
        if not any(one.passages for one in routed):
            return None
        at = [one.question.at + first for one, first in zip(routed, num_before, strict=True)]
        found = places(memory.backend, [in_order(one) for one in routed], at, None)
        model = memory.attached_model("recall")
        passages = [recalled(one) for one in routed]
        return Recall.of(
            model, memory.backend, found, memory.angles, retrieves=False, passages=passages
        )

    def for_messages(
        self, recall: Recall | None, new: NewTokens, given: Mapping[str, Any]
    ) -> Recall | None:
        """Find what a message is about that is added to cached chats, and read it.

        Without a user's header among the new tokens, they go on with what the cache has. Its
        passages stand before it if the cache has none, and else take the place of those it has, as
        many rows as these.

        Args:
            recall: what the caches were filled with; None for nothing.
            new: the tokens of the forward.
            given: its arguments.
        """
        memory, call, past = self._memory, call_of(self._memory), new.num_tokens - new.num_new
        token_ids = given.get("input_ids")
        if not isinstance(token_ids, Tensor):
            return recall
        if call is not None and call.width is not None and call.width > past:
            token_ids = token_ids[:, : call.width - past]
        num_new = token_ids.shape[1]
        if new.padding is None:
            texts = list(token_ids)
        else:
            kept = new.padding[:, past : past + num_new].to(token_ids.device) != 0
            texts = [row[mine] for row, mine in zip(token_ids, kept, strict=True)]
        if not any(has_message(text, memory.tokenizer) for text in texts):
            return recall
        counts = None if recall is None or recall.rows is None else recall.rows.lengths.tolist()
        times = 1 if counts is None else len(texts) // len(counts)
        if same_runs(texts) % times:
            return recall
        texts = texts[::times]
        is_message = [has_message(text, memory.tokenizer) for text in texts]
        stand = new.index.expand(len(token_ids), -1)[::times]
        ends = stand[:, num_new - 1].tolist()  # the place of the last new token
        first = [end + 1 - len(text) for end, text in zip(ends, texts, strict=True)]
        if counts is None:
            counts = self._rooms(max(ends) + 1, len(texts))
        rooms = [count if asks else 0 for count, asks in zip(counts, is_message, strict=True)]
        routed = self.route(texts, num_before=min(first), num_rows=rooms)
        end = past + num_new
        if recall is None:
            recall = self._recall(routed, first)
            if recall is not None:
                recall.prompt_end = end
            return recall
        return self._swapped(recall, routed, end)

    def _rooms(self, num_tokens: int, count: int) -> list[int]:
        """Return how many rows there is room for behind so many tokens, `count` times."""
        room, longest = self._memory.in_force.recall_rows, self._memory.angles.longest
        if longest is not None:
            most = (longest - num_tokens) // 2
            room = min(room, most) if most >= min(_LEAST_ROWS, room) else 0
        return [room] * count

    def for_answers(self, recall: Recall, new: NewTokens, given: Mapping[str, Any]) -> Recall:
        """Find what answers are about that have grown by so many tokens as `reroute` says.

        Args:
            recall: what the caches were filled with.
            new: the tokens of the forward.
            given: its arguments.

        Returns:
            The same if the answers have not moved on.
        """
        every, tokens = self._memory.in_force.reroute, all_tokens(new, given)
        num_generated = new.num_tokens - recall.prompt_end
        rows = recall.rows
        if not every or rows is None or tokens is None or num_generated % every:
            return recall
        if len(rows.ids) != len(tokens) or not recall.prompt_end:
            return recall  # several sequences go on with the same rows
        routed = self.route(
            unpadded(tokens, new), num_generated=num_generated, num_rows=rows.lengths.tolist()
        )
        return self._swapped(recall, routed, recall.prompt_end)

    def _swapped(self, recall: Recall, routed: Sequence[Routed], prompt_end: int) -> Recall:
        """Put other rows in the place of those that are recalled, where prompts have moved on."""
        memory, rows = self._memory, recall.rows
        assert rows is not None
        model, others = memory.attached_model("recall"), {}
        passages = [list(of_prompt) for of_prompt in recall.passages]
        for prompt, one in enumerate(routed):
            found = exchanged(rows, prompt, one, memory.backend)
            if found is None:
                continue
            place, taken = found
            others[prompt] = RecalledRows.read(
                memory.backend, [place], model.unrotations, memory.angles
            )
            passages[prompt] = recalled(taken)
            for recording in memory.recordings:
                recording.route([taken])
        if others:
            rows = with_others(rows, others)
        return recall.following(rows, prompt_end, passages)


def all_tokens(new: NewTokens, given: Mapping[str, Any]) -> Tensor | None:
    """Return the tokens of a forward and its cache, (B, num_tokens), padding counted, if known.

    Args:
        new: the tokens of the forward.
        given: its arguments.
    """
    token_ids, known = given.get("input_ids"), tokens_of(new.cache)
    past = new.num_tokens - new.num_new
    if not isinstance(token_ids, Tensor):
        return None
    if not past:
        return token_ids
    if known is None or known.shape[1] < past or len(known) != len(token_ids):
        return None
    return torch.cat([known[:, :past].to(token_ids.device), token_ids], dim=1)


def recalled(routed: Routed) -> list[Recalled]:
    """Return passages with their scores, as they are put into a prompt."""
    return [Recalled(one.passage, one.score) for one in reversed(routed.passages)]


def in_order(routed: Routed) -> list[Passage]:
    """Return passages as they are put into a prompt: the best last, next to the question."""
    return [one.passage for one in reversed(routed.passages)]
