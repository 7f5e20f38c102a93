"""What one thread's calls ask of a memory, instead of or beside what holds for everybody.

`generate()` and the published classes override settings and recordings for the time of a call; the
turns that the thread's forwards take meanwhile follow them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from emt.citations.generated import ChosenTokens, GeneratedText
from emt.citations.recording import Recording
from emt.config import MemoryConfig
from emt.model.forward import Forward


@dataclass
class Generation:
    """One call of `generate()`, while it runs.

    Attributes:
        width: tokens of its prompts, padding and what is cached of them counted; None if not known.
            A forward does not tell: without a cache every step has all tokens again, and drafted
            tokens come with the prompt. The first `width` tokens are the prompt.
        num_given: how many of them stand in what the call returns, before the new ones.
        is_draft: whether the call runs in another one, for drafts (`assistant_early_exit`).
        num_forwards: how many forwards of the text have begun.
        last_turn: the `Turn` of the latest forward.
        text: the tokens that the call chooses.
        prompts: (B, width), the prompts that passages were looked for; None if none were.
        passages: what was recalled for them; None for nothing.
    """

    width: int | None = None
    num_given: int | None = None
    is_draft: bool = False
    num_forwards: int = 0
    last_turn: Any = None
    text: GeneratedText = field(default_factory=GeneratedText)
    prompts: Tensor | None = None
    passages: Any = None
    _cache: Any = None
    _tokens: Tensor | None = None  # of the last forward, if there is no cache

    def begin(self, forward: Forward) -> bool:
        """Begin a forward; tell whether it is one of the text.

        It is not if its prompt is another one, as that of `guidance_scale` and of logits processors
        that run the model, or if its tokens are drafts.
        """
        if self.is_draft or not self._continues(forward):
            return False
        if not self.num_forwards:
            self._cache = forward.cache
            if self.width is None:
                self.width = self.num_given = forward.num_new
        self._tokens = forward.input_ids if forward.cache is None else None
        self.num_forwards += 1
        return True

    @property
    def cache(self) -> Any:
        """The cache of the text; None before its first forward, and if there is none."""
        return self._cache

    def chosen_tokens(self, forward: Forward) -> ChosenTokens:
        """Return which tokens of the text a forward's queries choose."""
        cache, width = forward.cache, self.width or 0
        num_past = 0 if cache is None else int(cache.get_seq_length())
        num_chosen = num_past + forward.num_new - width + 1  # by all forwards until now
        self.text.num_chosen = max(self.text.num_chosen, num_chosen)
        # Without a cache, the queries of all earlier tokens come again, too.
        first = max(num_chosen - 1 if cache is None else num_past - width + 1, 0)
        return ChosenTokens(self.text, first, max(num_chosen - first, 0))

    def _continues(self, forward: Forward) -> bool:
        """Tell whether a forward goes on with the text: in its cache, or else with its tokens."""
        if not self.num_forwards:
            return True
        if self._cache is not None or forward.cache is not None:
            return forward.cache is self._cache
        tokens, before = forward.input_ids, self._tokens
        if tokens is None or before is None:
            return tokens is None
        prompt = slice(None, self.width)  # what follows may be that of another beam
        return tokens.shape[1] == before.shape[1] + 1 and torch.equal(
            tokens[:, prompt], before[:, prompt]
        )

    def end(self, output: Any) -> None:
        """Take notice of what the call returned."""
        sequences = getattr(output, "sequences", output)
        if isinstance(sequences, Tensor) and sequences.ndim == 2 and self.num_given is not None:
            self.text.returned(
                sequences[:, self.num_given :], getattr(output, "beam_indices", None)
            )


@dataclass(frozen=True)
class Overrides:
    """What holds for one memory in this thread, instead of or beside what holds for all.

    Attributes:
        config: the settings; None for the memory's own.
        recordings: beside the memory's own.
        needs_weights: whether attention weights are wanted, also where a family does not tell its
            attention function so.
        generation: the `generate()` call that runs.
    """

    config: MemoryConfig | None = None
    recordings: tuple[Recording, ...] = ()
    needs_weights: bool = False
    generation: Generation | None = None


_NONE = Overrides()
_overrides: ContextVar[Mapping[object, Overrides]] = ContextVar("emt_overrides", default={})  # noqa: B039


def overrides_of(memory: object) -> Overrides:
    """Return what this thread overrides of a memory."""
    return _overrides.get().get(memory, _NONE)


@contextlib.contextmanager
def overriding(
    memory: object,
    *,
    config: MemoryConfig | None = None,
    recordings: Sequence[Recording] = (),
    needs_weights: bool = False,
    generation: Generation | None = None,
) -> Iterator[None]:
    """Let something else hold for a memory in a `with` block, in this thread.

    Args:
        memory: the memory.
        config: settings in place of those that hold; None to leave them.
        recordings: more recordings of this thread's forwards.
        needs_weights: ask for attention weights.
        generation: the `generate()` call that runs; None to leave the one that does.
    """
    before = overrides_of(memory)
    changed = replace(
        before,
        config=config or before.config,
        recordings=(*before.recordings, *recordings),
        needs_weights=needs_weights or before.needs_weights,
        generation=generation or before.generation,
    )
    token = _overrides.set({**_overrides.get(), memory: changed})
    try:
        yield
    finally:
        _overrides.reset(token)


class GenerateOptions:
    """The options of one `generate()` call: its keywords, and else its generation config.

    Args:
        model: the causal language model.
        keywords: of the call.
    """

    def __init__(self, model: nn.Module, keywords: Mapping[str, Any]) -> None:
        self._keywords = keywords
        config = keywords.get("generation_config")
        self._config = config or getattr(model, "generation_config", None)

    @property
    def num_given(self) -> int | None:
        """Token ids that the call was given of each prompt, padding counted; None if no prompt."""
        keywords = self._keywords
        prompts = keywords.get("inputs")
        prompts = keywords.get("input_ids") if prompts is None else prompts
        if isinstance(prompts, Tensor) and prompts.ndim == 2:
            return prompts.shape[1]
        return 0 if prompts is None and keywords.get("inputs_embeds") is not None else None

    @property
    def prompt_width(self) -> int | None:
        """Tokens of the call's prompts, padding counted, or embeddings; None if no prompt.

        Of a prompt whose beginning is cached, the ids of the rest may be all that is given; then
        the mask is that of the whole prompt.
        """
        embeddings, mask = map(self._keywords.get, ("inputs_embeds", "attention_mask"))
        if isinstance(embeddings, Tensor):
            return embeddings.shape[1]
        if self.num_given is not None and isinstance(mask, Tensor) and mask.ndim == 2:
            return max(self.num_given, mask.shape[1])
        return self.num_given

    def get(self, name: str) -> Any:
        """Return an option's value; None if nobody sets it."""
        value = self._keywords.get(name)
        return getattr(self._config, name, None) if value is None else value

    def chosen(self, *names: str) -> list[str]:
        """Return which of some options are switched on."""
        return [name for name in names if self.get(name)]
