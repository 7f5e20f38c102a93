"""`Router`: from a prompt to the passages of a memory that it is about."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from emt.config import MemoryConfig
from emt.model.attached import AttachedModel
from emt.passage import Passage, Routed
from emt.routing.choosing import Budget, choose_passages
from emt.routing.evidence import Window, best_windows
from emt.routing.fusion import fuse_rankings
from emt.routing.head_profile import HeadProfile
from emt.routing.head_search import HeadSearch
from emt.routing.judging import Judge, judged
from emt.routing.links import LinkIndex
from emt.routing.question import question_of
from emt.routing.together import Follower, together
from emt.routing.words import WordIndex
from memory_backends import MemoryBackend, Scope

_MAX_WINDOWS = 8  # of each ranking
_MAX_GENERATED = 32  # generated tokens that have queries, beside those of the question


class Router:
    """Finds passages by a model's own retrieval heads, and by words.

    Args:
        model: the attached model.
        profile: its retrieval heads; None to route by words alone.
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
        self._heads = None if profile is None else HeadSearch(model, profile)
        self._tokenizer = tokenizer
        self._words = WordIndex(tokenizer)
        self._links = LinkIndex()

    def heads(self, config: MemoryConfig) -> HeadSearch | None:
        """Return what searches with the retrieval heads; None if words alone find passages."""
        return None if config.routing == "words" else self._heads

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
        num_prompt = len(token_ids) - num_generated
        question = question_of(token_ids[:num_prompt], self._tokenizer)
        if num_rows < 1 or question.first == question.stop or not backend.num_searchable(scope):
            return Routed(question, (), 0.0)
        budget = Budget(num_rows, min(config.max_passages, num_rows))
        tokens = list(range(question.first, question.stop))
        tokens += range(max(num_prompt, len(token_ids) - _MAX_GENERATED), len(token_ids))
        windows, score = self._found(token_ids, tokens, backend, config, budget, scope)
        gain, num_needed = None, budget.num_passages
        if judge is not None and windows:
            num_rows = budget.num_rows // budget.num_passages
            count = config.candidates

            gains: dict[Passage, Tensor] = {}

            def ask_back(passages: Sequence[Passage]) -> Tensor:
                log_probs = judge(token_ids, question.at, tokens, passages, backend)
                gains.update(zip(passages, log_probs[:-1] - log_probs[-1], strict=True))
                return log_probs

            best, gain = judged(windows[:count], ask_back, backend, num_rows)
            least = config.relevance
            if gain is not None and least is not None and gain < least:
                return Routed(question, (), score, gain)
            if gain is not None and budget.num_passages > 1:

                def ask_pairs(passages: Sequence[Passage], beside: Sequence[Passage]) -> Tensor:
                    return judge(token_ids, question.at, tokens, passages, backend, beside=beside)

                def find(inside: Scope) -> list[Window]:
                    return self._found(token_ids, tokens, backend, config, budget, inside)[0]

                text = self._text(token_ids[tokens])
                follower = Follower(
                    text, self._links, self._tokenizer, backend, scope, find, ask_pairs
                )
                best, num_needed = together(best, gains, budget, follower)
            windows = [*best, *windows[count:]]
        passages = choose_passages(windows, backend, budget, num_needed=num_needed)
        return Routed(question, tuple(passages), score, gain)

    def _found(
        self,
        token_ids: Tensor,
        tokens: Sequence[int],
        backend: MemoryBackend,
        config: MemoryConfig,
        budget: Budget,
        scope: Scope | None,
    ) -> tuple[list[Window], float]:
        """Return the windows that heads and words find, best first, and the best share."""
        rankings, heads = [], self.heads(config)
        distance = budget.min_distance
        if heads is not None:
            hits = heads.hits(token_ids, tokens, backend, scope=scope)
            rankings.append(best_windows(hits, _MAX_WINDOWS, min_distance=distance))
        if heads is None or config.routing == "both":
            rankings.append(self._by_words(token_ids[tokens], backend, distance, scope))
        score = rankings[0][0].score if rankings[0] else 0.0
        if len(rankings) == 1:
            return rankings[0], score
        return fuse_rankings(rankings, _MAX_WINDOWS, min_distance=distance), score

    def _by_words(
        self, token_ids: Tensor, backend: MemoryBackend, min_distance: int, scope: Scope | None
    ) -> list[Window]:
        if self._tokenizer is None:
            return []
        text = self._text(token_ids)
        return self._words.windows(
            text, backend, _MAX_WINDOWS, min_distance=min_distance, scope=scope
        )

    def _text(self, token_ids: Tensor) -> str:
        tokenizer = self._tokenizer
        return (
            ""
            if tokenizer is None
            else str(tokenizer.decode(token_ids.tolist(), skip_special_tokens=True))
        )
