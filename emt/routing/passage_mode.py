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
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from emt.config import MemoryConfig
from emt.errors import ConfigError, MemoryUseError
from emt.hook import is_watching
from emt.recall import Recall, end_of_forward, forget_recall, recall_of
from emt.recall_rows import Passage, Recalled, places, repeats
from emt.recall_tokens import NewTokens
from emt.routing.profile import HeadProfile, shipped_profiles
from emt.routing.prompt import same_runs, unpadded
from emt.routing.router import Routed, Router
from memory_backends import MemoryBackend, VectorDBBackend

if TYPE_CHECKING:
    from emt.memory import Memory

LARGE = 16_384  # rows: the longest document that the token mode was published with
PROFILE = "head_profile"  # a store's setting
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
        self._profile: tuple[object, HeadProfile | None] | None = None
        self._signature: inspect.Signature | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> PassageMode:
        """Return itself: a copy of the decoder has its hooks, but is not attached."""
        return self

    # -- which mode -----------------------------------------------------------------------------

    @property
    def mode(self) -> Literal["token", "passage"]:
        """The mode of this thread's calls, with "auto" decided.

        Raises:
            ConfigError: it is "passage", and the model has no head profile.
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
        known = (id(backend), config.profile)
        if self._profile is None or self._profile[0] != known:
            model = self._memory.attached_model("find a head profile")
            stored = backend.catalog.setting(PROFILE)
            if config.profile is not None:
                found: HeadProfile | None = HeadProfile.read(config.profile)
            elif stored is not None:
                found = HeadProfile.from_json(stored)
            else:
                found = shipped_profiles().get(str(model.identity.get("weights")))
            if found is not None:
                found.check(model.query_heads, model.layout)
            self._profile = known, found
        return self._profile[1]

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
        """Keep a profile in the memory's store, for all who open it."""
        self._memory.backend.set_setting(PROFILE, profile.to_json())
        self._profile = None
        self.settle()  # the mode may be another now

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

    def settle(self) -> None:
        """Watch the model's forwards if they may be given passages, and else do not."""
        decoder = self._memory.decoder_or_none()
        may = (
            decoder is not None
            and self._memory.is_open
            and self._mode_of(self._memory.config, self._memory.backend) == "passage"
        )
        if not may or decoder is None:
            for hook in self._hooks:
                hook.remove()
            self._hooks = []
        elif not self._hooks:
            self._signature = inspect.signature(decoder.forward)
            self._hooks = [
                decoder.register_forward_pre_hook(self._before, with_kwargs=True),
                decoder.register_forward_hook(self._after, with_kwargs=True, always_call=True),
            ]

    def _is_asked(self, module: nn.Module) -> bool:
        # A deep copy of the decoder has our hooks, but is not attached.
        is_ours = not is_watching() and module is self._memory.decoder_or_none()
        return is_ours and self._memory.recalls_passages

    def _before(self, module: nn.Module, args: tuple[Any, ...], *keywords: Any) -> Any:
        if not keywords or not self._is_asked(module):
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
        if self._is_asked(module):
            end_of_forward(keywords_and_output[-1])

    # -- passages -------------------------------------------------------------------------------

    def route(self, prompts: Sequence[Tensor]) -> list[Routed]:
        """Find the passages of prompts, each (T,) int64 without padding.

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
            if longest is not None:  # leave as much for the answer
                room = min(room, (longest - len(prompt)) // 2)
            found.append(
                router.route(
                    prompt.cpu(),
                    memory.backend,
                    num_rows=room if room >= min(_LEAST_ROWS, config.recall_rows) else 0,
                    num_passages=config.recall_passages,
                    routing=config.routing,
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
        if self._router is None or self._router.profile is not profile:
            self._router = Router(
                decoder, profile, model.unrotations, memory.angles, memory.tokenizer
            )
        return self._router

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
        if isinstance(memory.scope, tuple):
            times = min(times, repeats(len(prompts), len(memory.scope)))
        routed = self.route(prompts[::times])
        for recording in memory.recordings:
            recording.route(routed)
        if not any(one.passages for one in routed):
            return None
        chosen = [in_order(one) for one in routed]
        found = places(memory.backend, chosen, [one.question.at for one in routed], None)
        model = memory.attached_model("recall")
        passages = [
            [Recalled(one.passage, one.score) for one in reversed(prompt.passages)]
            for prompt in routed
        ]
        return Recall.of(
            model, memory.backend, found, memory.angles, retrieves=False, passages=passages
        )


def in_order(routed: Routed) -> list[Passage]:
    """Return passages as they are put into a prompt: the best last, next to the question."""
    return [one.passage for one in reversed(routed.passages)]
