"""Rank the heads of a model by how often they find the passage that answers a question.

A few texts are read, and each head is tried alone. The best few heads make the profile, from
different parts of the model: heads of neighbouring layers find much the same.

Source: Wu et al., Retrieval Head (arXiv 2404.15574); choosing them by questions and answers, as in
Zhang et al., QRHead (arXiv 2506.09944).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import numpy as np

from emt.errors import ConfigError
from emt.profiles.examples import Example, make_examples
from emt.profiles.stored_text import stored_texts
from emt.profiles.trial import DISTANCE, MAX_CHARACTERS, Head, HeadReader, Trial
from emt.routing.head_profile import HeadProfile, ProfiledHead
from memory_backends import MemoryBackend

_MAX_HEADS = 5
_COMPARED = 8  # heads of each half of the questions
_MIN_SHARE = 0.25  # of the best head's hit rate
_PARTS = 16  # two heads are a sixteenth of all layers apart: closer ones find much the same


@dataclass(frozen=True)
class Ranked:
    """How well each head does.

    Attributes:
        profile: of the best heads.
        hit_rates: (layer, head) -> share of the questions whose passage it ranks first, best first.
        agreement: share of the best 8 heads on one half of the questions that are among the best 8
            on the other half, too.
        hit_rate: of the chosen heads together.
        num_questions: how many questions were tried.
        num_rows: how many rows the texts have.
    """

    profile: HeadProfile
    hit_rates: dict[Head, float]
    agreement: float
    hit_rate: float
    num_questions: int
    num_rows: int


class HeadRanking(HeadReader):
    """Ranks the heads of one model; nothing is written to its memory."""

    def rank(
        self,
        examples: Sequence[Example],
        *,
        name: str,
        source: str = "",
        num_questions: int = 128,
        num_texts: int = 16,
        seed: int = 0,
        on_step: Callable[[str], object] | None = None,
    ) -> Ranked:
        """Try each head with questions, and choose the best.

        Args:
            examples: questions about texts; of each text, the first 8,000 characters are read.
            name: of the model, for people, and `source` of the questions.
            num_questions: how many are tried at most, about at most `num_texts` texts.
            seed: of the choice among questions and texts.
            on_step: told what is being done.

        Raises:
            ConfigError: there are too few questions, no head finds anything, or no layer sees the
                whole context.
            MemoryUseError: the model is gone.
        """
        on_step = on_step or (lambda step: None)
        if not self.model.full_attention_layers:
            raise ConfigError(
                "a head profile needs layers that see the whole context; this model has none."
            )
        examples = _sample(examples, num_questions, num_texts, random.Random(seed))
        if len(examples) < 4 or len({example.document for example in examples}) < 2:
            raise ConfigError(
                "a profile needs at least 4 questions about 2 texts, with answers in the first "
                f"{MAX_CHARACTERS} characters; got {len(examples)}. Name more data."
            )
        trial = Trial.read(self, examples, on_step)
        right: dict[Head, list[bool]] = {}
        for layer in trial.keys:
            on_step(f"layer {layer}")
            for head in range(trial.num_heads(layer)):
                right[layer, head] = trial.are_right([(layer, head)])
        hit_rates = _hit_rates(right)
        heads = choose_heads(_best(hit_rates), max(self.model.layout.layers) + 1)
        if not heads:
            raise ConfigError(
                f"no head found the passage of any of {len(examples)} questions. Name other data."
            )
        profile = HeadProfile(
            model=name,
            sketch=self.model.sketch,
            heads=tuple(ProfiledHead(*head, hit_rates[head]) for head in heads),
            means=torch.stack([trial.means[layer][head] for layer, head in heads]),
            distance=DISTANCE,
            source=source,
        )
        return Ranked(
            profile,
            dict(sorted(hit_rates.items(), key=lambda item: -item[1])),
            _agreement(right),
            float(np.mean(trial.are_right(heads))),
            len(examples),
            len(trial.is_sink),
        )

    def rank_stored_text(
        self, backend: MemoryBackend, *, name: str, on_step: Callable[[str], object] | None = None
    ) -> Ranked:
        """Try each head with questions made from the text of a memory's documents, as `rank`."""
        examples = make_examples(stored_texts(backend, self.tokenizer))
        return self.rank(examples, name=name, source="stored text", on_step=on_step)


def choose_heads(heads: Sequence[Head], num_layers: int) -> list[Head]:
    """Return a few of the heads, which are best first.

    Two are of the same layer or of close ones only if there are no others.
    """
    min_distance = math.ceil(num_layers / _PARTS)
    chosen: list[Head] = []
    for head in heads:
        if all(abs(head[0] - other[0]) >= min_distance for other in chosen):
            chosen.append(head)
    chosen += [head for head in heads if head not in chosen]
    return sorted(chosen[:_MAX_HEADS], key=heads.index)


def _sample(
    examples: Sequence[Example], num_questions: int, num_texts: int, rng: random.Random
) -> list[Example]:
    """Choose questions at random, as many about each text as about any other."""
    by_text: dict[str, list[Example]] = {}
    for example in examples:
        if example.end <= MAX_CHARACTERS:
            by_text.setdefault(example.document, []).append(example)
    texts = rng.sample(sorted(by_text), min(num_texts, len(by_text)))
    per_text = -(-num_questions // max(len(texts), 1))
    sample = [
        example
        for text in texts
        for example in rng.sample(by_text[text], min(per_text, len(by_text[text])))
    ]
    return sample[:num_questions]


def _hit_rates(right: Mapping[Head, Sequence[bool]]) -> dict[Head, float]:
    return {head: float(np.mean(of_head)) for head, of_head in right.items()}


def _best(hit_rates: Mapping[Head, float]) -> list[Head]:
    """Return the heads that do well, best first."""
    threshold = _MIN_SHARE * max(hit_rates.values())
    order = sorted(hit_rates, key=lambda head: (-hit_rates[head], head))
    return [head for head in order if hit_rates[head] > 0 and hit_rates[head] >= threshold]


def _agreement(right: Mapping[Head, Sequence[bool]]) -> float:
    """Return how many of the best heads two halves of the questions share, 0 to 1."""
    first, second = (
        _best(_hit_rates({head: of_head[half::2] for head, of_head in right.items()}))[:_COMPARED]
        for half in (0, 1)
    )
    return len(set(first) & set(second)) / max(min(len(first), len(second)), 1)
