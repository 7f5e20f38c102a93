"""Which options of `generate()` a mode cannot serve, and the error that says so."""

from __future__ import annotations

from collections.abc import Sequence

from emt.calls import GenerateOptions
from emt.errors import ConfigError

DRAFTS = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")


def refuse(needs: str, options: Sequence[str], instead: str) -> None:
    """Refuse a call that has options it must not have.

    Args:
        needs: what needs something else than they give, and why.
        options: those that the call has; nothing is refused if there are none.
        instead: how the call works.

    Raises:
        ConfigError: naming the first.
    """
    if options:
        raise ConfigError(f"{needs}; got {options[0]}. Generate without it, or with {instead}.")


def refuse_weights_of_drafts(options: GenerateOptions) -> None:
    """Refuse attention weights of drafted tokens.

    transformers cuts them as if each column was a local key.

    Raises:
        ConfigError: weights are asked for, and tokens are drafted.
    """
    drafts = options.chosen(*DRAFTS)
    if drafts and options.get("output_attentions"):
        raise ConfigError(
            f"output_attentions cannot be combined with {drafts[0]} and a memory. "
            "Leave one of them out."
        )
