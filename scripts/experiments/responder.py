"""Models that answer a message, as the experiments see them: `Responder` and `LocalModel`."""

from __future__ import annotations

import contextlib
import copy
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from emt.attach import generating, memory_of
from emt.errors import ConfigError
from emt.model.positions import max_positions
from experiments.forward import greedy, last_logits


@dataclass(frozen=True)
class Response:
    """What a model says to one message.

    Attributes:
        text: without special tokens.
        log_probs: mean log-probability per token (nats) of each candidate; None if the model does
            not tell.
        num_prompt_tokens: length of the message with what a chat template adds.
        seconds: from the message to the end of the text; candidates are not in it.
        token_ids: of the text; empty if the model does not tell.
        prompt_seconds: those until the first token could be chosen; None if the model does not
            tell.
    """

    text: str
    log_probs: tuple[float, ...] | None
    num_prompt_tokens: int
    seconds: float
    token_ids: tuple[int, ...] = ()
    prompt_seconds: float | None = None


class Responder(Protocol):
    """A model that answers messages."""

    @property
    def room(self) -> int | None:
        """Tokens a prompt may have so that the answer fits too; None for no limit."""

    def count(self, message: str) -> int:
        """Return how many tokens the prompt has that this message becomes."""

    def split(self, text: str, num_tokens: int) -> list[str]:
        """Cut a text into pieces of `num_tokens` tokens, the last may be shorter; none is lost."""

    def respond(self, message: str, candidates: Sequence[str] = ()) -> Response:
        """Answer a message greedily, and tell how likely other answers were.

        Raises:
            ConfigError: message and answer are longer than the model's positions.
        """


class _Prompted(NamedTuple):
    """A prompt that was read.

    Attributes:
        log_probs: (V,) float32 of the next token, nats.
        cache: of the prompt.
        redoes: uncertain steps are redone with more memories.
    """

    log_probs: Tensor
    cache: Cache
    redoes: bool


