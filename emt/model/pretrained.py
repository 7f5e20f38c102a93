"""transformers' `from_pretrained` for a model and its tokenizer, whose failures are one error."""

from __future__ import annotations

import textwrap
from typing import Any, cast

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from emt.errors import ConfigError


def from_pretrained(
    source: str, place: str, options: dict[str, Any], how: dict[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model, in evaluation mode, and its tokenizer.

    Args:
        source: its name for the user, in errors.
        place: the folder or hub name.
        options: keywords for both.
        how: keywords for the model.

    Raises:
        ConfigError: transformers cannot load it, with its reason; or weights are missing, which
            transformers would make up.
    """
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            place, output_loading_info=True, **options, **how
        )
        tokenizer = AutoTokenizer.from_pretrained(place, **options)
    except Exception as error:  # files that are damaged make transformers raise whatever it likes
        is_bare = isinstance(error, (LookupError, AttributeError, TypeError, AssertionError))
        text = f"{type(error).__name__}: {error}" if is_bare else str(error)
        reason = textwrap.shorten(text, 300, placeholder=" ...")
        raise ConfigError(f"model '{source}' cannot be loaded: {reason}") from error
    model, report = cast(tuple[PreTrainedModel, dict[str, Any]], loaded)
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ConfigError(
            f"model '{source}' lacks {len(missing)} of its weights, such as '{missing[0]}'. "
            "Load a checkpoint of the whole language model."
        )
    model.train(False)
    return model, tokenizer
