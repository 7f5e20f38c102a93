"""What a memory knows of the `generate` call that runs in this thread: which tokens its prompt is.

A forward does not tell: without a cache every step has all tokens again, and drafted tokens come
with the prompt. So the first tokens of a call's forwards are the prompt, and they are routed once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import PreTrainedModel

from emt.config import MemoryConfig
from emt.errors import ConfigError

if TYPE_CHECKING:
    from emt.modes.passage.recall import Recall

_DRAFTS = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")


@dataclass
class GenerateCall:
    """One call of `generate`.

    Attributes:
        width: tokens of its prompts, padding counted; None if not known.
        has_begun: whether a forward has begun.
        prompts: (B, width), those that were routed; None if none were.
        recall: what was found for them; None for nothing.
    """

    width: int | None
    has_begun: bool = False
    prompts: Tensor | None = None
    recall: Recall | None = None


_calls: ContextVar[Mapping[object, GenerateCall]] = ContextVar("emt_calls", default={})  # noqa: B039


def call_of(memory: object) -> GenerateCall | None:
    """Return the call of a memory's model that this thread runs, if any."""
    return _calls.get().get(memory)


@contextlib.contextmanager
def calling(memory: object, options: Mapping[str, Any]) -> Iterator[None]:
    """Tell a memory in a `with` block that its model generates.

    Args:
        memory: the memory.
        options: keywords of `generate`.
    """
    prompt = options.get("inputs")
    prompt = options.get("input_ids") if prompt is None else prompt
    width = prompt.shape[1] if isinstance(prompt, Tensor) and prompt.ndim == 2 else None
    token = _calls.set({**_calls.get(), memory: GenerateCall(width)})
    try:
        yield
    finally:
        _calls.reset(token)


def check_can_route(
    model: PreTrainedModel, options: Mapping[str, Any], config: MemoryConfig
) -> None:
    """Refuse a call of `generate` whose prompts cannot be routed.

    Raises:
        ConfigError: naming the option.
    """
    settings = options.get("generation_config") or getattr(model, "generation_config", None)

    def asked(name: str) -> Any:
        given = options.get(name)
        return getattr(settings, name, None) if given is None else given

    if asked("prefill_chunk_size"):
        raise ConfigError(
            "passages are found by a whole prompt; got prefill_chunk_size, which reads it in "
            'parts. Generate without it, or with memory.using(mode="token").'
        )
    if config.reroute is None:
        return
    wrong = [name for name in _DRAFTS if asked(name)]
    wrong += [name for name in ("num_beams", "num_return_sequences") if (asked(name) or 1) > 1]
    wrong += ["use_cache=False"] if asked("use_cache") is False else []
    if wrong:
        raise ConfigError(
            "the setting reroute swaps passages between steps of one token, with a cache, of one "
            f"sequence for each prompt; got {wrong[0]}. Generate without it, or with "
            "memory.using(reroute=None)."
        )
