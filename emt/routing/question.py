"""Find the question in a prompt: the user's last message in a chat, or the end of a plain text."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from emt.model.chat import last_message
from emt.passage import Question

_LONGEST = 64  # tokens; of a longer message its last so many ask


def question_of(token_ids: Tensor, tokenizer: PreTrainedTokenizerBase | None) -> Question:
    """Find the question in a prompt: the tokens to search by.

    Args:
        token_ids: (T,) int64, without padding.
        tokenizer: the model's, whose chat template tells messages apart; None for a plain text.

    Returns:
        In a chat, the last 64 tokens of the user's last message, with passages before the message;
        in a plain text its last 64 tokens, with passages before the text.
    """
    ids = token_ids.tolist()
    message = None if tokenizer is None else last_message(ids, tokenizer)
    at, stop = message or (0, len(ids))
    return Question(at, max(at, stop - _LONGEST), stop)


def has_message(token_ids: Tensor, tokenizer: PreTrainedTokenizerBase | None) -> bool:
    """Tell whether tokens (T,) have a message of the user, as the chat template marks it."""
    return tokenizer is not None and last_message(token_ids.tolist(), tokenizer) is not None
