"""`Router`: from a prompt to the passages of a memory that it is about."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import numpy as np
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from emt.model.attached import living
from emt.model.chat import prompt_ids
from emt.model.positions import Angles
from emt.model.rope import Unrotation
from emt.passage import Passage, Routed, RoutedPassage, are_among
from emt.routing.choosing import fused, passages_around, without_gaps
from emt.routing.evidence import Hits, Window, windows_of
from emt.routing.head_profile import HeadProfile
from emt.routing.queries import unit_queries
from emt.routing.question import question_of
from emt.routing.relevance import PROBES, Relevance, best_by_chance, measured, runs_of
from emt.routing.words import Words
from memory_backends import MemoryBackend, Scope, StoredDocument

Routing = Literal["heads", "words", "both"]

TOPK = 64  # rows that each token finds, in each head
_CANDIDATES = 8
_SAID = 32  # generated tokens that ask beside the question
_logger = logging.getLogger(__name__)


class Router:
    """Finds passages by a model's own retrieval heads.

    Args:
        decoder: the model without its language-model head; it is not kept alive.
        profile: its heads.
        unrotations: layer -> how to bring its queries to position 0.
        angles: its cosines and sines.
        tokenizer: to find the question in a chat template, and for words.
    """

    def __init__(
        self,
        decoder: PreTrainedModel,
        profile: HeadProfile,
        unrotations: Mapping[int, Unrotation | None],
        angles: Angles,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> None:
        self.profile = profile
        self._decoder = weakref.ref(decoder)
        self._unrotations = unrotations
        self._angles = angles
        self._tokenizer = tokenizer
        self._words: tuple[MemoryBackend, int, Words] | None = None
        self._lock = threading.Lock()

    @property
    def is_training(self) -> bool:
        """Whether the model is in training mode, and may find something else each time."""
        return living(self._decoder, "route").training

    def route(
        self,
        token_ids: Tensor,
        backend: MemoryBackend,
        *,
        num_rows: int,
        num_passages: int,
        routing: Routing = "heads",
        scope: Scope | None = None,
        num_generated: int = 0,
        relevance: Relevance | None = None,
        least: float = 0.0,
    ) -> Routed:
        """Find the passages that a prompt is about.

        Only the heads tell that nothing in a memory is relevant: words always find something.

        Args:
            token_ids: (T,) int64, the prompt, and what was generated since.
            backend: where the memories are.
            num_rows: of all passages together, at most; 0 for no passages, and no search.
            num_passages: at most.
            routing: what tells: the heads, the words, or both.
            scope: the rows that may be found; None for all.
            num_generated: how many of the T tokens were generated. The last 32 of them ask, too.
            relevance: what other prompts find in this memory; None if every prompt is relevant.
            least: standard deviations above them from which a prompt is relevant.
        """
        num_prompt = len(token_ids) - num_generated
        question = question_of(token_ids[:num_prompt], self._tokenizer)
        if num_rows < 1 or question.first == question.stop or not backend.num_searchable(scope):
            return Routed(question, (), 0.0)
        num_passages = min(num_passages, num_rows)
        apart = max(num_rows // num_passages * 3 // 4, 1)
        asking = list(range(question.first, question.stop))
        asking += range(max(num_prompt, len(token_ids) - _SAID), len(token_ids))
        windows: list[Window] = []
        if routing != "words":
            hits = self.hits(token_ids, asking, backend, scope=scope)
            windows = windows_of(hits, _CANDIDATES, apart=apart)
        score = windows[0].share if windows else 0.0
        above = None
        if relevance is not None and routing != "words":
            above = _relevance_of(hits, score, len(asking), relevance)
            if above < least:
                return Routed(question, (), score, above)
        if routing != "heads":
            asked = self._text_of(token_ids[asking])
            named = self._words_of(backend).windows(asked, _CANDIDATES, apart=apart, scope=scope)
            windows = fused([windows, named], apart=apart)
        passages = _passages(windows, backend, num_rows, num_passages)
        return Routed(question, tuple(passages), score, above)

    def relevance(self, backend: MemoryBackend) -> Relevance | None:
        """Find out what prompts about nothing in particular find in a memory.

        Args:
            backend: where the memories are.

        Returns:
            None if they find too little, or if there is no tokenizer to read them; or if the memory
            is so small that any token finds half of it, and evidence is all in one place whatever
            is asked.
        """
        tokenizer = self._tokenizer
        if tokenizer is None or backend.num_searchable() < 2 * TOPK:
            return None

        _logger.info(
            "to tell which prompts are about this memory, %d that are not are routed in its %d "
            "rows. save() keeps the result in the store. To avoid it, set relevance to None, or "
            "mode to token.",
            len(PROBES),
            backend.num_searchable(),
        )

        def ask(prompt: str) -> tuple[float, int]:
            token_ids = prompt_ids(tokenizer, prompt)
            question = question_of(token_ids, tokenizer)
            asking = range(question.first, question.stop)
            if not asking:
                return 0.0, 0
            windows = windows_of(self.hits(token_ids, asking, backend), 1, apart=1)
            return windows[0].share if windows else 0.0, len(asking)

        return measured(ask, backend.num_searchable())

    def hits(
        self,
        token_ids: Tensor,
        asking: Sequence[int],
        backend: MemoryBackend,
        *,
        scope: Scope | None = None,
    ) -> Hits:
        """Search the profile's heads for each token that asks.

        Args:
            token_ids: (T,) int64, the prompt.
            asking: which of the T tokens ask, ascending.
            backend: where the memories are.
            scope: the rows that may be found; None for all.
        """
        profile = self.profile
        queries = unit_queries(
            living(self._decoder, "route"),
            token_ids[: asking[-1] + 1],
            profile.layers,
            unrotations=self._unrotations,
            angles=self._angles,
            distance=profile.distance,
        )
        ids, scores = [], []
        k = min(TOPK, backend.num_searchable(scope))
        for layer_idx in profile.layers:
            mine = [i for i, head in enumerate(profile.heads) if head.layer == layer_idx]
            num_heads = queries[layer_idx].shape[0]
            group = num_heads // backend.layout.layers[layer_idx].num_key_value_heads
            for kv_head in sorted({profile.heads[i].head // group for i in mine}):
                of_head = [i for i in mine if profile.heads[i].head // group == kv_head]
                asked = torch.cat(
                    [
                        queries[layer_idx][profile.heads[i].head, asking] - profile.means[i]
                        for i in of_head
                    ]
                )  # (G' * T, D)
                found = backend.search(layer_idx, asked[None], k, heads=[kv_head], scope=scope)
                length = asked.norm(dim=-1, keepdim=True).numpy()
                ids.append(found.ids[0].cpu().numpy())
                scores.append(found.scores[0].float().cpu().numpy() * length)
        return Hits.of(np.concatenate(ids), np.concatenate(scores))

    def _text_of(self, token_ids: Tensor) -> str:
        if self._tokenizer is None:
            return ""
        return str(self._tokenizer.decode(token_ids.tolist(), skip_special_tokens=True))

    def _words_of(self, backend: MemoryBackend) -> Words:
        """Return the words of a memory, read again when documents came or went."""
        with self._lock:
            found, changes = self._words, backend.num_changes
            if found is None or found[0] is not backend or found[1] != changes:
                self._words = found = backend, changes, Words(backend, self._tokenizer)
            return found[2]


def _relevance_of(hits: Hits, score: float, num_asking: int, relevance: Relevance) -> float:
    """Return how far the tokens of a prompt that say most of a memory stand above chance."""
    runs = runs_of(num_asking)
    if len(runs) == 1:
        return relevance.of(score, num_asking)
    best = [windows_of(hits.of_tokens(run, num_asking), 1, apart=1) for run in runs]
    shares = [found[0].share if found else 0.0 for found in best]
    best_of_runs = max(map(relevance.of, shares, map(len, runs)))
    return best_of_runs - best_by_chance(len(runs))


def _passages(
    windows: Sequence[Window], backend: MemoryBackend, num_rows: int, num_passages: int
) -> list[RoutedPassage]:
    """Turn places into passages that share no rows, best first, within the budget.

    Of the first `num_passages` places; of more if documents are so short that a quarter of the
    budget is left.
    """
    owners = backend.catalog.document_of_rows(window.peak for window in windows)
    there = backend.catalog.searchable_rows("all")
    # Some are between documents, or were removed meanwhile.
    windows = [window for window in windows if window.peak in owners]
    kept = are_among(np.array([window.peak for window in windows], dtype=np.int64), there)
    windows = [one for one, is_kept in zip(windows, kept, strict=True) if is_kept]
    documents: dict[str, StoredDocument] = {}
    places: list[tuple[StoredDocument, int]] = []
    found: list[tuple[list[int], Passage]] = []
    for window in windows:
        name = owners[window.peak]
        if name not in documents:
            documents[name] = backend.catalog.document(name)
        places.append((documents[name], window.peak - documents[name].first_row))
        if len(places) < min(num_passages, len(windows)):
            continue
        found = passages_around(places, num_rows)
        num_taken = sum(passage.stop - passage.first for _, passage in found)
        if len(found) >= num_passages or num_taken > num_rows * 3 // 4:
            break
    chosen: dict[Passage, list[int]] = {}  # and the places in each
    for ranks, passage in found:
        for rank in ranks:
            first_row = places[rank][0].first_row
            whole = without_gaps(passage, first_row, windows[rank].peak, there)
            if whole is not None:
                chosen.setdefault(whole, []).append(rank)
    best_first = sorted(chosen.items(), key=lambda one: one[1])[:num_passages]
    return [
        RoutedPassage(passage, round(max(windows[rank].share for rank in ranks), 4))
        for passage, ranks in best_first
    ]
