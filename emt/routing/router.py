"""`Router`: from a prompt to the passages of a memory that it is about."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from emt.config import MemoryConfig
from emt.model.attached import AttachedModel
from emt.passage import Passage, Routed
from emt.routing.candidates import CandidateSearch
from emt.routing.choosing import Budget, choose_passages
from emt.routing.evidence import Window
from emt.routing.fusion import Place, fuse_rankings
from emt.routing.head_profile import HeadProfile
from emt.routing.head_search import HeadSearch
from emt.routing.judging import SURE, Judge, gains_of, judged
from emt.routing.links import LinkIndex
from emt.routing.neutral import gain_over_neutral
from emt.routing.question import Asking, question_of
from emt.routing.together import Follower, together
from memory_backends import MemoryBackend, Scope

_MAX_WINDOWS = 10  # of each ranking


@dataclass(frozen=True)
class _Asked:
    """A prompt, and the memory that it is asked of.

    Attributes:
        asking: what is read of it.
        scope: what is known of the memory; None for all of it.
        voices: what finds places.
        gains: by how much each passage that was judged makes each token that asks likelier.
    """

    asking: Asking
    backend: MemoryBackend
    scope: Scope | None
    budget: Budget
    candidates: CandidateSearch
    voices: frozenset[str]
    judge: Judge | None
    gains: dict[Passage, Tensor] = field(default_factory=dict)

    def places(self, among: Scope | None = None) -> list[Place]:
        """Return the places that the voices find, best first, among all rows or some."""
        if not self.backend.num_searchable(self.scope if among is None else among):
            return []
        rankings = self.candidates.rankings(
            self.voices,
            self.asking,
            self.backend,
            _MAX_WINDOWS,
            min_distance=self.budget.min_distance,
            scope=self.scope,
            among=among,
        )
        return fuse_rankings(list(rankings.values()), min_distance=self.budget.min_distance)

    def windows(self, among: Scope) -> list[Window]:
        """Return the windows of the places among some rows."""
        return [place.window for place in self.places(among)]

    def ask_back(
        self, passages: Sequence[Passage], beside: Sequence[Passage] | None = None
    ) -> Tensor:
        """Return how likely the question is after passages, as the judge."""
        assert self.judge is not None
        log_probs = self.judge(self.asking, passages, self.backend, beside=beside)
        if beside is None:
            self.gains.update(zip(passages, gains_of(log_probs), strict=True))
        return log_probs

    def gain_over_neutral(self) -> float:
        """Return by how much the passages judged so far help more than neutral ones, in nats."""

        def gains_after(passages: Sequence[Passage]) -> Tensor:
            assert self.judge is not None
            return gains_of(self.judge(self.asking, passages, self.backend))

        gains = torch.stack(list(self.gains.values()))
        return gain_over_neutral(gains, list(self.gains), gains_after, self.backend, self.scope)


def voices_in(config: MemoryConfig, backend: MemoryBackend) -> frozenset[str]:
    """Return what finds passages in a memory: values do not where none are kept."""
    return config.voices if backend.keeps_rows else config.voices - {"values"}


class Router:
    """Finds passages by words, by values and by a model's own retrieval heads.

    Args:
        model: the attached model.
        profile: its retrieval heads; None to find passages without them.
        tokenizer: to find the question in a chat template, and for words; None for neither.

    Attributes:
        profile: as the argument.
    """

    def __init__(
        self,
        model: AttachedModel,
        profile: HeadProfile | None,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> None:
        self.profile = profile
        self._tokenizer = tokenizer
        heads = None if profile is None else HeadSearch(model, profile)
        self._candidates = CandidateSearch(model, tokenizer, heads)
        self._links = LinkIndex()

    def keep(self, backend: MemoryBackend) -> None:
        """Keep in a memory's store what its next process would have to compute anew."""
        self._candidates.keep(backend)

    def route(
        self,
        token_ids: Tensor,
        backend: MemoryBackend,
        config: MemoryConfig,
        *,
        num_rows: int | None = None,
        num_generated: int = 0,
        scope: Scope | None = None,
        judge: Judge | None = None,
    ) -> Routed:
        """Find the passages that a prompt is about.

        Args:
            token_ids: (T,) int64, the prompt, and what was generated since.
            backend: where the memories are.
            config: says what finds passages (`routing`), how many (`max_passages`), and how
                relevant the prompt must be (`relevance`).
            num_rows: instead of `passage_rows`; 0 for no passages, and no search.
            num_generated: how many of the T tokens were generated. The last 32 of them search, too.
            scope: the rows that may be found; None for all.
            judge: asks the model how likely the question is after passages; None if the order in
                which they were found is right, and every prompt is relevant.
        """
        num_rows = config.passage_rows if num_rows is None else num_rows
        question = question_of(token_ids[: len(token_ids) - num_generated], self._tokenizer)
        if num_rows < 1 or question.first == question.stop:
            return Routed(question, (), 0.0)
        budget = Budget(num_rows, min(config.max_passages, num_rows))
        asking = Asking.of(token_ids, question, num_generated)
        voices = voices_in(config, backend)
        asked = _Asked(asking, backend, scope, budget, self._candidates, voices, judge)
        places = asked.places()
        windows = [place.window for place in places]
        score = max((window.score for window in windows), default=0.0)
        gain, num_needed = None, budget.num_passages
        if judge is not None and places:
            share, count = num_rows // budget.num_passages, config.candidates
            best, num_likely, gain = judged(places[:count], asked.ask_back, backend, share)
            least = -math.inf if config.relevance is None else config.relevance
            if gain is not None and least <= gain < SURE:
                gain = asked.gain_over_neutral()
            if gain is not None and gain < least:
                return Routed(question, (), score, gain)
            if gain is None:
                best += windows[count:]
            elif budget.num_passages > 1:
                best, num_needed = together(
                    best, num_likely, asked.gains, budget, self._follower(asked)
                )
                if len(best) == 1:
                    budget = Budget(num_rows // 2, 1)
            windows = best
        passages = choose_passages(windows, backend, budget, num_needed=num_needed)
        return Routed(question, tuple(passages), score, gain)

    def _follower(self, asked: _Asked) -> Follower:
        tokenizer, text = self._tokenizer, ""
        if tokenizer is not None:
            ids = asked.asking.token_ids[asked.asking.tokens].tolist()
            text = str(tokenizer.decode(ids, skip_special_tokens=True))
        return Follower(
            text, self._links, tokenizer, asked.backend, asked.scope, asked.windows, asked.ask_back
        )
