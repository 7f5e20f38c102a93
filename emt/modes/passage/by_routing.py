"""`ByRouting`: the passages that prompts, added messages and growing answers are about.

A new prompt (a forward whose cache is empty) is routed, and its passages stand before the question.
The steps of `generate` that follow go on with what the cache was filled with. A message that is
added to a cached chat is routed, too: its passages stand before it if the cache has none, and else
take the place of those it has, as many rows as these. So do the passages found by the setting
`reroute` while an answer is generated. A prompt that nothing in the memory is relevant for is the
plain model's, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from emt.calls import GenerateOptions
from emt.config import MemoryConfig
from emt.errors import ConfigError, MemoryUseError
from emt.model.attached import AttachedModel
from emt.model.forward import Forward
from emt.model.references import alive
from emt.modes.guard import DRAFTS, refuse
from emt.modes.passage.batch import same_runs, unpadded
from emt.modes.passage.exchange import exchanged, with_others
from emt.modes.passage.likelihood import QuestionLikelihood
from emt.modes.passage.locate import locate
from emt.modes.passage.rows import PlacedRows
from emt.modes.passage.sources import PassageSource
from emt.modes.passage.state import PassageState, state_of
from emt.passage import Passage, Recalled, Routed
from emt.profiles.choice import ProfileChoice
from emt.routing.head_profile import HeadProfile
from emt.routing.question import has_message
from emt.routing.router import Router, voices_in
from emt.turn import Turn
from memory_backends import MemoryBackend

_LEAST_ROWS = 16  # fewer are not worth a passage


class ByRouting(PassageSource):
    """Finds the passages of prompts by what they say.

    Args:
        model: whose prompts.
        tokenizer: to find the question in a chat template, and for words.
        profiles: which head profile the model has.
    """

    def __init__(
        self,
        model: AttachedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        profiles: ProfileChoice,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._profiles = profiles
        self._router: Router | None = None

    def check(self, turn: Turn, options: GenerateOptions) -> None:
        """Refuse a call whose prompts come in parts, or that cannot be given other passages."""
        refuse(
            "passages are found by a whole prompt, which prefill_chunk_size reads in parts",
            options.chosen("prefill_chunk_size"),
            'memory.using(mode="token")',
        )
        if turn.config.reroute is None:
            return
        wrong = options.chosen(*DRAFTS)
        several = ("num_beams", "num_return_sequences")
        wrong += [name for name in several if (options.get(name) or 1) > 1]
        wrong += ["use_cache=False"] if options.get("use_cache") is False else []
        refuse(
            "the setting reroute swaps passages between steps of one token, with a cache, of one "
            "sequence for each prompt",
            wrong,
            "memory.using(reroute=None)",
        )

    def passages_of(self, turn: Turn, forward: Forward) -> PassageState | None:
        """Return what a forward's prompts are about, or what their cache was filled with.

        Raises:
            ConfigError: as `router`.
            MemoryUseError: the forward was given embeddings instead of tokens.
        """
        tokens, generation = forward.tokens, turn.overrides.generation
        if not tokens.num_past:
            return self._of_prompts(turn, forward)
        state = state_of(forward)
        is_first = generation is None or generation.num_forwards == 1
        if tokens.num_new > 1 and is_first:
            return self._of_messages(turn, forward, state)
        if tokens.num_new == 1 and state is not None:
            return self._of_answers(turn, forward, state)
        return state

    def heads_to_index(
        self, config: MemoryConfig, backend: MemoryBackend
    ) -> Mapping[int, Sequence[int]] | None:
        """Return the KV heads of the profile; none if passages are found without heads."""
        profile = self._profiles.find(config, backend)
        if profile is None or "heads" not in config.voices:
            return {}
        return profile.key_value_heads(self._model.query_heads, backend.layout)

    def keep(self, config: MemoryConfig, backend: MemoryBackend) -> None:
        """Keep in a memory's store what finds passages by values, if they do."""
        if "values" in voices_in(config, backend):
            self.router(config, backend).keep(backend)

    # -- routing --------------------------------------------------------------------------------

    def route(
        self,
        turn: Turn,
        prompts: Sequence[Tensor],
        *,
        num_generated: int = 0,
        num_before: int = 0,
        num_rows: Sequence[int] | None = None,
    ) -> list[Routed]:
        """Find the passages of prompts.

        Args:
            turn: settings, rows and scopes.
            prompts: each (T,) int64 without padding.
            num_generated: how many of the T tokens were generated, in each.
            num_before: how many tokens stand before them.
            num_rows: instead of `passage_rows`, for each prompt; 0 for no passages.

        Raises:
            ConfigError: as `router`.
            MemoryUseError: the model is gone, or documents were given for another number of
                prompts.
        """
        config, backend = turn.config, turn.backend
        router = self.router(config, backend)
        is_training = alive(self._model.decoder, "route").training  # passages are refused then
        is_judged = config.candidates > 0 and not is_training
        judge = QuestionLikelihood(self._model) if is_judged else None
        return [
            router.route(
                prompt.cpu(),
                backend,
                config,
                num_rows=self._room(config, num_before + len(prompt))
                if num_rows is None
                else num_rows[number],
                num_generated=num_generated,
                judge=judge,
                scope=turn.scope_of(number, len(prompts)),
            )
            for number, prompt in enumerate(prompts)
        ]

    def router(self, config: MemoryConfig, backend: MemoryBackend) -> Router:
        """Return what finds passages, with the head profile that there is.

        Raises:
            ConfigError: all that the settings let find them needs what is lacking: heads a profile,
                words a tokenizer.
        """
        if config.routing == "heads":
            profile: HeadProfile | None = self._profiles.required(config, backend)
        else:
            profile = self._profiles.find(config, backend)
        usable = set(voices_in(config, backend))
        usable -= {"words"} if self._tokenizer is None else set()
        usable -= {"heads"} if profile is None else set()
        if not usable:
            if config.routing == "values":
                raise ConfigError(
                    "routing 'values' needs stored values, and this store keeps text and no rows "
                    "(row_codec 'text'). Set routing to 'all', 'both', 'words' or 'heads'."
                )
            needs = "a tokenizer" + (" or a head profile" if "heads" in config.voices else "")
            raise ConfigError(
                f"routing '{config.routing}' needs {needs}, and this memory has none. Give "
                "attach() the tokenizer, or set routing to 'values', which needs neither."
            )
        router = self._router
        if router is None or router.profile is not profile:
            self._router = router = Router(self._model, profile, self._tokenizer)
        return router

    def _room(self, config: MemoryConfig, num_tokens: int) -> int:
        """Return how many rows fit before so many tokens, with as much room for the answer."""
        longest, wanted = self._model.angles.longest, config.passage_rows
        if longest is None:
            return wanted
        most = (longest - num_tokens) // 2
        return min(wanted, most) if most >= min(_LEAST_ROWS, wanted) else 0

    # -- the three kinds of forwards ------------------------------------------------------------

    def _of_prompts(self, turn: Turn, forward: Forward) -> PassageState | None:
        """Return what new prompts are about; None if nothing in the memory is relevant."""
        token_ids, generation = forward.input_ids, turn.overrides.generation
        if token_ids is None:
            raise MemoryUseError(
                "passages are found by a prompt's tokens; got inputs_embeds. Pass input_ids, or "
                'use memory.using(mode="token").'
            )
        if generation is not None:
            token_ids = token_ids[:, : generation.width]
            if generation.prompts is not None and torch.equal(generation.prompts, token_ids):
                return _as_state(generation.passages)
        prompts = unpadded(token_ids, forward.tokens)
        # Beams and returned sequences are those of one prompt, unless each goes its own way.
        times = 1 if turn.config.reroute else same_runs(prompts)
        if isinstance(turn.scopes, tuple):
            times = math.gcd(times, len(prompts) // len(turn.scopes))
        routed = self.route(turn, prompts[:: max(times, 1)])
        state = self._placed(turn, routed, [0] * len(routed), token_ids.shape[1])
        if generation is not None:
            generation.prompts, generation.passages = token_ids, state
        return state

    def _of_messages(
        self, turn: Turn, forward: Forward, state: PassageState | None
    ) -> PassageState | None:
        """Return what messages are about that are added to cached chats.

        Without a user's header among the new tokens, they go on with what the cache has.
        """
        tokens, token_ids = forward.tokens, forward.input_ids
        if token_ids is None:
            return state
        generation = turn.overrides.generation
        if generation is not None and (generation.width or 0) > tokens.num_past:
            token_ids = token_ids[:, : (generation.width or 0) - tokens.num_past]
        num_new = token_ids.shape[1]
        if tokens.padding is None:
            messages = list(token_ids)
        else:
            kept = tokens.padding[:, tokens.num_past : tokens.num_past + num_new]
            is_token = kept.to(token_ids.device) != 0
            messages = [row[mask] for row, mask in zip(token_ids, is_token, strict=True)]
        if not any(has_message(message, self._tokenizer) for message in messages):
            return state
        times = 1 if state is None else len(messages) // len(state.rows.lengths)
        if same_runs(messages) % times:
            return state
        messages = messages[::times]
        # Where each message ends and begins in its prompt.
        stops = tokens.index.expand(len(token_ids), -1)[::times, num_new - 1] + 1
        starts = [stop - len(part) for stop, part in zip(stops.tolist(), messages, strict=True)]
        if state is None:
            rooms = [self._room(turn.config, int(stops.max()))] * len(messages)
        else:
            rooms = state.rows.lengths.tolist()
        rooms = [
            room if has_message(message, self._tokenizer) else 0
            for room, message in zip(rooms, messages, strict=True)
        ]
        routed = self.route(turn, messages, num_before=min(starts), num_rows=rooms)
        prompt_end = tokens.num_past + num_new
        if state is None:
            return self._placed(turn, routed, starts, prompt_end)
        return self._swapped(turn, state, routed, prompt_end)

    def _of_answers(self, turn: Turn, forward: Forward, state: PassageState) -> PassageState:
        """Return what answers are about that have grown by as many tokens as `reroute` says."""
        every, tokens, rows = turn.config.reroute, forward.tokens, state.rows
        num_generated = tokens.num_tokens - state.prompt_end
        if not every or not state.prompt_end or num_generated % every:
            return state
        token_ids = state.all_tokens(forward)
        if token_ids is None or len(rows.ids) != len(token_ids):
            return state  # not known, or several sequences go on with the same rows
        routed = self.route(
            turn,
            unpadded(token_ids, tokens),
            num_generated=num_generated,
            num_rows=rows.lengths.tolist(),
        )
        return self._swapped(turn, state, routed, state.prompt_end)

    def _placed(
        self, turn: Turn, routed: Sequence[Routed], num_before: Sequence[int], prompt_end: int
    ) -> PassageState | None:
        """Read the passages of prompts, each of which has so many tokens before it."""
        for recording in turn.recordings:
            recording.route(routed)
        if not any(prompt.passages for prompt in routed):
            return None
        at = [
            prompt.question.at + before for prompt, before in zip(routed, num_before, strict=True)
        ]
        placements = locate(turn.backend, [_in_order(prompt) for prompt in routed], at)
        rows = PlacedRows.read(self._model, turn.backend, placements)
        return PassageState(rows, [_recalled(prompt) for prompt in routed], prompt_end)

    def _swapped(
        self, turn: Turn, state: PassageState, routed: Sequence[Routed], prompt_end: int
    ) -> PassageState:
        """Put other rows in the place of those that prompts have, where they have moved on."""
        rows, others = state.rows, {}
        passages = [list(of_prompt) for of_prompt in state.passages]
        for number, prompt in enumerate(routed):
            exchange = exchanged(rows, number, prompt, turn.backend)
            if exchange is None:
                continue
            placement, taken = exchange
            others[number] = PlacedRows.read(self._model, turn.backend, [placement])
            passages[number] = _recalled(taken)
            for recording in turn.recordings:
                recording.route([taken])
        if others:
            rows = with_others(rows, others)
        return replace(state, rows=rows, passages=passages, prompt_end=prompt_end)


def _as_state(passages: object) -> PassageState | None:
    return passages if isinstance(passages, PassageState) else None


def _recalled(routed: Routed) -> list[Recalled]:
    """Return passages with their scores, as they are put into a prompt."""
    return [Recalled(passage.passage, passage.score) for passage in reversed(routed.passages)]


def _in_order(routed: Routed) -> list[Passage]:
    """Return passages as they are put into a prompt: the best last, next to the question."""
    return [passage.passage for passage in reversed(routed.passages)]
