"""Candidates: the places of a memory that a question may be about, as each voice ranks them."""

from __future__ import annotations

from collections.abc import Collection

from transformers import PreTrainedTokenizerBase

from emt.model.attached import AttachedModel
from emt.routing.evidence import Window, best_windows
from emt.routing.head_search import HeadSearch
from emt.routing.question import Asking
from emt.routing.values import ValueIndex
from emt.routing.words import WordIndex
from memory_backends import MemoryBackend, Scope


class CandidateSearch:
    """Finds candidates by words, by values and by retrieval heads; threads may share it.

    Args:
        model: the attached model.
        tokenizer: None leaves out the words.
        heads: what searches with the retrieval heads; None leaves them out.
    """

    def __init__(
        self,
        model: AttachedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        heads: HeadSearch | None,
    ) -> None:
        self._tokenizer = tokenizer
        self._words = WordIndex(tokenizer)
        self._values = ValueIndex(model)
        self._heads = heads

    def keep(self, backend: MemoryBackend) -> None:
        """Keep in a memory's store what its next process would have to compute anew."""
        self._values.keep(backend)

    def rankings(
        self,
        voices: Collection[str],
        asking: Asking,
        backend: MemoryBackend,
        count: int,
        *,
        min_distance: int,
        scope: Scope | None = None,
        among: Scope | None = None,
    ) -> dict[str, list[Window]]:
        """Find the places that a question may be about.

        Args:
            voices: some of "words", "values" and "heads".
            asking: what is read of the prompt.
            backend: where the memories are.
            count: of windows in each ranking, at most.
            min_distance: rows that peaks in one document are apart, at least.
            scope: what is known of the memory; None for all of it.
            among: the rows of it that may be found; None for all.

        Returns:
            The ranking of each voice, best first.
        """
        question, scores = asking.token_ids[asking.tokens], {}
        if "words" in voices and self._tokenizer is not None:
            text = str(self._tokenizer.decode(question.tolist(), skip_special_tokens=True))
            scores["words"] = self._words.scores(text, backend, scope)
        if "values" in voices:
            scores["values"] = self._values.scores(question, backend, scope)
        rankings = {
            name: runs.windows(of_runs, count, min_distance=min_distance, scope=among)
            for name, (runs, of_runs) in scores.items()
        }
        if "heads" in voices and self._heads is not None:
            found = scope if among is None else among
            hits = self._heads.hits(asking.token_ids, asking.tokens, backend, scope=found)
            rankings["heads"] = best_windows(hits, count, min_distance=min_distance)
        return rankings
