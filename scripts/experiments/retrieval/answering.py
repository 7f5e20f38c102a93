"""Who answers: a model that is given a message, and says something or scores what might be said.

An experiment needs only a `Responder`. `LocalModel` is one; a model behind an endpoint, which gives
text and no log-probabilities, can be another.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from emt.attach import generating, memory_of
from emt.errors import ConfigError


@dataclass(frozen=True)
class Response:
    """What a model makes of one message.

    Attributes:
        text: what it says, without special tokens.
        log_probs: mean log-probability per token (nats) of each candidate, if the model tells.
        num_prompt_tokens: length of the message with what a chat template adds.
        seconds: from the message to the end of the text; candidates are not in it.
    """

    text: str
    log_probs: tuple[float, ...] | None
    num_prompt_tokens: int
    seconds: float


class Responder(Protocol):
    """A model as an experiment sees it."""

    @property
    def room(self) -> int | None:
        """Tokens a prompt may have so that the answer fits too; None for no limit."""

    def count(self, message: str) -> int:
        """Return how many tokens the prompt has that this message becomes."""

    def split(self, text: str, num_tokens: int) -> list[str]:
        """Cut a text into pieces of `num_tokens` tokens, the last may be shorter; none is lost."""

    def respond(self, message: str, candidates: Sequence[str] = ()) -> Response:
        """Answer a message greedily, and tell how likely other answers were."""


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
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    @property
    def room(self) -> int | None:
        """Tokens a prompt may have so that the answer fits too; None for no limit."""
        return None if self.window is None else self.window - self.max_new_tokens

    def count(self, message: str) -> int:
        """Return how many tokens the prompt has that this message becomes."""
        return len(self._prompt_ids(message))

    def split(self, text: str, num_tokens: int) -> list[str]:
        """Cut a text into pieces of `num_tokens` tokens, the last may be shorter; none is lost."""
        tokenizer = self.tokenizer
        if not tokenizer.is_fast:  # no offsets
            ids = self._ids(text)
            pieces = [ids[at : at + num_tokens] for at in range(0, len(ids), num_tokens)]
            return [str(tokenizer.decode(piece)) for piece in pieces]
        encoded = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        starts = [start for start, _ in cast(list[tuple[int, int]], encoded["offset_mapping"])]
        cuts = [0, *starts[num_tokens::num_tokens], len(text)]
        return [text[start:end] for start, end in itertools.pairwise(cuts) if end > start]

    @torch.no_grad()
    def respond(self, message: str, candidates: Sequence[str] = ()) -> Response:
        """Answer a message greedily, and tell how likely other answers were.

        Raises:
            ConfigError: message and answer are longer than the model's positions.
        """
        started = time.perf_counter()
        prompt = self._prompt_ids(message)
        suffixes = [self._candidate_ids(message, candidate) for candidate in candidates]
        longest = max([self.max_new_tokens, *map(len, suffixes)])
        if self.window is not None and len(prompt) + longest > self.window:
            raise ConfigError(
                f"a prompt of {len(prompt)} tokens and an answer of {longest} must fit "
                f"{self.window} positions. Shorten the question, or raise window."
            )
        with self._generating() as redoes:
            cache = DynamicCache(config=self.model.config) if redoes else None
            output = self._forward(prompt, cache)
            first = output.logits[0, -1].float().log_softmax(-1)  # (V,)
            prompt_seconds = time.perf_counter() - started
            log_probs = tuple(
                self._mean_log_prob(suffix, first, output.past_key_values, step_by_step=redoes)
                for suffix in suffixes
            )
            started = time.perf_counter()
            ids = self._greedy(first, output.past_key_values)
            seconds = prompt_seconds + time.perf_counter() - started
        text = str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()
        return Response(text, log_probs, len(prompt), seconds)

    @contextlib.contextmanager
    def _generating(self) -> Iterator[bool]:
        """Do in a block what `generate` does of an attached memory; tell if steps are redone."""
        memory = memory_of(self.model)
        if memory is None:
            yield False
            return
        with generating(self.model, {"use_cache": True}):
            yield memory.in_force.uncertainty is not None

    def _mean_log_prob(
        self, ids: list[int], first: Tensor, cache: Any, *, step_by_step: bool
    ) -> float:
        """Score tokens after a prompt whose cache stays as it is."""
        total, before, cache = float(first[ids[0]]), ids[:-1], copy.deepcopy(cache)
        length = 1 if step_by_step else max(len(before), 1)  # only a call's last token is redone
        for start in range(0, len(before), length):
            given = before[start : start + length]
            logits = self._forward(given, cache, keep=len(given)).logits[0, -len(given) :]
            log_probs = logits.float().log_softmax(-1)  # (len(given), V)
            rows = torch.arange(len(given), device=log_probs.device)
            following = torch.tensor(ids[start + 1 :][: len(given)], device=log_probs.device)
            total += float(log_probs[rows, following].sum())
        return total / len(ids)

    def _greedy(self, first: Tensor, cache: Any) -> list[int]:
        """Go on from a prompt, whose cache grows, to the end or `max_new_tokens`."""
        ends = self._end_ids()
        ids = [int(first.argmax())]
        while len(ids) < self.max_new_tokens and ids[-1] not in ends:
            logits = self._forward(ids[-1:], cache).logits[0, -1]
            ids.append(int(logits.argmax()))
        return ids

    def _forward(self, ids: list[int], cache: Any = None, *, keep: int = 1) -> Any:
        options: dict[str, Any] = {"logits_to_keep": keep} if self._keeps_logits else {}
        tokens = torch.tensor([ids], device=self.model.device)
        return self.model(input_ids=tokens, past_key_values=cache, use_cache=True, **options)

    def _end_ids(self) -> set[int]:
        found = getattr(self.model.generation_config, "eos_token_id", None)
        return set(found) if isinstance(found, list) else set() if found is None else {found}

    def _prompt(self, message: str) -> str:
        if not self.chat:
            return f"{message}\nAnswer:"
        turns = [{"role": "user", "content": message}]
        return cast(
            str,
            self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False),
        )

    def _prompt_ids(self, message: str) -> list[int]:
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
    config = model.config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        found = getattr(config, name, None)
        if isinstance(found, int):
            return found if window is None else min(window, found)
    return window
