"""A model behind an OpenAI-compatible endpoint: one message, one text.

The base URL and the key come from the environment, `EMT_ENDPOINT_URL` and `EMT_ENDPOINT_KEY`, and
go nowhere but into requests: not into results, errors, logs or reprs.
"""

from __future__ import annotations

import json
import math
import os
import textwrap
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from emt.errors import ConfigError, EndpointError
from experiments.retrieval.endpoint_reply import (
    Completion,
    read_completion,
    read_problem,
    seconds_to_wait,
)
from experiments.retrieval.endpoint_secrets import Secrets, url_kept_from_logs

URL_VARIABLE = "EMT_ENDPOINT_URL"
KEY_VARIABLE = "EMT_ENDPOINT_KEY"

_MAX_BYTES = 16 * 2**20  # of one reply; a text of some tokens is a few kilobytes
_FIRST_WAIT, _LONGEST_OWN_WAIT = 1.0, 60.0  # seconds; doubled each time
_LONGEST_WAIT_ASKED_FOR = 300.0  # seconds; who has to wait longer should know it
_MAX_CHARACTERS = 4096  # of which an error shows the first


@dataclass(frozen=True)
class _Setback:
    """Why an attempt failed, if another may not.

    Attributes:
        reason: for the error, should it be the last.
        wait: seconds the server asks for.
    """

    reason: str
    wait: float | None = None