class LocalModel:
    """A transformers model that answers greedily.

    A prompt is computed once: the text and all candidates go on from its cache. Where a memory's
    setting `uncertainty` redoes steps, it does so here as in `generate`, for candidates too.

    Args:
        model: in evaluation mode; a memory attached to it is read.
        tokenizer: its tokenizer.
        chat: put messages into the chat template; None for "if the tokenizer has one". Without, a
            message is followed by `Answer:` on a line of its own.
        max_new_tokens: length of an answer.
        window: positions of the model; None for what its config says.

    Raises:
        ConfigError: there is no chat template, or the window has no room for an answer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat: bool | None = None,
        max_new_tokens: int = 30,
        window: int | None = None,
    ) -> None:
        has_template = bool(tokenizer.chat_template)
        if chat and not has_template:
            raise ConfigError("this model's tokenizer has no chat template. Set chat to false.")
        self.model = model
        self.tokenizer = tokenizer
        self.chat = has_template if chat is None else chat
        self.max_new_tokens = max_new_tokens
        self.window = _window_of(model, window)
        if self.window is not None and self.window <= max_new_tokens:
            raise ConfigError(
                f"the window must have room for a prompt and {max_new_tokens} new tokens; "
                f"got {self.window}. Raise window, or lower max_new_tokens."
            )

    @property
    def room(self) -> int | None:
        """Tokens a prompt may have so that the answer fits too; None for no limit."""
        return None if self.window is None else self.window - self.max_new_tokens

    def count(self, message: str) -> int:
        """Return how many tokens the prompt has that this message becomes."""
        return len(self.prompt_ids(message))

    def split(self, text: str, num_tokens: int) -> list[str]:
        """Cut a text into pieces of `num_tokens` tokens, the last may be shorter; none is lost."""
        encoded = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        starts = [start for start, _ in cast(list[tuple[int, int]], encoded["offset_mapping"])]
        cuts = [0, *starts[num_tokens::num_tokens], len(text)]
        return [text[start:end] for start, end in itertools.pairwise(cuts) if end > start]

    def respond(self, message: str, candidates: Sequence[str] = ()) -> Response:
        """Answer a message greedily, and tell how likely other answers were."""
        prompt = self.prompt_ids(message)
        suffixes = [self._candidate_ids(message, candidate) for candidate in candidates]
        started = time.perf_counter()
        with self._prompted(prompt, suffixes) as prompted:
            prompt_seconds = time.perf_counter() - started
            log_probs = tuple(self._mean_log_prob(suffix, prompted) for suffix in suffixes)
            started = time.perf_counter()
            ids = greedy(
                self.model,
                prompted.log_probs,
                prompted.cache,
                self.max_new_tokens,
                self._end_ids(),
            )
            seconds = prompt_seconds + time.perf_counter() - started
        text = str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()
        return Response(text, log_probs, len(prompt), seconds, tuple(ids), prompt_seconds)

    def log_probs(self, message: str, candidates: Sequence[str]) -> tuple[float, ...]:
        """Return the mean log-probability per token, nats, of answers to a message."""
        suffixes = [self._candidate_ids(message, candidate) for candidate in candidates]
        with self._prompted(self.prompt_ids(message), suffixes) as prompted:
            return tuple(self._mean_log_prob(suffix, prompted) for suffix in suffixes)

    @contextlib.contextmanager
    def _prompted(self, prompt: list[int], suffixes: Sequence[list[int]]) -> Iterator[_Prompted]:
        """Read a prompt; in the block, steps are as those of `generate`."""
        longest = max([self.max_new_tokens, *map(len, suffixes)])
        if self.window is not None and len(prompt) + longest > self.window:
            raise ConfigError(
                f"a prompt of {len(prompt)} tokens and an answer of {longest} must fit "
                f"{self.window} positions. Shorten the question, or raise window."
            )
        memory = memory_of(self.model)
        redoes = memory is not None and memory.new_turn().config.uncertainty is not None
        is_attached = memory is not None
        options = {"use_cache": True}
        with generating(self.model, options) if is_attached else contextlib.nullcontext():
            cache = DynamicCache(config=self.model.config)
            logits = self._logits(prompt, cache)[-1]
            yield _Prompted(logits.float().log_softmax(-1), cache, redoes)

    def _mean_log_prob(self, ids: list[int], prompted: _Prompted) -> float:
        """Score tokens after a prompt, whose cache stays as it is."""
        total, before = float(prompted.log_probs[ids[0]]), ids[:-1]
        cache = copy.deepcopy(prompted.cache)
        length = 1 if prompted.redoes else max(len(before), 1)  # a call redoes its last token only
        for start in range(0, len(before), length):
            given = before[start : start + length]
            log_probs = self._logits(given, cache, len(given)).float().log_softmax(-1)
            following = torch.tensor(ids[start + 1 :][: len(given)], device=log_probs.device)
            total += float(log_probs.gather(1, following[:, None]).sum())
        return total / len(ids)

    def _logits(self, ids: list[int], cache: Cache, count: int = 1) -> Tensor:
        """Return logits of the last tokens, (count, V); the cache grows by all of them."""
        tokens = torch.tensor([ids])
        return last_logits(self.model, tokens, count, past_key_values=cache, use_cache=True)[0]

    def _end_ids(self) -> set[int]:
        ends = getattr(self.model.generation_config, "eos_token_id", None)
        return set(ends) if isinstance(ends, list) else set() if ends is None else {ends}

    def _prompt(self, message: str) -> str:
        if not self.chat:
            return f"{message}\nAnswer:"
        turns = [{"role": "user", "content": message}]
        return cast(
            str,
            self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False),
        )

    def prompt_ids(self, message: str) -> list[int]:
        """Return the tokens of the prompt that a message becomes."""
        return [*self._opening(), *self._ids(self._prompt(message))]

    def _candidate_ids(self, message: str, candidate: str) -> list[int]:
        """Return the tokens by which a candidate goes on from a prompt."""
        prompt = self._prompt(message)
        answer = candidate if self.chat else f" {candidate}"
        before, whole = self._ids(prompt), self._ids(prompt + answer)
        if whole[: len(before)] == before and len(whole) > len(before):
            return whole[len(before) :]
        return self._ids(answer)  # its first token would join the prompt's last

    def _ids(self, text: str) -> list[int]:
        encoded = self.tokenizer(text, add_special_tokens=False, verbose=False)
        return cast(list[int], encoded["input_ids"])

    def _opening(self) -> list[int]:
        """Return what the tokenizer puts before a text; a chat template writes its own."""
        if self.chat:
            return []
        bos = self.tokenizer.bos_token_id
        ids = cast(list[int], self.tokenizer("a", verbose=False)["input_ids"])
        return [bos] if isinstance(bos, int) and ids[:1] == [bos] else []


def _window_of(model: PreTrainedModel, window: int | None) -> int | None:
    positions = max_positions(model.config.get_text_config())
    return positions if window is None else min(window, positions or window)
