"""The next token of each row of a batch, by that row's own temperature, top_p and seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessor


@dataclass(frozen=True)
class Sampling:
    """How one row's tokens are chosen.

    Attributes:
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_p: sample from the fewest tokens with this probability together.
        seed: the same samples the same; None for another one each time.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


class Sampler(LogitsProcessor):
    """Leaves each row one token, so that a greedy `generate` serves rows that sample differently.

    A row draws from a generator of its own, on the CPU: what it draws does not depend on the other
    rows of its batch, nor on the device.

    Args:
        rows: how the tokens of each row are chosen.
    """

    def __init__(self, rows: Sequence[Sampling]) -> None:
        self._rows = rows
        self._generators = [_generator(row.seed) for row in rows]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return (B, V) scores in which every row that samples has one token above -inf."""
        scores = scores.clone()
        for number, (row, generator) in enumerate(zip(self._rows, self._generators, strict=True)):
            if row.temperature > 0:
                token_id = sampled(scores[number], row.temperature, row.top_p, generator)
                scores[number] = -torch.inf
                scores[number, token_id] = 0.0
        return scores


def sampled(scores: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """Return a token id that is drawn by its probability.

    Args:
        scores: (V,) logits.
        temperature: above 0.
        top_p: above 0 and up to 1.
        generator: on the CPU.
    """
    logits = scores.to("cpu", torch.float64)
    logits = (logits - logits.max()) / temperature  # no infinities at the smallest temperatures
    probabilities, token_ids = logits.softmax(-1).sort(descending=True, stable=True)
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities.where((before < top_p), 0.0)
    return int(token_ids[torch.multinomial(probabilities, 1, generator=generator)])


def _generator(seed: int | None) -> torch.Generator:
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator
