"""Passage recall: stored rows of passages, attended to in order as if their text were in a prompt.

While a block is open, a forward pre-hook of the decoder moves the tokens that follow the passages
back by as many positions as there are rows, and each layer attends to the rows and its local keys
with the model's own attention function. The cache holds the prompt and the answer, nothing else:
`generate` runs unchanged, and the rows were read and turned once, before it.

    with memory.recalling([Passage("report.txt", 40, 168)]):
        model.generate(**inputs)

Source: the rows are those of Klett and Ahle, Extended Mind Transformers (arXiv 2406.02332). Keys
stored without their rotation and turned to a place in the prompt: Xiao et al., Efficient Streaming
Language Models with Attention Sinks (arXiv 2309.17453), and Liu et al., ReAttention (2407.15176).
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import weakref
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from emt.errors import MemoryUseError
from emt.model.devices import input_device, no_autocast
from emt.model.forward import NewTokens, with_arguments
from emt.model.hook import AttentionCall, is_watched
from emt.model.positions import Angles
from emt.model.references import alive
from emt.modes.passage.frame import Frame, Reach, reach_of
from emt.modes.passage.rows import Place, RecalledRows, check_end, repeats
from emt.passage import Passage as Passage
from emt.passage import Recalled
from memory_backends import MemoryBackend

if TYPE_CHECKING:
    from emt.memory.memory import AttachedModel

_MARK = "_emt_recall"  # on a cache: the recall that its keys were computed with
_TOKENS = "_emt_tokens"  # on a cache: the tokens that it holds, where they are kept


class Recall:
    """What is put into some prompts: by a block of `Memory.recalling`, or for one cache.

    Attributes:
        rows: what is recalled; None if nothing is.
        retrieves: whether queries retrieve single memories, too.
        passages: those of each prompt, in the order they are put.
        prompt_end: tokens of a prompt, padding counted; those after it were generated. 0 if nobody
            has to know.
    """

    def __init__(
        self,
        decoder: PreTrainedModel,
        rows: RecalledRows | None,
        angles: Angles,
        *,
        retrieves: bool,
        passages: Sequence[Sequence[Recalled]] = (),
    ) -> None:
        self.rows = rows
        self.retrieves = retrieves
        self.passages = passages
        self.prompt_end = 0
        self._family = object()
        self._decoder = weakref.ref(decoder)
        self._angles = angles
        self._reaches: dict[int, Reach] = {}
        self._is_on = True
        self._signature = inspect.signature(decoder.forward)

    @classmethod
    def of(
        cls,
        model: AttachedModel,
        backend: MemoryBackend,
        found: Sequence[Place],
        angles: Angles,
        *,
        retrieves: bool,
        passages: Sequence[Sequence[Recalled]] = (),
    ) -> Recall:
        """Read what is recalled, and put it where it belongs.

        Raises:
            ConfigError: it would end beyond the model's positions.
            MemoryUseError: the model is gone.
        """
        decoder, rows = alive(model.decoder, "recall"), None
        if any(place.ids for place in found):
            with no_autocast(input_device(decoder)):
                rows = RecalledRows.read(backend, found, model.unrotations, angles)
        return cls(decoder, rows, angles, retrieves=retrieves, passages=passages)

    def __deepcopy__(self, memo: dict[int, Any]) -> Recall:
        """Return the same block: it is for one decoder, and a copy of that has its hooks."""
        return self

    def following(
        self, rows: RecalledRows, prompt_end: int, passages: Sequence[Sequence[Recalled]]
    ) -> Recall:
        """Return a recall of other rows at the same positions, that caches of this one go on with.

        Args:
            rows: as many for each prompt, before the same token.
            passages: see `Recall`.
            prompt_end: see `Recall`.
        """
        other = copy.copy(self)
        other.rows, other.prompt_end, other.passages = rows, prompt_end, passages
        return other

    def switch(self, on: bool) -> None:
        """Recall in the forwards that begin from now on, or let them be the plain model's."""
        self._is_on = on

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Recall in every forward that begins in a `with` block, in any thread."""
        decoder = self._decoder()
        if self.rows is None or decoder is None:
            yield
            return
        hooks = [
            decoder.register_forward_pre_hook(self._before, with_kwargs=True),
            decoder.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]
        try:
            # What was compiled before does not know of hooks.
            with torch.compiler.set_stance("force_eager"):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def place(self, call: AttentionCall) -> AttentionCall:
        """Return a layer's call with the rows in it; the call itself, outside of such a forward."""
        running = _running.get()
        if running is None or running.recall is not self:
            return call
        if call.layer_idx in running.placed:
            # Layers attend once in a forward, so this is another one: the hooks were taken out
            # before the first had ended, by the thread that closed a block.
            _running.set(None)
            return call
        running.placed.add(call.layer_idx)
        frame = running.frame
        reach = self._reaches.get(call.layer_idx)
        if reach is None:
            decoder = self._decoder()
            assert decoder is not None  # it runs
            reach = self._reaches[call.layer_idx] = reach_of(decoder.config, call)
        return frame.place(call, reach)

    @property
    def frame(self) -> Frame | None:
        """The forward of this thread that recalls this; None outside of one."""
        running = _running.get()
        return None if running is None or running.recall is not self else running.frame

    # Torch may call hooks that are being put in or taken out, then without keywords: another
    # thread's forward, which has begun without us.

    def _before(self, module: nn.Module, args: tuple[Any, ...], *keywords: Any) -> Any:
        # A deep copy of the decoder has our hooks, but is not attached.
        if not keywords or not self._is_on or is_watched() or module is not self._decoder():
            return None
        return self.begin(module, args, keywords[0])

    def _after(self, module: nn.Module, args: tuple[Any, ...], *keywords_and_output: Any) -> None:
        if not is_watched() and module is self._decoder():
            end_of_forward(keywords_and_output[-1])

    def begin(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        options: dict[str, Any],
        *,
        tokens: Tensor | None = None,
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Move the tokens of a forward, and keep where they stand for its layers.

        Args:
            module: the decoder.
            args: what it was called with.
            options: its keywords.
            tokens: (B, n), all that its cache will hold, to be kept with it; None if not known.

        Returns:
            Arguments and keywords to call it with instead.

        Raises:
            MemoryUseError: the model is in training mode, or its cache was filled without the rows.
            ConfigError: tokens would stand beyond the model's positions.
            UnsupportedModelError: it cannot be told where tokens stand.
        """
        if module.training:  # layers that are run again for their gradients would be plain ones
            raise MemoryUseError(
                "passages are recalled in evaluation mode; the model is in training mode. Call "
                "model.eval()."
            )
        assert self.rows is not None
        new = NewTokens.of(self._signature, args, options)
        index = new.index
        if len(self.rows.ids) > 1:
            repeats(new.batch, len(self.rows.ids))
            index = index.expand(new.batch, -1)
        offset = _sliding_offset(new.cache, new.num_new)
        frame = Frame(self.rows, index, new.num_tokens, new.padding, new.is_bare, offset)
        if frame.end > (self._angles.longest or frame.end):
            check_end(int(frame.positions.max()) + 1, self._angles.longest)
        if new.num_tokens > new.num_new:
            self._check_cache(new.cache, frame)
        _running.set(_Running(self, frame, tokens))
        put = {}
        if "position_ids" in self._signature.parameters:
            put["position_ids"] = frame.positions
            if not new.has_mask and new.num_new > 1:
                # Without a mask, positions with a gap are taken for several prompts in one.
                put["attention_mask"] = index.new_ones(new.batch, new.num_tokens)
        return with_arguments(self._signature, args, options, put)

    def _check_cache(self, cache: Any, frame: Frame) -> None:
        """Refuse a cache with keys that were computed without these rows, or with others."""
        mark = recall_of(cache)
        if mark is not None and mark._family is self._family:
            return
        at = frame.rows.at.to(frame.index.device)[:, None]
        if mark is None and not bool((frame.index[:, :1] > self._at_of(frame, at)).any()):
            return
        raise MemoryUseError(
            f"passages are put before token {int(at.min())} of the prompt, and the cache holds "
            "tokens from there on that were computed without them. Begin with an empty cache "
            "inside this recalling() block, or put the passages after what is cached: at="
            f"{int(frame.index[:, :1].max())}."
        )

    @staticmethod
    def _at_of(frame: Frame, at: Tensor) -> Tensor:
        times = len(frame.index) // len(at) if len(at) > 1 else 1
        return at.repeat_interleave(times, 0)


@dataclass(frozen=True)
class _Running:
    """A forward with rows in it."""

    recall: Recall
    frame: Frame
    tokens: Tensor | None
    placed: set[int] = field(default_factory=set)  # layers that have their rows


_running: ContextVar[_Running | None] = ContextVar("emt_recall", default=None)


def recall_of(cache: Any) -> Recall | None:
    """Return what the keys of a cache were computed with, if it is a recall's."""
    return getattr(cache, _MARK, None)


def tokens_of(cache: Any) -> Tensor | None:
    """Return the tokens that a recall's cache holds, (B, n) int64, padding counted, if known."""
    return getattr(cache, _TOKENS, None)


def forget_recall(cache: Any) -> None:
    """Let a cache be as one that no recall has filled."""
    if recall_of(cache) is not None:
        delattr(cache, _MARK)
        setattr(cache, _TOKENS, None)


def running_recall() -> Recall | None:
    """Return the recall of the forward that runs in this thread."""
    running = _running.get()
    return None if running is None else running.recall


def end_of_forward(output: Any) -> None:
    """End the forward that a `Recall.begin` began, and mark its caches.

    Args:
        output: what the decoder returned; None if it failed.
    """
    running = _running.get()
    if running is None:
        return
    _running.set(None)
    recall, frame = running.recall, running.frame
    parts = output.values() if isinstance(output, dict) else output
    for cache in parts if isinstance(output, dict | tuple) else ():
        if isinstance(cache, Cache) and frame.num_tokens > int(frame.rows.at.min()):
            setattr(cache, _MARK, recall)  # a copy of the cache has it, too
            setattr(cache, _TOKENS, running.tokens)


def _sliding_offset(cache: Any, num_queries: int) -> int:
    """Return the first token that layers with a window still have."""
    sliding = getattr(cache, "is_sliding", None)
    if not sliding or True not in sliding:
        return 0
    return int(cache.get_mask_sizes(num_queries, list(sliding).index(True))[1])
