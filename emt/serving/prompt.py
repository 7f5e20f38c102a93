"""A prompt that waits for its answers, and what it is told: pieces of text, answers, an error."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from emt.serving.access import Access
from emt.serving.errors import as_serving_error
from emt.serving.remembering import ConversationRequest, UnwrittenTurn
from emt.serving.sampling import Sampling
from emt.serving.sources import AnswerSources

_SEED_STEP = 0x9E3779B97F4A7C15  # far, so that the answers to seeds 1 and 2 have none in common
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Prompt:
    """What is generated, and how.

    Attributes:
        token_ids: of the prompt, at least one.
        max_new_tokens: of each answer.
        n: how many answers.
        sampling: of the first answer; the next have other seeds.
        stop: strings that an answer ends before.
        is_chat: leave out spaces around an answer.
        settings: of `Memory.using`.
        documents: those that may be read, as the request names them; None for all.
        where: the metadata of documents that may be read; None for all.
        access: what whoever asks may see.
        by_token: tell the sources of each token.
        conversation: in which the turn is remembered; None if it is not.
    """

    token_ids: Sequence[int]
    max_new_tokens: int
    n: int = 1
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    is_chat: bool = True
    settings: Mapping[str, Any] = field(default_factory=dict)
    documents: Sequence[str] | None = None
    where: Mapping[str, Any] | None = None
    access: Access = field(default_factory=Access)
    by_token: bool = False
    conversation: ConversationRequest | None = None

    @cached_property
    def group(self) -> str:
        """Prompts of one group can be answered together: their settings are equal."""
        return json.dumps(dict(self.settings), sort_keys=True)

    def sampling_of(self, number: int) -> Sampling:
        """Return how the tokens of one of the answers are chosen."""
        seed = self.sampling.seed
        if seed is None:
            return self.sampling
        return replace(self.sampling, seed=(seed + number * _SEED_STEP) % 2**63)


@dataclass(frozen=True)
class Piece:
    """The next text of one of a prompt's answers."""

    number: int
    text: str


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        text: without stop strings and special tokens.
        reason: why it ended: "stop", or "length" if there was no room for more.
        num_tokens: how many tokens were generated.
        sources: what it was made from.
        turn: to be remembered; None if it is not.
    """

    text: str
    reason: FinishReason
    num_tokens: int
    sources: AnswerSources
    turn: UnwrittenTurn | None = None


@dataclass(frozen=True)
class Answered:
    """All answers to a prompt."""

    answers: Sequence[Answer]


@dataclass(frozen=True)
class Failed:
    """A prompt cannot be answered."""

    error: Exception


Event = Piece | Answered | Failed


class PendingPrompt:
    """A prompt on its way; the engine's thread tells `on_event` what becomes of it.

    Attributes:
        prompt: what is generated.
        is_cancelled: nobody wants the answers any more.
        is_settled: the last event was told.
        has_text: a piece of text was told.
    """

    def __init__(self, prompt: Prompt, on_event: Callable[[Event], None]) -> None:
        self.prompt = prompt
        self.is_cancelled = False
        self.is_settled = False
        self.has_text = False
        self._on_event = on_event

    def cancel(self) -> None:
        """Stop the answers as soon as possible."""
        self.is_cancelled = True

    def tell(self, event: Event) -> None:
        """Tell what happened."""
        if self.is_settled:
            return
        self.has_text = self.has_text or isinstance(event, Piece)
        self.is_settled = not isinstance(event, Piece)
        self._on_event(event)

    def fail(self, error: Exception) -> None:
        """Tell that there is no answer."""
        self.tell(Failed(as_serving_error(error)))
