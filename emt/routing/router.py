"""`Router`: from a prompt to the passages of a memory that it is about."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

import torch
import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from emt.config import MemoryConfig
from emt.model.attached import AttachedModel
from emt.model.chat import prompt_ids
from emt.model.references import alive
from emt.passage import Routed
from emt.routing.choosing import Budget, choose_passages
from emt.routing.evidence import Hits, Window, best_windows
from emt.routing.fusion import fuse_rankings
from emt.routing.head_profile import HeadProfile
from emt.routing.probes import PROBES
from emt.routing.queries import unit_queries
from emt.routing.question import question_of
from emt.routing.relevance import Relevance, measure_relevance
from emt.routing.words import WordIndex
from memory_backends import MemoryBackend, Scope

TOPK = 64  # rows that each query retrieves
_MAX_WINDOWS = 8  # of each ranking
_MAX_GENERATED = 32  # generated tokens that have queries, beside those of the question
_logger = logging.getLogger(__name__)


class Router:
    """Finds passages by a model's own retrieval heads, and by words.

    Args:
        model: the attached model.
        profile: its retrieval heads.
        tokenizer: to find the question in a chat template, and for words; None for neither.
    """

    def __init__(
        self,
        model: AttachedModel,
        profile: HeadProfile,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> None:
        self.profile = profile
        self._model, self._tokenizer = model, tokenizer
        self._words: WordIndex | None = None
        self._lock = threading.Lock()

    @property
    def is_training(self) -> bool:
        """Whether the model is in training mode, and may find something else each time."""
        return alive(self._model.decoder, "route").training

    def route(
        self,
        token_ids: Tensor,
        backend: MemoryBackend,
        config: MemoryConfig,
        *,
        num_rows: int | None = None,
        num_generated: int = 0,
        scope: Scope | None = None,
        relevance: Relevance | None = None,
    ) -> Routed:
        """Find the passages that a prompt is about.

        Only the heads tell that nothing in a memory is relevant: words always find something.

        Args:
            token_ids: (T,) int64, the prompt, and what was generated since.
            backend: where the memories are.
            config: says what finds passages (`routing`), how many (`max_passages`), and how
                relevant the prompt must be (`relevance`).
            num_rows: instead of `passage_rows`; 0 for no passages, and no search.
            num_generated: how many of the T tokens were generated. The last 32 of them search, too.
            scope: the rows that may be found; None for all.
            relevance: of this memory, to compare the prompt with; None if every prompt is relevant.
        """
        num_rows = config.passage_rows if num_rows is None else num_rows
        num_prompt = len(token_ids) - num_generated
        question = question_of(token_ids[:num_prompt], self._tokenizer)
        if num_rows < 1 or question.first == question.stop or not backend.num_searchable(scope):
            return Routed(question, (), 0.0)
        budget = Budget(num_rows, min(config.max_passages, num_rows))
        min_distance = budget.min_distance
        tokens = list(range(question.first, question.stop))
        tokens += range(max(num_prompt, len(token_ids) - _MAX_GENERATED), len(token_ids))
        windows: list[Window] = []
        score, deviations = 0.0, None
        if config.routing != "words":
            hits = self.hits(token_ids, tokens, backend, scope=scope)
            windows = best_windows(hits, _MAX_WINDOWS, min_distance=min_distance)
            score = windows[0].score if windows else 0.0
            if relevance is not None:
                deviations = relevance.of_prompt(hits, score, len(tokens))
                if deviations < (config.relevance or 0.0):
                    return Routed(question, (), score, deviations)
        if config.routing != "heads":
            text, words = self._text_of(token_ids[tokens]), self._word_index(backend)
            by_words = words.windows(text, _MAX_WINDOWS, min_distance=min_distance, scope=scope)
            windows = fuse_rankings([windows, by_words], min_distance=min_distance)
        passages = choose_passages(windows, backend, budget)
        return Routed(question, tuple(passages), score, deviations)

    def measure_relevance(self, backend: MemoryBackend) -> Relevance | None:
        """Find out which scores prompts about nothing in particular have in a memory.

        Returns:
            None if they have too little evidence, or if there is no tokenizer to read them; or if
            the memory is so small that any query retrieves half of it, and evidence is all in one
            place whatever the prompt.
        """
        tokenizer, num_rows = self._tokenizer, backend.num_searchable()
        if tokenizer is None or num_rows < 2 * TOPK:
            return None
        _logger.info(
            "to tell which prompts are about this memory, %d that are not are routed in its %d "
            "rows. save() keeps the result in the store. To avoid it, set relevance to None, or "
            "mode to token.",
            len(PROBES),
            num_rows,
        )

        def route_probe(prompt: str) -> tuple[float, int]:
            token_ids = prompt_ids(tokenizer, prompt)
            question = question_of(token_ids, tokenizer)
            tokens = range(question.first, question.stop)
            if not tokens:
                return 0.0, 0
            windows = best_windows(self.hits(token_ids, tokens, backend), 1, min_distance=1)
            return windows[0].score if windows else 0.0, len(tokens)

        return measure_relevance(route_probe, num_rows)

    def hits(
        self,
        token_ids: Tensor,
        tokens: Sequence[int],
        backend: MemoryBackend,
        *,
        scope: Scope | None = None,
    ) -> Hits:
        """Search for each of some tokens in each of the profile's heads.

        Args:
            token_ids: (T,) int64, the prompt.
            tokens: which of the T tokens have queries, ascending.
            backend: where the memories are, of which only `scope` is searched.
        """
        profile, prompt = self.profile, token_ids[: tokens[-1] + 1]
        of_layers = unit_queries(self._model, prompt, profile.layers, distance=profile.distance)
        k = min(TOPK, backend.num_searchable(scope))
        ids, scores = [], []
        groups = profile.groups(self._model.query_heads, backend.layout)
        for (layer_idx, kv_head), group in groups.items():
            queries = torch.cat(
                [of_layers[layer_idx][head, tokens] - mean for head, mean in group]
            )  # (G' * T', D): G' profiled heads share the KV head
            lengths = queries.norm(dim=-1, keepdim=True).numpy()
            hits = backend.search(layer_idx, queries[None], k, heads=[kv_head], scope=scope)
            ids.append(hits.ids[0].cpu().numpy())
            scores.append(hits.scores[0].float().cpu().numpy() * lengths)
        return Hits.of_search(np.concatenate(ids), np.concatenate(scores))

    def _text_of(self, token_ids: Tensor) -> str:
        if self._tokenizer is None:
            return ""
        return str(self._tokenizer.decode(token_ids.tolist(), skip_special_tokens=True))

    def _word_index(self, backend: MemoryBackend) -> WordIndex:
        """Return the words of a memory, indexed again when documents came or went."""
        with self._lock:
            if self._words is None or not self._words.is_current(backend):
                self._words = WordIndex(backend, self._tokenizer)
            return self._words
