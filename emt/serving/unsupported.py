"""Fields of OpenAI's requests that would change an answer, and cannot be served here.

Others that are unknown change nothing that a client could miss (`user`, `store`, `metadata`), and
are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from emt.serving.errors import bad_request

_NEUTRAL: dict[str, tuple[Any, ...]] = {  # values that ask for nothing
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "prediction": (),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "web_search_options": (),
}


def refuse_unsupported(fields: Mapping[str, Any] | None) -> None:
    """Refuse fields that ask for what cannot be done.

    Args:
        fields: those of a request that its schema does not name.

    Raises:
        ServingError: 400, naming the first.
    """
    for name, value in (fields or {}).items():
        neutral = _NEUTRAL.get(name)
        if neutral is None or value is None:
            continue
        is_number_for_bool = name == "logprobs" and value is not False  # 0 asks for the token's own
        if value not in neutral or is_number_for_bool:
            raise bad_request(
                f"{name} is not supported here; got {value!r:.100}. Leave it out.",
                param=name,
                code="unsupported_parameter",
            )
