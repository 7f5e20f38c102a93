"""Which queries choose the tokens of a text: those that stand right before them.

A forward is not always one token. A long prompt comes in chunks, which choose nothing; drafted
tokens are checked together, and those that are rejected come again. A query's place in the text
tells all of this: the one at place p chooses token p + 1, and of several at one place the last.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from emt.errors import MemoryUseError
from emt.passage import Step


@dataclass(eq=False)
class GeneratedText:
    """What one `generate()` call writes after its prompts.

    Attributes:
        token_ids: (N, T) int64 on the CPU, the new tokens of the sequences that it returned; None
            while it runs, or if nobody knows.
        beam_indices: (N, T) int64 on the CPU, the batch row that each of them came from; None if
            it did not return them.
        num_chosen: for how many of them, counted from the first, a forward has chosen one.
    """

    token_ids: Tensor | None = None
    beam_indices: Tensor | None = None
    num_chosen: int = 0

    @property
    def num_tokens(self) -> int | None:
        """How many tokens it returned; None while it runs, or if nobody knows."""
        return None if self.token_ids is None else self.token_ids.shape[1]

    def sequence(self, row: int, batch: int, beams: Sequence[int] | None) -> list[int] | None:
        """Return the new tokens of one of the sequences; None if it cannot be told which.

        Args:
            row: of the batch, where there are no beams.
            batch: how many rows the forwards had.
            beams: the batch row that each token came from, where there are. Sequences that came
                the same way may differ in their last tokens, which are -1 then: not known.
        """
        if self.token_ids is None:
            return None
        if beams is None:
            is_row = self.beam_indices is None and len(self.token_ids) == batch
            return self.token_ids[row].tolist() if is_row else None
        if self.beam_indices is None or self.beam_indices.shape[1] < len(beams):
            return None
        same = self.token_ids[(self.beam_indices[:, : len(beams)] == torch.tensor(beams)).all(1)]
        if not len(same):
            return None
        return torch.where((same == same[0]).all(0), same[0], -1).tolist()

    def returned(self, token_ids: Tensor, beam_indices: Tensor | None) -> None:
        """Keep what the call returned: new tokens, and where there are beams, theirs."""
        self.token_ids = token_ids.to("cpu", copy=True)
        self.beam_indices = None if beam_indices is None else beam_indices.to("cpu", copy=True)


@dataclass(frozen=True, eq=False)
class ChosenTokens:
    """The tokens that the last queries of one forward choose.

    Attributes:
        text: that they are part of; None for a forward by hand, which chooses a text of one token.
        first: the number of the first of them in the text, from 0.
        num_tokens: how many queries choose one; 0 for a chunk of a prompt.
    """

    text: GeneratedText | None = None
    first: int = 0
    num_tokens: int = 1


class ChoosingQuery(NamedTuple):
    """The query that chose a generated token.

    Attributes:
        step: what the queries of its forward retrieved.
        query: its number among those of the step, from the end: -1 is the last.
        text: that the token is part of; None for a forward by hand.
        number: the token's number in the text.
    """

    step: Step
    query: int
    text: GeneratedText | None
    number: int


def choosing_queries(forwards: Mapping[ChosenTokens, Step]) -> list[ChoosingQuery]:
    """Return the query that chose each token of the texts that were generated, in order.

    A token for which nothing was recorded has an empty step.

    Raises:
        MemoryUseError: it cannot be told.
    """
    chosen: list[ChoosingQuery] = []
    for text, parts in _by_text(forwards):
        by_token = {
            tokens.first + number: (step, number - tokens.num_tokens)
            for tokens, step in parts
            for number in range(tokens.num_tokens)
        }
        if text is None or text.num_tokens is None:
            num_tokens = max(by_token, default=-1) + 1
        else:
            num_tokens = text.num_tokens
            _check_told(text, num_tokens, (step for _, step in parts))
        chosen += (
            ChoosingQuery(*by_token.get(number, ({}, -1)), text, number)
            for number in range(num_tokens)
        )
    return chosen


def _by_text(
    forwards: Mapping[ChosenTokens, Step],
) -> Iterable[tuple[GeneratedText | None, list[tuple[ChosenTokens, Step]]]]:
    """Group forwards by their text; each one by hand is a text of its own."""
    texts: dict[object, list[tuple[ChosenTokens, Step]]] = {}
    for tokens, step in forwards.items():
        texts.setdefault(tokens.text or tokens, []).append((tokens, step))
    return [(parts[0][0].text, parts) for parts in texts.values()]


def _check_told(text: GeneratedText, num_tokens: int, steps: Iterable[Step]) -> None:
    batches = sorted({len(layer.ids) for step in steps for layer in step.values()})
    if text.num_chosen >= num_tokens and len(batches) <= 1:
        return
    got = (
        f"batches of {batches[0]} and {batches[-1]} sequences"
        if len(batches) > 1
        else f"only {text.num_chosen}"
    )
    raise MemoryUseError(
        "citations need one forward, or a forward of drafts, in one cache for each of the "
        f"{num_tokens} generated tokens; got {got}. Which query chose a token cannot be told. "
        "Generate without custom_generate."
    )
