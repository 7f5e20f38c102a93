"""Passages that answer a question together: what each adds, and what the best one leads to.

A question may need two documents. If it names both, the second passage is the one that explains
words of the question which the first does not. If it names one, and the other only by what the
first says of it ("the mayor of the town where Marta lives"), the other is found by following: a
document that a passage names is tried together with that passage, and the pair after which the
question is likeliest is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from emt.passage import Passage
from emt.routing.choosing import Budget, choose_passages
from emt.routing.evidence import Window
from emt.routing.judging import telling
from emt.routing.links import LinkIndex
from emt.routing.words import text_of_rows
from memory_backends import MemoryBackend, Scope

_LEAST_ADDED = 1.0  # nats a token
_MAX_FOLLOWED = 3  # passages whose links are followed
_MAX_PAIRS = 8


class Together(NamedTuple):
    """Windows whose passages answer a question together.

    Attributes:
        windows: best first.
        num_needed: how many of the first ones have something of their own to say.
    """

    windows: list[Window]
    num_needed: int


@dataclass(frozen=True)
class Follower:
    """Follows what passages name to other documents, for one question.

    Attributes:
        question: its text.
        links: which documents a text names.
        tokenizer: for documents that were written as ids; without one nothing is followed.
        backend: where the memories are.
        scope: the rows that may be found; None for all.
        find: returns the best windows in a scope for the question.
        ask_back: tells how likely the question is after each of n passages, with another between
            it and the question, and after none: (n + 1, q) log-probabilities.
    """

    question: str
    links: LinkIndex
    tokenizer: PreTrainedTokenizerBase | None
    backend: MemoryBackend
    scope: Scope | None
    find: Callable[[Scope], list[Window]]
    ask_back: Callable[[Sequence[Passage], Sequence[Passage]], Tensor]

    def pair(
        self, windows: Sequence[Window], least: float, num_rows: int
    ) -> tuple[int, Window] | None:
        """Return the passage, and the window of a document that it names, that are best together.

        Args:
            windows: best first; around the first three, passages are read for names.
            least: by how much the best passage alone makes the question likelier, in nats. A pair
                without it must do so by more.
            num_rows: of each passage, at most.

        Returns:
            Which of `windows`, and the other window. None if no passage names a document in scope,
            or if the question names two itself: then it asks for these.
        """
        if self.tokenizer is None or len(self.links.named_in(self.question, self.backend)) > 1:
            return None
        around = [
            passage_around(window, self.backend, num_rows) for window in windows[:_MAX_FOLLOWED]
        ]
        named = [
            (number, passage, name)
            for number, passage in enumerate(around)
            if passage is not None
            for name in self._named_by(passage)
        ]
        if not named:
            return None
        others: dict[str, tuple[Window, Passage]] = {}  # the best of each document
        for window in self.find(self.backend.catalog.scope({name for *_, name in named})):
            passage = passage_around(window, self.backend, num_rows)
            if passage is not None:
                others.setdefault(passage.document, (window, passage))
        pairs = [pair for pair in named if pair[2] in others][:_MAX_PAIRS]
        if not pairs:
            return None
        log_probs = self.ask_back(
            [others[name][1] for *_, name in pairs], [passage for _, passage, _ in pairs]
        )
        gains = (log_probs[:-1] - log_probs[-1]).sum(dim=1).tolist()
        for i in sorted(range(len(pairs)), key=lambda i: -gains[i]):
            number, _, name = pairs[i]
            if number == 0 or gains[i] > least:
                return number, others[name][0]
        return None

    def _named_by(self, passage: Passage) -> list[str]:
        document = self.backend.catalog.document(passage.document)
        text = text_of_rows(document, passage.first, passage.stop, self.tokenizer)
        names = self.links.named_in(text, self.backend, known=self.question)
        return [name for name in names if name != passage.document and self._is_in_scope(name)]

    def _is_in_scope(self, name: str) -> bool:
        if self.scope is None:
            return True
        spans = self.backend.catalog.scope([name]).spans
        return Scope.of([*self.scope.spans, *spans]) == self.scope


def passage_around(window: Window, backend: MemoryBackend, num_rows: int) -> Passage | None:
    """Return the passage of at most `num_rows` rows around a window; None if it was removed."""
    routed = choose_passages([window], backend, Budget(num_rows, 1))
    return routed[0].passage if routed else None


def together(
    windows: Sequence[Window], gains: Mapping[Passage, Tensor], budget: Budget, follower: Follower
) -> Together:
    """Put windows first whose passages have something of their own to say.

    Args:
        windows: best first.
        gains: by how much the passage around each makes each token of the question likelier, (q,),
            in nats, with an equal share of the budget.
        budget: of all passages.
        follower: finds what the best windows lead to; such a pair comes first.
    """
    share = budget.num_rows // budget.num_passages
    around = [passage_around(window, follower.backend, share) for window in windows]
    known = [passage is not None and passage in gains for passage in around]
    if not all(known):  # rows were removed meanwhile
        return Together(list(windows), budget.num_passages)
    of_windows = torch.stack([gains[passage] for passage in around if passage is not None])
    pair = follower.pair(windows, float(of_windows[0].sum()), budget.num_rows // 2)
    first, *led_to = (0,) if pair is None else pair
    rest = [
        i
        for i, window in enumerate(windows)
        if i != first and not any(window.is_near(other, budget.min_distance) for other in led_to)
    ]
    adding = _adding(of_windows[[first, *rest]], budget.num_passages - len(led_to))
    order = [rest[i - 1] for i in adding[1:]]
    order += [i for i in rest if i not in order]
    num_needed = len(adding) + len(led_to)
    if num_needed == 1:  # the best is not always right
        num_needed = budget.num_passages
    return Together([windows[first], *led_to, *(windows[i] for i in order)], num_needed)


def _adding(gains: Tensor, count: int) -> list[int]:
    """Return which passages explain tokens that those before them do not: at most `count`.

    Args:
        gains: (n, q) by how much each makes each token likelier, in nats. The first one adds.
    """
    adding, explained = [0], gains[0].clamp(min=0)
    for number in range(1, len(gains)):
        if len(adding) == count:
            break
        if float(telling((gains[number] - explained).clamp(min=0))) >= _LEAST_ADDED:
            adding.append(number)
            explained = explained.maximum(gains[number])
    return adding
