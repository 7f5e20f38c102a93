"""A model behind an OpenAI-compatible endpoint: a baseline that gives text only.

The base URL and the key come from the environment, `EMT_ENDPOINT_URL` and `EMT_ENDPOINT_KEY`, and
are shown nowhere: not in results, errors or reprs.
"""

from __future__ import annotations

import math
import os
import textwrap
import time
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import openai

from emt.errors import ConfigError, EMTError
from experiments.responder import Response

URL_VARIABLE = "EMT_ENDPOINT_URL"
KEY_VARIABLE = "EMT_ENDPOINT_KEY"
CHARACTERS_PER_TOKEN = 4  # of English; the endpoint's own tokenizer is not known
_TEMPLATE_TOKENS = 16  # a chat template adds about so many to a message


class EndpointError(EMTError, OSError):
    """A model behind an endpoint that is down, slow, or answers something else than a text."""


class EndpointModel:
    """A `Responder` that asks an endpoint, greedily, one request at a time.

    Tokens are estimated, for chunks and for what fits the window; the length of a prompt is what
    the endpoint counted, if it tells.

    Args:
        model: its name at the endpoint.
        max_new_tokens: length of an answer.
        window: tokens of a prompt and its answer; None to leave nothing out, so that an endpoint
            refuses what is too long for it.
        parameters: more of a request's body, or instead of `temperature` 0 and `max_tokens`; those
            that are None are left out.
        timeout: seconds for one answer.
        attempts: how often a message is sent that finds the endpoint busy, broken, slow or away.

    Raises:
        ConfigError: the URL is missing, or the window has no room for an answer.
    """

    def __init__(
        self,
        model: str,
        *,
        max_new_tokens: int = 30,
        window: int | None = None,
        parameters: Mapping[str, Any] | None = None,
        timeout: float = 120.0,
        attempts: int = 5,
    ) -> None:
        if window is not None and window <= max_new_tokens + _TEMPLATE_TOKENS:
            raise ConfigError(
                f"the window must have room for a prompt and {max_new_tokens} new tokens; "
                f"got {window}. Raise window, or lower max_new_tokens."
            )
        url, key = (os.environ.get(name, "").strip() for name in (URL_VARIABLE, KEY_VARIABLE))
        host = urlsplit(url).hostname
        if not url.startswith(("http://", "https://")) or not host:
            raise ConfigError(
                f"{URL_VARIABLE} must be the endpoint's base URL, which often ends in /v1, and "
                f"{KEY_VARIABLE} its key if it wants one."
            )
        self.window = window
        self.max_new_tokens = max_new_tokens
        self._secrets = [secret for secret in (key, url, host) if secret]
        request = {"temperature": 0, "max_tokens": max_new_tokens, **(parameters or {})}
        self._body = {name: value for name, value in request.items() if value is not None}
        self._model = model
        self._client = openai.OpenAI(
            base_url=url, api_key=key or "none", timeout=timeout, max_retries=attempts - 1
        )

    @property
    def room(self) -> int | None:
        """Tokens a prompt may have so that the answer fits too; None for no limit."""
        return None if self.window is None else self.window - self.max_new_tokens

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
            ConfigError: the endpoint refuses the key.
            EndpointError: it is down, busy or slow at every attempt, refuses the request, or
                answers something else than a text.
        """
        started = time.perf_counter()
        try:
            reply = self._client.chat.completions.create(
                model=self._model,
                messages=[{"role": "user", "content": message}],
                extra_body=self._body,
            )
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise ConfigError(
                f"the endpoint refuses the key in {KEY_VARIABLE}: {self._shown(error)}"
            ) from None
        except (openai.OpenAIError, ValueError) as error:  # what is no JSON is a ValueError
            raise EndpointError(f"the endpoint gave no answer: {self._shown(error)}") from None
        choice = next(iter(getattr(reply, "choices", None) or ()), None)
        text = getattr(getattr(choice, "message", None), "content", None)
        if not text and getattr(choice, "finish_reason", None) != "stop":
            raise EndpointError(
                "the endpoint answered without a text. Is its base URL right, and max_new_tokens "
                f"enough? It sent {self._shown(reply)}"
            )
        counted = getattr(reply.usage, "prompt_tokens", None)
        return Response(
            text=(text or "").strip(),
            log_probs=None,
            num_prompt_tokens=counted or self.count(message),
            seconds=time.perf_counter() - started,
        )

    def _shown(self, thing: object) -> str:
        """Return a thing as one short line without the URL and the key."""
        text = " ".join(filter(None, [str(thing), str(getattr(thing, "__cause__", None) or "")]))
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return textwrap.shorten(text, 300, placeholder=" ...")
