"""Rank the heads of a model by how well they find the passage that answers a question.

A few texts are read, and each head is tried alone. The best few heads make the profile, from
different parts of the model: heads of neighbouring layers find much the same.

Heads are ranked by how far the evidence at the answer stands above that of everywhere else, and not
by how often it is the largest: so a few dozen questions tell apart heads that are all often right.

Source: Wu et al., Retrieval Head (arXiv 2404.15574); choosing them by questions and answers, and by
the share of the right place, as in Zhang et al., QRHead (arXiv 2506.09944).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from emt.errors import ConfigError
from emt.profiles.built_in_examples import built_in_examples
from emt.profiles.examples import Example
from emt.profiles.trial import DISTANCE, MAX_CHARACTERS, Head, HeadReader, Trial
from emt.routing.head_profile import HeadProfile, ProfiledHead

MAX_BUILT_IN = 6_000  # tokens of the built-in texts and questions that are read
_MAX_HEADS = 5
_COMPARED = 8  # heads of each half of the questions
_MIN_SHARE = 0.25  # of the best head's deviations
_PARTS = 16  # two heads are a sixteenth of all layers apart: closer ones find much the same


@dataclass(frozen=True)
class HeadScore:
    """How well one head does alone.

    Attributes:
        deviations: how far the evidence at the answer stands above that of all other places, in
            standard deviations of these, on average.
        hit_rate: share of the questions whose passage it ranks first.
    """

    deviations: float
    hit_rate: float


@dataclass(frozen=True)
class Ranked:
    """How well each head does.

    Attributes:
        profile: of the best heads.
        scores: (layer, head) -> its score, most deviations first.
        agreement: share of the best 8 heads on one half of the questions that are among the best 8
            on the other half, too.
        hit_rate: of the chosen heads together.
        num_questions: how many questions were tried.
        num_rows: how many rows the texts have.
    """

    profile: HeadProfile
    scores: dict[Head, HeadScore]
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
        on_tokens: Callable[[int, int], object] | None = None,
    ) -> Ranked:
        """Try each head with questions, and choose the best.

        Args:
            examples: questions about texts; of each text, the first 8,000 characters are read.
            name: of the model, for people, and `source` of the questions.
            num_questions: how many are tried at most, about at most `num_texts` texts.
            seed: of the choice among questions and texts.
            on_tokens: told how many tokens were read, and how many will be.

        Raises:
            ConfigError: there are too few questions, no head finds anything, or no layer sees the
                whole context.
            MemoryUseError: the model is gone.
        """
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
        trial = Trial.read(self, examples, on_tokens or (lambda num_read, total: None))
        deviations: dict[Head, Tensor] = {}
        scores: dict[Head, HeadScore] = {}
        for head in trial.heads:
            deviations[head], is_first = trial.deviations(trial.evidence([head]))
            scores[head] = HeadScore(float(deviations[head].mean()), float(is_first.float().mean()))
        best = _best({head: score.deviations for head, score in scores.items()})
        heads = choose_heads(best, max(self.model.layout.layers) + 1)
        if not heads:
            raise ConfigError(
                f"no head found the passage of any of {len(examples)} questions. Name other data."
            )
        profile = HeadProfile(
            model=name,
            sketch=self.model.sketch,
            heads=tuple(ProfiledHead(*head, scores[head].hit_rate) for head in heads),
            means=torch.stack([trial.means[layer][head] for layer, head in heads]),
            distance=DISTANCE,
            source=source,
        )
        _, is_first = trial.deviations(trial.evidence(heads))
        return Ranked(
            profile,
            dict(sorted(scores.items(), key=lambda item: -item[1].deviations)),
            _agreement(deviations),
            float(is_first.float().mean()),
            len(examples),
            len(trial.is_sink),
        )

    def rank_built_in(
        self, *, name: str, on_tokens: Callable[[int, int], object] | None = None
    ) -> Ranked:
        """Try each head with the texts and questions that come with emt, as `rank`.

        At most 6,000 tokens are read.
        """

        def num_tokens(text: str, questions: list[str]) -> int:
            prompts = [self.prompt(question)[0] for question in questions]
            return len(self.tokenize(text)[0]) + sum(map(len, prompts))

        examples = built_in_examples(num_tokens, MAX_BUILT_IN)
        return self.rank(examples, name=name, source="texts of emt", on_tokens=on_tokens)


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


def _best(deviations: Mapping[Head, float]) -> list[Head]:
    """Return the heads that do well, best first."""
    threshold = _MIN_SHARE * max(deviations.values())
    order = sorted(deviations, key=lambda head: (-deviations[head], head))
    return [head for head in order if deviations[head] > 0 and deviations[head] >= threshold]


def _agreement(deviations: Mapping[Head, Tensor]) -> float:
    """Return how many of the best heads two halves of the questions share, 0 to 1."""
    first, second = (
        _best({head: float(each[half::2].mean()) for head, each in deviations.items()})[:_COMPARED]
        for half in (0, 1)
    )
    return len(set(first) & set(second)) / max(min(len(first), len(second)), 1)
