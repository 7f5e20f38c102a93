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
import inspect
import itertools
import weakref
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from emt.errors import ConfigError, MemoryUseError, UnsupportedModelError
from emt.hook import AttentionCall, is_watching
from emt.recall_frame import Frame, Reach, reach_of
from emt.recall_positions import Angles
from emt.recall_rows import Passage as Passage
from emt.recall_rows import RecalledRows, check_end, repeats

_MARK = "_emt_recall"  # on a cache: the block that its keys were computed in
_numbers = itertools.count(1)
_frame: ContextVar[Frame | None] = ContextVar("emt_recall_frame", default=None)


class Recall:
    """One block of `Memory.recalling`.

    Attributes:
        rows: what is recalled; None if nothing is.
        retrieves: whether queries retrieve single memories, too.
    """

    def __init__(
        self,
        decoder: PreTrainedModel,
        rows: RecalledRows | None,
        angles: Angles,
        *,
        retrieves: bool,
    ) -> None:
        self.rows = rows
        self.retrieves = retrieves
        self._decoder = weakref.ref(decoder)
        self._angles = angles
        self._number = next(_numbers)
        self._reaches: dict[int, Reach] = {}
        self._is_on = True
        self._signature = inspect.signature(decoder.forward)

    def __deepcopy__(self, memo: dict[int, Any]) -> Recall:
        """Return the same block: it is for one decoder, and a copy of that has its hooks."""
        return self

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
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def place(self, call: AttentionCall) -> AttentionCall:
        """Return a layer's call with the rows in it; the call itself, outside of such a forward."""
        frame = _frame.get()
        if frame is None or frame.rows is not self.rows:
            return call
        reach = self._reaches.get(call.layer_idx)
        if reach is None:
            decoder = self._decoder()
            assert decoder is not None  # it runs
            reach = self._reaches[call.layer_idx] = reach_of(decoder.config, call)
        return frame.place(call, reach)

    # Torch may call hooks that are being put in or taken out, then without keywords: another
    # thread's forward, which has begun without us.

    def _before(self, module: nn.Module, args: tuple[Any, ...], *keywords: Any) -> Any:
        # A deep copy of the decoder has our hooks, but is not attached.
        if not keywords or not self._is_on or is_watching() or module is not self._decoder():
            return None
        return self._begin(module, args, dict(keywords[0]))

    def _after(self, module: nn.Module, args: tuple[Any, ...], *keywords_and_output: Any) -> None:
        frame = _frame.get()
        if frame is None or is_watching() or module is not self._decoder():
            return
        _frame.set(None)
        output = keywords_and_output[-1]
        if output is None:  # the forward failed
            return
        parts = output.values() if isinstance(output, dict) else output
        for cache in parts if isinstance(output, dict | tuple) else ():
            if isinstance(cache, Cache) and frame.num_tokens > int(frame.rows.at.min()):
                setattr(cache, _MARK, self._number)  # a copy of the cache has it, too

    def _begin(
        self, module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Move the tokens of a forward, and keep where they stand for its layers."""
        if module.training:
            raise MemoryUseError(
                "passages are recalled in evaluation mode; the model is in training mode. Call "
                "model.eval()."
            )
        assert self.rows is not None
        given = self._signature.bind_partial(*args, **options).arguments
        given = {**given, **given.get("kwargs", {})}
        tokens = given.get("input_ids")
        tokens = given["inputs_embeds"] if tokens is None else tokens
        batch, num_queries = tokens.shape[:2]
        cache = given.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        padding, positions = given.get("attention_mask"), given.get("position_ids")
        if not isinstance(padding, Tensor) or padding.ndim != 2:
            if padding is not None and positions is None:
                raise UnsupportedModelError(
                    "recall needs to know which tokens are padding: expected an attention_mask of "
                    f"two dimensions, or position_ids; got a {type(padding).__name__} of another "
                    "kind. Pass attention_mask as the tokenizer gives it."
                )
            is_bare, padding = padding is None, None
        else:
            is_bare, padding = False, padding[:, : past + num_queries]
        index = self._index(tokens, past, padding, positions, is_bare)
        if len(self.rows.ids) > 1:
            repeats(batch, len(self.rows.ids))
            index = index.expand(batch, -1)
        frame = Frame(
            self.rows,
            index,
            past + num_queries,
            padding,
            is_bare,
            sliding_offset=_sliding_offset(cache, num_queries),
        )
        if frame.end > (self._angles.longest or frame.end):
            check_end(int(frame.positions.max()) + 1, self._angles.longest)
        if past:
            self._check_cache(cache, frame)
        _frame.set(frame)
        put = {}
        if "position_ids" in self._signature.parameters:
            put["position_ids"] = frame.positions
            if given.get("attention_mask") is None and num_queries > 1:
                # Without a mask, positions with a gap are taken for several prompts in one.
                put["attention_mask"] = torch.ones(
                    batch, past + num_queries, dtype=torch.long, device=tokens.device
                )
        return _with(self._signature, args, options, put)

    def _index(
        self,
        tokens: Tensor,
        past: int,
        padding: Tensor | None,
        positions: Tensor | None,
        is_bare: bool,
    ) -> Tensor:
        """Return each new token's place in its prompt, padding not counted, (B or 1, Q) int64."""
        num_queries = tokens.shape[1]
        if padding is not None:
            index = (padding.long().cumsum(-1) - 1).clamp(min=0)[:, -num_queries:]
        elif is_bare or positions is None:
            index = torch.arange(past, past + num_queries, device=tokens.device)[None]
        else:
            index = positions
        if positions is not None and positions.ndim != 2:
            raise UnsupportedModelError(
                "recall needs one position for each token; got position_ids of shape "
                f"{tuple(positions.shape)}. Models with several cannot recall passages."
            )
        if positions is not None and positions is not index and not past:
            is_token = True if padding is None else padding[:, -num_queries:] != 0
            if bool(((positions != index) & is_token).any()):
                raise ConfigError(
                    "position_ids must count the tokens of each prompt from 0 when passages are "
                    "recalled, which are given their place by it. Leave position_ids out."
                )
        return index

    def _check_cache(self, cache: Any, frame: Frame) -> None:
        """Refuse a cache with keys that were computed without these rows, or with others."""
        mark = getattr(cache, _MARK, None)
        if mark == self._number:
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


def _sliding_offset(cache: Any, num_queries: int) -> int:
    """Return the first token that layers with a window still have."""
    sliding = getattr(cache, "is_sliding", None)
    if not sliding or True not in sliding:
        return 0
    return int(cache.get_mask_sizes(num_queries, list(sliding).index(True))[1])


def _with(
    signature: inspect.Signature,
    args: tuple[Any, ...],
    options: dict[str, Any],
    put: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call with some of them replaced."""
    names, changed = list(signature.parameters), list(args)
    for name, value in put.items():
        if name in names[: len(args)]:
            changed[names.index(name)] = value
        else:
            options[name] = value
    return tuple(changed), options


def by_prompt(
    passages: Sequence[Passage] | Sequence[Sequence[Passage]], at: int | Sequence[int]
) -> tuple[list[Sequence[Passage]], list[int]]:
    """Return passages and places, one of each for each prompt of a batch.

    Args:
        passages: of all prompts alike, or one sequence for each prompt.
        at: of all prompts alike, or one for each.

    Raises:
        ConfigError: their numbers differ, or they are something else.
    """
    alike: list[Passage] = []
    each: list[Sequence[Passage]] = []
    for given in passages:
        if isinstance(given, Passage):
            alike.append(given)
        elif isinstance(given, Sequence) and all(isinstance(one, Passage) for one in given):
            each.append(given)
        else:
            raise ConfigError(
                f"expected Passage, or sequences of it, one for each prompt; got {given!r:.100}."
            )
    if alike and each:
        raise ConfigError(
            "passages must be alike for all prompts, or one sequence for each; got both."
        )
    places = [at] if isinstance(at, int) else list(at)
    rows: list[Sequence[Passage]] = each or [alike]
    if len(rows) == 1 and len(places) > 1:
        rows = rows * len(places)
    if len(places) == 1:
        places = places * len(rows)
    if len(places) != len(rows):
        raise ConfigError(
            f"at must be one place, or one for each prompt: {len(rows)} of them; got {len(places)}."
        )
    return rows, places
