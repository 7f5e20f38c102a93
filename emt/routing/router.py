"""`Router`: from a prompt to the passages of a memory that it is about."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from emt.config import MemoryConfig
from emt.model.attached import AttachedModel
from emt.passage import Passage, Routed
from emt.routing.candidates import CandidateSearch
from emt.routing.choosing import Budget, choose_passages
from emt.routing.fusion import fuse_rankings
from emt.routing.head_profile import HeadProfile
from emt.routing.head_search import HeadSearch
from emt.routing.judging import Judge, judged
from emt.routing.question import Asking, question_of
from memory_backends import MemoryBackend, Scope

_MAX_WINDOWS = 10  # of each ranking


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
        if num_rows < 1 or question.first == question.stop or not backend.num_searchable(scope):
            return Routed(question, (), 0.0)
        budget = Budget(num_rows, min(config.max_passages, num_rows))
        asking = Asking.of(token_ids, question, num_generated)
        rankings = self._candidates.rankings(
            config.voices,
            asking,
            backend,
            _MAX_WINDOWS,
            min_distance=budget.min_distance,
            scope=scope,
        )
        places = fuse_rankings(list(rankings.values()), min_distance=budget.min_distance)
        windows, gain = [place.window for place in places], None
        score = max((window.score for window in windows), default=0.0)
        if judge is not None and windows:
            count, num_rows = config.candidates, budget.num_rows // budget.num_passages

            def ask_back(passages: Sequence[Passage]) -> Tensor:
                return judge(asking, passages, backend)

            best, gain = judged(places[:count], ask_back, backend, num_rows)
            windows = [*best, *windows[count:]]
            least = config.relevance
            if gain is not None and least is not None and gain < least:
                return Routed(question, (), score, gain)
        passages = choose_passages(windows, backend, budget)
        return Routed(question, tuple(passages), score, gain)
