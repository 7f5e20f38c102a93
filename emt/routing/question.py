"""Find the question in a prompt: the user's last message in a chat, or the end of a plain text."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from emt.model.chat import last_message
from emt.model.forward import NewTokens
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
    found = None if tokenizer is None else last_message(ids, tokenizer)
    at, stop = found or (0, len(ids))
    return Question(at, max(at, stop - _LONGEST), stop)


def has_message(token_ids: Tensor, tokenizer: PreTrainedTokenizerBase | None) -> bool:
    """Tell whether tokens (T,) have a message of the user, as the chat template marks it."""
    return tokenizer is not None and last_message(token_ids.tolist(), tokenizer) is not None


def unpadded(token_ids: Tensor, new: NewTokens) -> list[Tensor]:
    """Return the tokens of each prompt of a batch, (B, T), without padding.

    Args:
        token_ids: (B, T) int64, all tokens of the prompts, or the first T of them.
        new: what the forward says of them.
    """
    if new.padding is not None:
        kept = new.padding[:, : token_ids.shape[1]].to(token_ids.device) != 0
        return [row[mine] for row, mine in zip(token_ids, kept, strict=True)]
    # Padding stands on the left; the place of the last token tells how many there are.
    last = new.index[:, -1].expand(len(token_ids)).tolist()
    padded = [new.num_tokens - 1 - place for place in last]
    return [row[first:] for row, first in zip(token_ids, padded, strict=True)]


def same_runs(prompts: list[Tensor]) -> int:
    """Return how many equal prompts in a row each one has: beams and returned sequences."""
    for times in range(len(prompts), 0, -1):
        if len(prompts) % times:
            continue
        groups = [prompts[i : i + times] for i in range(0, len(prompts), times)]
        if all(torch.equal(group[0], other) for group in groups for other in group[1:]):
            return times
    return 1
