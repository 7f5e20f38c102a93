"""Candidates: the places of a memory that a question may be about, as each voice ranks them."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from emt.model.attached import AttachedModel
from emt.routing.evidence import Hits, Window, best_windows
from emt.routing.fusion import evidence_of_runs, fused_scores
from emt.routing.runs import Runs
from emt.routing.values import ValueIndex
from emt.routing.words import WordIndex
from memory_backends import MemoryBackend, Scope
from memory_backends.layout import Float32Array


@dataclass(frozen=True)
class Candidates:
    """Windows, best first.

    Attributes:
        fused: by what all voices say together.
        of_voices: voice ("words", "values", "heads") -> its own ranking.
    """

    fused: list[Window] = field(default_factory=list)
    of_voices: dict[str, list[Window]] = field(default_factory=dict)


class CandidateSearch:
    """Finds candidates by words, by values, and by what heads retrieved; threads may share it.

    Args:
        model: the attached model.
        tokenizer: None leaves out the words.
    """

    def __init__(self, model: AttachedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self._tokenizer = tokenizer
        self._words = WordIndex(tokenizer)
        self._values = ValueIndex(model)

    def candidates(
        self,
        question: Tensor,
        backend: MemoryBackend,
        count: int,
        *,
        min_distance: int,
        hits: Hits | None = None,
        scope: Scope | None = None,
    ) -> Candidates:
        """Find the places that a question may be about.

        Args:
            question: (T,) int64, the tokens that ask, without a chat template.
            backend: where the memories are.
            count: of windows in each ranking, at most.
            min_distance: rows that peaks in one document are apart, at least.
            hits: what the model's heads retrieved for the question in the scope; None leaves them
                out.
            scope: the rows that may be found; None for all.
        """
        voices: dict[str, tuple[Runs, Float32Array]] = {}
        if self._tokenizer is not None:
            text = str(self._tokenizer.decode(question.tolist(), skip_special_tokens=True))
            voices["words"] = self._words.scores(text, backend)
        voices["values"] = self._values.scores(question, backend)
        if hits is not None:
            runs, _ = voices["values"]
            voices["heads"] = runs, evidence_of_runs(hits, runs)
        # Runs elsewhere may all be better: what is usual inside of the scope counts.
        voices = {
            name: (runs, runs.inside(scores, scope)) for name, (runs, scores) in voices.items()
        }
        of_voices = {
            name: runs.windows(scores, count, min_distance=min_distance)
            for name, (runs, scores) in voices.items()
        }
        if hits is not None:
            of_voices["heads"] = best_windows(hits, count, min_distance=min_distance)
        runs, scores = fused_scores(list(voices.values()))
        fused = runs.windows(scores, count, min_distance=min_distance)
        return Candidates(fused, of_voices)
