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
import itertools
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import nn

from emt.config import MemoryConfig
from emt.errors import ConfigError, MemoryUseError
from emt.model.forward import NewTokens
from emt.model.hook import is_watched
from emt.modes.passage.generate_calls import call_of, calling, check_can_route
from emt.modes.passage.recall import end_of_forward, forget_recall, recall_of
from emt.modes.passage.source import PassageFinder, all_tokens
from emt.profiles.choice import PROFILE, ProfileChoice
from emt.routing.head_profile import HeadProfile
from memory_backends import MemoryBackend, VectorDBBackend

if TYPE_CHECKING:
    from emt.memory.memory import Memory

LARGE = 16_384  # rows: the longest document that the token mode was published with
_logger = logging.getLogger(__name__)
_MAKES_PROFILE = (
    "this model has no head profile: one is made of the memory's own text and kept in its store, "
    "which takes about as long as reading 30,000 tokens. To avoid it, make one beforehand with "
    "`emt profile` and set profile to its file, or set mode to token."
)
_LACKS_FILES = (
    "the store has no FAISS files of some heads that this memory searches: it was saved with "
    "another head profile, or in another mode. Their indexes are made in RAM at the first search, "
    "in each process again, which takes long for %d rows. save() writes the files."
)
_uncompiled = cast(Callable[[Callable[..., Any]], Callable[..., Any]], torch.compiler.disable)


class PassageMode:
    """Finds and recalls passages for the prompts of one memory's model.

    Args:
        memory: whose model.

    Attributes:
        finder: finds the passages.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._hooks: list[Any] = []
        self._profiles = ProfileChoice(memory.attached_model("find a head profile"))
        self.finder = PassageFinder(memory, self._profiles)
        self._signature: inspect.Signature | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> PassageMode:
        """Return itself: a copy of the decoder has its hooks, but is not attached."""
        return self

    # -- which mode -----------------------------------------------------------------------------

    @property
    def mode(self) -> Literal["token", "passage"]:
        """The mode of this thread's calls, with "auto" decided.

        Raises:
            ConfigError: as `ProfileChoice.find`.
        """
        memory = self._memory
        return self._mode_of(memory.in_force, memory.backend)

    def _mode_of(self, config: MemoryConfig, backend: MemoryBackend) -> Literal["token", "passage"]:
        if config.mode != "auto":
            return config.mode
        is_large = len(backend) > LARGE and self._profiles.find(config, backend) is not None
        return "passage" if is_large else "token"

    @property
    def profile(self) -> HeadProfile:
        """The head profile in force.

        Raises:
            ConfigError: there is none.
            MemoryUseError: the memory was closed.
        """
        self._memory.check_open("look for a head profile")
        return self._profiles.required(self._memory.in_force, self._memory.backend)

    @property
    def lacks_profile(self) -> bool:
        """Whether this memory would be read in passages if its model had a head profile.

        Raises:
            ConfigError: as `ProfileChoice.find`.
            MemoryUseError: the memory was closed.
        """
        self._memory.check_open("look for a head profile")
        config, backend = self._memory.config, self._memory.backend
        is_large = config.mode == "auto" and len(backend) > LARGE
        if config.mode != "passage" and not is_large:
            return False
        return self._profiles.find(config, backend) is None

    def make_profile(self, *, on_step: Callable[[str], object] | None = None) -> HeadProfile:
        """Make a head profile from the memory's own text, and keep it with the memory.

        It takes about as long as reading 30,000 tokens.

        Args:
            on_step: told what is being done.

        Raises:
            ConfigError: too few questions can be made from the text, or no head finds anything.
            MemoryUseError: there is no tokenizer, or no model any more; or the memory was closed.
            StoreError: the store cannot be written.
        """
        self._memory.check_open("make a head profile")
        model = self._memory.attached_model("make a head profile").model()
        name = "" if model is None else model.config.name_or_path or model.config.model_type
        ranked = self._memory.rank_heads(name=Path(str(name)).name, on_step=on_step)
        self.keep(ranked.profile)
        return ranked.profile

    def make_profile_if_needed(self) -> None:
        """Make a head profile as `make_profile` does, if one is lacking, and can be made and kept.

        Raises:
            ConfigError: as `ProfileChoice.find`.
            StoreError: the store cannot be written.
        """
        if self._memory.tokenizer is None or not self._can_ask or not self.lacks_profile:
            return
        if self._memory.backend.is_read_only:
            return
        steps = itertools.count()

        def say(step: str) -> None:
            if not next(steps):  # the text was found to be enough
                _logger.warning(_MAKES_PROFILE)

        with contextlib.suppress(ConfigError, MemoryUseError):  # a prompt says what is missing
            self.make_profile(on_step=say)

    @property
    def _can_ask(self) -> bool:
        """Whether the model is there, and would find twice the same."""
        decoder = self._memory.decoder_or_none()
        return decoder is not None and not decoder.training

    def keep(self, profile: HeadProfile) -> None:
        """Keep a profile in the memory's store, for all who open it.

        Raises:
            ConfigError: it is of a model of another shape.
            MemoryUseError: the model was detached, or the memory closed.
            StoreError: the store cannot be written.
        """
        self._memory.check_open("keep a head profile")
        model = self._memory.attached_model("keep a head profile")
        profile.check(model.query_heads, model.layout)
        self._memory.backend.set_setting(PROFILE, profile.to_json())
        self.settle(anew=True)

    def prepare(self, backend: MemoryBackend, config: MemoryConfig) -> None:
        """Let a backend index what is searched, and no more.

        Raises:
            ConfigError: as `ProfileChoice.find`.
        """
        if not isinstance(backend, VectorDBBackend):
            return
        heads = None
        if self._mode_of(config, backend) == "passage":
            profile = self._profiles.find(config, backend)
            if profile is not None:
                model = self._memory.attached_model("index")
                heads = profile.key_value_heads(model.query_heads, backend.layout)
        backend.index_heads(heads)

    def say_what_takes_long(self, backend: MemoryBackend) -> None:
        """Log that searches of a store which was just opened need indexes that it does not have.

        An index without training is made as fast as its rows are read.
        """
        if not isinstance(backend, VectorDBBackend) or backend.factory == "Flat":
            return
        if backend.lacks_files:
            _logger.warning(_LACKS_FILES, len(backend))

    def measure_relevance(self) -> None:
        """Keep in the memory's store what prompts about nothing in particular find in it.

        Without a model, with one in training mode, or without the permission to write, the store
        stays as it is.

        Raises:
            ConfigError: as `ProfileChoice.find`.
            StoreError: the store cannot be written.
        """
        memory = self._memory
        if not self._can_ask or self._mode_of(memory.config, memory.backend) != "passage":
            return
        if memory.backend.is_read_only:  # whoever reads it measures it for himself
            return
        if self._profiles.find(memory.config, memory.backend) is not None:
            self.finder.keep_relevance()

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
            self.finder.forget_model()
            return
        config, backend = self._memory.config, self._memory.backend
        if not self._memory.is_open:
            return
        if anew:
            self._profiles.look_again(config, backend)
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
        return not is_watched() and module is self._memory.decoder_or_none()

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
            recall = self.finder.for_prompts(new, given) if may else None
        elif may and new.num_new > 1 and is_first:
            recall = self.finder.for_messages(recall, new, given)
        elif may and new.num_new == 1 and recall is not None:
            recall = self.finder.for_answers(recall, new, given)
        if recall is None:
            return None
        return recall.begin(module, args, keywords[0], tokens=all_tokens(new, given))

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