class Endpoint:
    """A chat model that answers greedily, one request at a time.

    Args:
        model: its name at the endpoint.
        max_new_tokens: where an answer stops at the latest.
        parameters: more of the request's body, or instead of what is there: `temperature` is 0,
            and `max_tokens` is `max_new_tokens`. A parameter that is None is left out.
        timeout: seconds for connecting, and for one answer.
        attempts: how often a message is sent that finds the endpoint busy, broken, slow or away.
        environment: has the URL and, if the endpoint wants one, the key.
        sleep: waits between attempts.

    Raises:
        ConfigError: the URL is missing or none, the key cannot be one, an argument is of a wrong
            type or out of range, or httpx2 is not installed.

    Source:
        OpenAI's API reference, "Create chat completion", as vLLM, llama.cpp, Ollama and others
        serve it too.
    """

    def __init__(
        self,
        model: str,
        *,
        max_new_tokens: int = 30,
        parameters: Mapping[str, Any] | None = None,
        timeout: float = 120.0,
        attempts: int = 5,
        environment: Mapping[str, str] | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        _check(model, max_new_tokens, parameters, timeout, attempts)
        found = os.environ if environment is None else environment
        url, key = found.get(URL_VARIABLE, "").strip(), found.get(KEY_VARIABLE, "").strip()
        self.model = model
        self.max_new_tokens = max_new_tokens
        self.timeout = timeout
        self.attempts = attempts
        self._sleep = sleep
        self._http = _http()
        self._secrets = Secrets(key, url, _host_of(self._http, url))
        asked = {"temperature": 0, "max_tokens": max_new_tokens, **(parameters or {})}
        self._parameters = {name: value for name, value in asked.items() if value is not None}
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key:
            if not (key.isascii() and key.isprintable()):
                raise ConfigError(f"{KEY_VARIABLE} has characters that no key has. Correct it.")
            headers["Authorization"] = f"Bearer {key}"
        self._client = self._http.Client(base_url=url, headers=headers, timeout=timeout)

    def __repr__(self) -> str:
        return f"Endpoint({self.model!r})"

    def close(self) -> None:
        """Let go of the connection."""
        self._client.close()

    def complete(self, message: str) -> Completion:
        """Send one message of a user and return what the model says.

        Raises:
            ConfigError: the endpoint refuses the key.
            EndpointError: it is down, busy or slow at every attempt; or it does not know the model,
                refuses the request, or answers something else than a completion.
        """
        body = json.dumps(
            {
                "model": self.model,
                "messages": [{"role": "user", "content": message}],
                **self._parameters,
            }
        ).encode()
        backoff = _FIRST_WAIT
        for attempt in range(1, self.attempts + 1):
            found = self._attempt(body)
            if isinstance(found, Completion):
                return found
            if attempt == self.attempts:
                times = "once" if attempt == 1 else f"{attempt} times"
                raise EndpointError(
                    f"the endpoint of {URL_VARIABLE} was asked {times} and {found.reason}. "
                    "Try again when it is back; what is finished is kept."
                )
            wait = backoff if found.wait is None else found.wait
            if wait > _LONGEST_WAIT_ASKED_FOR:
                raise EndpointError(
                    f"the endpoint of {URL_VARIABLE} {found.reason}, and wants {wait:,.0f} seconds "
                    "of rest. Try again then; what is finished is kept."
                )
            self._sleep(wait)
            backoff = min(2 * backoff, _LONGEST_OWN_WAIT)
        raise AssertionError("attempts is at least 1")

    def _attempt(self, body: bytes) -> Completion | _Setback:
        started = time.perf_counter()
        try:
            status, wait, content = self._post(body)
        except (self._http.TimeoutException, TimeoutError):
            return _Setback(f"did not answer within {self.timeout:g} seconds")
        except self._http.TransportError as error:
            return _Setback(f"could not be reached: {self._shown(str(error))}")
        except self._http.RequestError as error:
            raise EndpointError(self._wrong(f"sent what cannot be decoded: {error}")) from None
        if 200 <= status < 300:
            try:
                found = read_completion(content, time.perf_counter() - started)
            except ValueError as error:
                raise EndpointError(self._wrong(f"sent no completion: {error}")) from None
            return Completion(
                self._secrets.out_of_answer(found.text), found.num_prompt_tokens, found.seconds
            )
        problem = f"{status}: {read_problem(content)}"
        if status in (408, 429) or status >= 500:
            return _Setback(f"answered {self._shown(problem)}", wait)
        if status in (401, 403):
            raise ConfigError(
                f"the endpoint of {URL_VARIABLE} refuses the key in {KEY_VARIABLE} "
                f"({self._shown(problem)}). Correct it."
            )
        if 300 <= status < 400:
            problem = f"{status}, a redirection. Set {URL_VARIABLE} to where it leads"
        elif status == 404:
            problem += f". Correct the model's name, or {URL_VARIABLE}, which often ends in /v1"
        raise EndpointError(self._wrong(f"answered {problem}"))

    def _post(self, body: bytes) -> tuple[int, float | None, bytes]:
        """Return status, seconds to wait, and content.

        Raises:
            TimeoutError: the content takes longer than `timeout`; httpx2's own time-outs are for
                each piece of it.
        """
        ends = time.monotonic() + self.timeout
        content = bytearray()
        with (
            url_kept_from_logs(),
            self._client.stream("POST", "chat/completions", content=body) as response,
        ):
            for piece in response.iter_bytes():
                content += piece
                if time.monotonic() > ends:
                    raise TimeoutError
                if len(content) > _MAX_BYTES:
                    raise EndpointError(self._wrong(f"sent more than {_MAX_BYTES:,} bytes"))
            wait = seconds_to_wait(response.headers.get("Retry-After"))
            return int(response.status_code), wait, bytes(content)

    def _wrong(self, what: str) -> str:
        return f"the endpoint of {URL_VARIABLE} {self._shown(what)}."

    def _shown(self, text: str) -> str:
        """Return a text for an error: no secrets, one line, not long."""
        hidden = self._secrets.out_of_error(text)  # first: half a key is not found any more
        return textwrap.shorten(hidden[:_MAX_CHARACTERS], 300, placeholder=" ...").rstrip(".")


def _check(model: Any, max_new_tokens: Any, parameters: Any, timeout: Any, attempts: Any) -> None:
    """Refuse arguments that cannot be; they may come from YAML."""
    if not isinstance(model, str) or not model:
        raise ConfigError(f"an endpoint's model must have a name; got {model!r}. Give one.")
    if parameters is not None and not isinstance(parameters, Mapping):
        raise ConfigError(f"parameters must be a mapping; got {parameters!r}.")
    try:
        json.dumps(dict(parameters or {}))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"parameters must be what JSON can say: {error}.") from None
    is_number = isinstance(timeout, int | float) and not isinstance(timeout, bool)
    if not is_number or not 0 < timeout < math.inf:
        raise ConfigError(f"timeout must be some seconds above 0; got {timeout!r}.")
    for name, value in (("max_new_tokens", max_new_tokens), ("attempts", attempts)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{name} must be a whole number of at least 1; got {value!r}.")


def _http() -> ModuleType:
    try:
        import httpx2
    except ImportError:
        raise ConfigError(
            "a model behind an endpoint needs httpx2. Run `pip install 'emt[experiments]'`."
        ) from None
    return httpx2


def _host_of(http: ModuleType, url: str) -> str:
    """Return a URL's host; its errors do not show the URL.

    Raises:
        ConfigError: it is none, or has a part that a base URL must not have.
    """
    if not url:
        raise ConfigError(
            f"{URL_VARIABLE} is not set. Set it to the endpoint's base URL, which often ends in "
            f"/v1, and {KEY_VARIABLE} to its key if it wants one."
        )
    try:
        found = http.URL(url)
    except http.InvalidURL:
        raise ConfigError(f"{URL_VARIABLE} is no URL. Correct it.") from None
    if found.scheme not in ("http", "https") or not found.host:
        raise ConfigError(f"{URL_VARIABLE} must begin with http:// or https:// and name a host.")
    if found.userinfo or found.query or found.fragment:
        raise ConfigError(
            f"{URL_VARIABLE} must have no user, query or fragment. The key goes to {KEY_VARIABLE}."
        )
    return str(found.host)
