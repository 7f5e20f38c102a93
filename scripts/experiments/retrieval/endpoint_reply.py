"""What an OpenAI-compatible endpoint sends: a completion, a problem, or anything else."""

from __future__ import annotations

import datetime
import email.utils
import json
import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Completion:
    """What a model behind an endpoint says.

    Attributes:
        text: as sent, without white space around it.
        num_prompt_tokens: as counted by the server, with its template; None if it does not tell.
        seconds: from the request that was answered to the answer; earlier attempts are not in it.
    """

    text: str
    num_prompt_tokens: int | None
    seconds: float


def read_completion(content: bytes, seconds: float) -> Completion:
    """Read the body of a successful response.

    Nothing said is an answer if the model says that it is done (`finish_reason` is "stop"), for
    asking again would not change it.

    Raises:
        ValueError: it is no completion, or one without text; says what it is.
    """
    if not content.strip():
        raise ValueError("the reply is empty")
    reply = _json(content)
    if reply is None:
        raise ValueError(f"the reply is no JSON: {_as_line(content)}")
    choices = _at(reply, "choices")
    if not isinstance(choices, list) or not choices:
        raise ValueError(f"the reply has no choices: {_as_line(content)}")
    text = _at(choices[0], "message", "content")
    if text is not None and not isinstance(text, str):
        raise ValueError(f"the first choice has no message with text: {_as_line(content)}")
    ended = _at(choices[0], "finish_reason")
    if text is None or (not text.strip() and ended != "stop"):
        hint = "; thinking may have used up max_new_tokens" if ended == "length" else ""
        raise ValueError(f"the answer is empty (finish_reason {ended!r}){hint}")
    written = text.encode("utf-8", "replace").decode()  # half a surrogate pair cannot be
    used = _at(reply, "usage", "prompt_tokens")
    is_count = isinstance(used, int) and not isinstance(used, bool) and used > 0
    return Completion(written.strip(), used if is_count else None, seconds)


def read_problem(content: bytes) -> str:
    """Return what the body of a refusal says."""
    reply = _json(content)
    for keys in (("error", "message"), ("error",), ("message",), ("detail",)):
        found = _at(reply, *keys)
        if isinstance(found, str) and found.strip():
            return found
    return _as_line(content) or "no reason given"


def seconds_to_wait(header: str | None) -> float | None:
    """Return the seconds of a Retry-After header, which has a number or a date; None for neither.

    Source:
        RFC 9110, section 10.2.3.
    """
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            date = email.utils.parsedate_to_datetime(header)
        except ValueError:
            return None
        if date.tzinfo is None:
            date = date.replace(tzinfo=datetime.UTC)
        seconds = (date - datetime.datetime.now(datetime.UTC)).total_seconds()
    return max(seconds, 0.0) if math.isfinite(seconds) else None


def _json(content: bytes) -> Any:
    """Return parsed content; None if it is no JSON."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def _at(found: Any, *keys: str) -> Any:
    """Look up keys in mappings in one another; None if one is not there."""
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found


def _as_line(content: bytes) -> str:
    """Return a body as one line; an error shows its first words, once they hold no secret."""
    return " ".join(content.decode("utf-8", "replace").split())
