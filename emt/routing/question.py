"""Find the question in a prompt: the user's last message in a chat, or the end of a plain text."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from emt.model.chat import last_message
from emt.passage import Question

_LONGEST = 64  # tokens; of a longer message its last so many ask
_MAX_BEFORE = 64  # tokens before the message that it is read after
_MAX_GENERATED = 32  # generated tokens that ask, beside those of the question


class Asking(NamedTuple):
    """What is read of a prompt to find what it is about.

    Attributes:
        token_ids: (t,) int64: the last 64 tokens before the message, and from the first token that
            asks to the last. So a long chat, or a long text above the question, costs no more than
            a short one; heads were found to find as much.
        at: which of the t tokens passages are put before.
        tokens: which of the t tokens ask, ascending: those of the question, and the last 32 that
            were generated.
    """

    token_ids: Tensor
    at: int
    tokens: list[int]

    @classmethod
    def of(cls, token_ids: Tensor, question: Question, num_generated: int) -> Asking:
        """Read what asks.

        Args:
            token_ids: (T,) int64, a prompt, and what was generated since.
            question: of the prompt.
            num_generated: how many of the T tokens were generated.
        """
        num_tokens = len(token_ids)
        tokens = list(range(question.first, question.stop))
        tokens += range(num_tokens - min(num_generated, _MAX_GENERATED), num_tokens)
        before = token_ids[max(question.at - _MAX_BEFORE, 0) : question.at]
        asked = token_ids[tokens[0] : tokens[-1] + 1]
        at = len(before)
        return cls(torch.cat([before, asked]), at, [at + token - tokens[0] for token in tokens])


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
