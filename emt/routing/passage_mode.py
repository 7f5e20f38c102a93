"""Passage mode: a prompt's passages are found and recalled by the forward that reads it.

A hook before the decoder sees each new prompt (a forward whose cache is empty), asks the router for
the passages it is about, and puts their rows in front of the question. The cache remembers what it
was computed with, so the steps of `generate` that follow, beams and copies of the cache included,
attend to the same rows, whatever the settings are by then; nothing else of `generate` changes. A
prompt that nothing in the memory is relevant for is the plain model's, bit for bit.

A message that is added to a cached chat is routed, too: its passages stand before it if the cache
has none, and else take the place of those it has, as many rows as these. So do the passages found
by the setting `reroute` while an answer is generated.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from emt.config import MemoryConfig
from emt.errors import ConfigError, MemoryUseError
from emt.hook import is_watching
from emt.recall import Recall, end_of_forward, forget_recall, recall_of, tokens_of
from emt.recall_rows import Passage, Recalled, RecalledRows, places
from emt.recall_tokens import NewTokens
from emt.routing.exchange import exchanged, with_others
from emt.routing.generate_calls import call_of, calling, check_can_route
from emt.routing.profile import HeadProfile, shipped_profiles
from emt.routing.prompt import has_message, same_runs, unpadded
from emt.routing.router import Routed, Router
from memory_backends import MemoryBackend, VectorDBBackend

if TYPE_CHECKING:
    from emt.memory import Memory

LARGE = 16_384  # rows: the longest document that the token mode was published with
PROFILE = "head_profile"  # a store's setting
_LEAST_ROWS = 16  # fewer are not worth a passage
_uncompiled = cast(Callable[[Callable[..., Any]], Callable[..., Any]], torch.compiler.disable)


class _Known(NamedTuple):
    """A head profile, and where it was looked for."""

    backend: MemoryBackend
    path: str | None
    stored: Any
    profile: HeadProfile | None


class PassageMode:
    """Finds and recalls passages for the prompts of one memory's model.

    Args:
        memory: whose model.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._hooks: list[Any] = []
        self._router: Router | None = None
        self._profile: _Known | None = None
        self._signature: inspect.Signature | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> PassageMode:
        """Return itself: a copy of the decoder has its hooks, but is not attached."""
        return self

    # -- which mode -----------------------------------------------------------------------------

    @property
    def mode(self) -> Literal["token", "passage"]:
        """The mode of this thread's calls, with "auto" decided.

        Raises:
            ConfigError: as `find_profile`.
        """
        memory = self._memory
        return self._mode_of(memory.in_force, memory.backend)

    def _mode_of(self, config: MemoryConfig, backend: MemoryBackend) -> Literal["token", "passage"]:
        if config.mode != "auto":
            return config.mode
        is_large = len(backend) > LARGE and self.find_profile(config, backend) is not None
        return "passage" if is_large else "token"

    def find_profile(self, config: MemoryConfig, backend: MemoryBackend) -> HeadProfile | None:
        """Return the head profile of the model, or None if there is none.

        Raises:
            ConfigError: the file of a profile is none, or of a model of another shape.
        """
        known = self._profile
        if known is None or known.backend is not backend or known.path != config.profile:
            self._profile = known = self._looked_up(config, backend)
        return known.profile

    def _looked_up(self, config: MemoryConfig, backend: MemoryBackend) -> _Known:
        model = self._memory.attached_model("find a head profile")
        stored, before = backend.catalog.setting(PROFILE), self._profile
        if before is not None and before[:3] == (backend, config.profile, stored):
            return before  # the same object: what was made for it stays
        if config.profile is not None:
            found: HeadProfile | None = HeadProfile.read(config.profile)
        elif stored is not None:
            found = HeadProfile.from_json(stored)
        else:
            found = shipped_profiles().get(str(model.identity.get("weights")))
        if found is not None:
            found.check(model.query_heads, model.layout)
        return _Known(backend, config.profile, stored, found)

    @property
    def profile(self) -> HeadProfile:
        """The head profile in force.

        Raises:
            ConfigError: there is none.
        """
        found = self.find_profile(self._memory.in_force, self._memory.backend)
        if found is None:
            raise ConfigError(
                "the passage mode needs a head profile of this model, and there is none. Make one "
                "with `emt profile --model MODEL --output FILE`, and set profile to FILE."
            )
        return found

    @property
    def lacks_profile(self) -> bool:
        """Whether this memory would be read in passages if its model had a head profile.

        Raises:
            ConfigError: as `find_profile`.
        """
        config, backend = self._memory.config, self._memory.backend
        is_large = config.mode == "auto" and len(backend) > LARGE
        if config.mode != "passage" and not is_large:
            return False
        return self.find_profile(config, backend) is None

    def keep(self, profile: HeadProfile) -> None:
        """Keep a profile in the memory's store, for all who open it.

        Raises:
            ConfigError: it is of a model of another shape.
            StoreError: the store cannot be written.
        """
        model = self._memory.attached_model("keep a head profile")
        profile.check(model.query_heads, model.layout)
        self._memory.backend.set_setting(PROFILE, profile.to_json())
        self.settle(anew=True)

    def prepare(self, backend: MemoryBackend, config: MemoryConfig) -> None:
        """Let a backend index what is searched, and no more.

        Raises:
            ConfigError: as `find_profile`.
        """
        if not isinstance(backend, VectorDBBackend):
            return
        heads = None
        if self._mode_of(config, backend) == "passage":
            profile = self.find_profile(config, backend)
            if profile is not None:
                model = self._memory.attached_model("index")
                heads = profile.key_value_heads(model.query_heads, backend.layout)
        backend.index_heads(heads)

    # -- hooks ----------------------------------------------------------------------------------

    def settle(self, *, anew: bool = False) -> None:
        """Watch the model's forwards once they may be given passages.

        From then on they are watched until the model is detached: caches may hold prompts that were
        read with passages, and another thread's forward may be running.

        Args:
            anew: the memory has changed, and with it perhaps its profile.
        """
        decoder = self._memory.decoder_or_none()
        if decoder is None:
            for hook in self._hooks:
                hook.remove()
            self._hooks = []
            return
        config, backend = self._memory.config, self._memory.backend
        if not self._memory.is_open:
            return
        if anew and self._profile is not None:
            self._profile = self._looked_up(config, backend)
        if not self._hooks and self._mode_of(config, backend) == "passage":
            self._signature = inspect.signature(decoder.forward)
            before, after = map(_uncompiled, (self._before, self._after))
            self._hooks = [
                decoder.register_forward_pre_hook(before, with_kwargs=True),
                decoder.register_forward_hook(after, with_kwargs=True, always_call=True),
            ]
            if "torch._dynamo" in sys.modules:
                torch.compiler.reset()  # what was compiled before does not know of hooks

    def _is_ours(self, module: nn.Module) -> bool:
        # A deep copy of the decoder has our hooks, but is not attached.
        return not is_watching() and module is self._memory.decoder_or_none()

    # Torch may call hooks that are being put in or taken out, then without keywords.

    def _before(self, module: nn.Module, args: tuple[Any, ...], *keywords: Any) -> Any:
        if not keywords or not self._is_ours(module) or self._memory.is_recalling:
            return None  # a block has hooks of its own
        assert self._signature is not None
        given = {**self._signature.bind_partial(*args, **keywords[0]).arguments, **keywords[0]}
        cache, may = given.get("past_key_values"), self._memory.recalls_passages
        recall = recall_of(cache)
        if recall is None and not may:
            return None
        new = NewTokens.of(self._signature, args, keywords[0])
        call = call_of(self._memory)
        is_first = call is None or not call.has_begun
        if call is not None:
            call.has_begun = True
        if new.num_tokens == new.num_new:
            forget_recall(cache)  # what a cache of fixed size held before
            recall = self._for_prompts(new, given) if may else None
        elif may and new.num_new > 1 and is_first:
            recall = self._for_messages(recall, new, given)
        elif may and new.num_new == 1 and recall is not None:
            recall = self._for_answers(recall, new, given)
        if recall is None:
            return None
        return recall.begin(module, args, keywords[0], tokens=_all_tokens(new, given))

    def _after(self, module: nn.Module, args: tuple[Any, ...], *keywords_and_output: Any) -> None:
        if self._is_ours(module):
            end_of_forward(keywords_and_output[-1])

    @contextlib.contextmanager
    def generating(self, options: Mapping[str, Any]) -> Iterator[None]:
        """Know in a `with` block what the prompts of a `generate` call are.

        Args:
            options: its keywords.

        Raises:
            ConfigError: it reads prompts in parts; or cannot be given other passages on the way,
                and the setting `reroute` asks for it.
        """
        memory = self._memory
        if memory.recalls_passages:
            model = memory.attached_model("generate").model()
            assert model is not None  # it generates
            check_can_route(model, options, memory.in_force)
        with calling(memory, options):
            yield

    # -- passages -------------------------------------------------------------------------------

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
        router, config, longest = self._router_now(), memory.in_force, memory.angles.longest
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
                    num_rows=room,
                    num_passages=config.recall_passages,
                    routing=config.routing,
                    num_generated=num_generated,
                    **memory.search_options(number, len(prompts)),
                )
            )
        return found

    def _router_now(self) -> Router:
        memory, profile = self._memory, self.profile
        model = memory.attached_model("route")
        decoder = model.decoder()
        if decoder is None:
            raise MemoryUseError("cannot route: the model is gone. Keep a reference to it.")
        router = self._router
        if router is None or router.profile is not profile:
            router = Router(decoder, profile, model.unrotations, memory.angles, memory.tokenizer)
            self._router = router
        return router

    def _for_prompts(self, new: NewTokens, given: Mapping[str, Any]) -> Recall | None:
        """Find what the prompts of a forward are about, and read it."""
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

    def _for_messages(
        self, recall: Recall | None, new: NewTokens, given: Mapping[str, Any]
    ) -> Recall | None:
        """Find what a message is about that is added to cached chats.

        Without a user's header among the new tokens, they go on with what the cache has.
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

    def _for_answers(self, recall: Recall, new: NewTokens, given: Mapping[str, Any]) -> Recall:
        """Find what answers are about that have grown by so many tokens as `reroute` says."""
        every, tokens = self._memory.in_force.reroute, _all_tokens(new, given)
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


def _all_tokens(new: NewTokens, given: Mapping[str, Any]) -> Tensor | None:
    """Return the tokens of a forward and its cache, (B, num_tokens), padding counted, if known."""
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
