"""A model behind an endpoint as experiments see one: a baseline that gives text only."""

from __future__ import annotations

import math
from collections.abc import Sequence

from emt.errors import ConfigError
from experiments.retrieval.answering import Response
from experiments.retrieval.endpoint import Endpoint

CHARACTERS_PER_TOKEN = 4  # of English, as most tokenizers cut it; the endpoint's own is not known
_TEMPLATE_TOKENS = 16  # what a chat template adds to a message, at most of the usual ones


class EndpointModel:
    """A `Responder` that asks an endpoint.

    Tokens are estimated, for chunks and for what fits the window; the length of a prompt is what
    the endpoint counted, if it tells.

    Args:
        endpoint: who is asked.
        window: tokens of a prompt and its answer; None to leave nothing out, so that an endpoint
            refuses what is too long for it.

    Raises:
        ConfigError: the window has no room for an answer.
    """

    def __init__(self, endpoint: Endpoint, *, window: int | None = None) -> None:
        if window is not None and window <= endpoint.max_new_tokens + _TEMPLATE_TOKENS:
            raise ConfigError(
                f"the window must have room for a prompt and {endpoint.max_new_tokens} new tokens; "
                f"got {window}. Raise window, or lower max_new_tokens."
            )
        self.endpoint = endpoint
        self.window = window

    @property
    def room(self) -> int | None:
        """Tokens a prompt may have so that the answer fits too; None for no limit."""
        return None if self.window is None else self.window - self.endpoint.max_new_tokens

    def count(self, message: str) -> int:
        """Estimate how many tokens the prompt has that this message becomes."""
        return math.ceil(len(message) / CHARACTERS_PER_TOKEN) + _TEMPLATE_TOKENS

    def split(self, text: str, num_tokens: int) -> list[str]:
        """Cut a text after words, into pieces of at most `num_tokens` tokens; none is lost."""
        longest = num_tokens * CHARACTERS_PER_TOKEN
        pieces, start = [], 0
        while start < len(text):
            end = start + longest
            if end < len(text):
                end = text.rfind(" ", start, end) + 1 or end  # a word may be longer than a piece
            pieces.append(text[start:end])
            start = end
        return pieces

    def respond(self, message: str, candidates: Sequence[str] = ()) -> Response:
        """Answer a message; how likely `candidates` are is not known.

        Raises:
            ConfigError, EndpointError: as `Endpoint.complete`.
        """
        found = self.endpoint.complete(message)
        counted = found.num_prompt_tokens
        return Response(
            text=found.text,
            log_probs=None,
            num_prompt_tokens=self.count(message) if counted is None else counted,
            seconds=found.seconds,
        )
