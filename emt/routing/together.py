"""Passages that answer a question together: what each adds, and what the best one leads to.

A question may need two documents. If it names both, the second passage is the one that explains
words of the question which the first does not. If it names one, and the other only by what the
first says of it ("the mayor of the town where Marta lives"), the other is found by following: a
document that a passage names is tried together with that passage, and the pair after which the
question is likeliest is taken. Texts name much that a question is not about: a document that does
not make the question likelier by itself, too, is not followed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from emt.passage import Passage
from emt.routing.choosing import Budget, choose_passages
from emt.routing.evidence import Window, spaced
from emt.routing.judging import gains_of, telling
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


class Pair(NamedTuple):
    """A passage, and one of a document that it names.

    Attributes:
        number: of the first one's window, among those that were given.
        window: of the other.
        gains: (q,) by how much both make each token of the question likelier, in nats.
    """

    number: int
    window: Window
    gains: Tensor


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
        ask_back: tells how likely the question is after each of n passages, alone or with another
            between it and the question, and after none: (n + 1, q) log-probabilities.
    """

    question: str
    links: LinkIndex
    tokenizer: PreTrainedTokenizerBase | None
    backend: MemoryBackend
    scope: Scope | None
    find: Callable[[Scope], list[Window]]
    ask_back: Callable[[Sequence[Passage], Sequence[Passage] | None], Tensor]

    def pair(self, windows: Sequence[Window], least: float, num_rows: int) -> Pair | None:
        """Return the passage, and the one of a document that it names, that are best together.

        Args:
            windows: best first; around the first three, passages are read for names.
            least: by how much the best passage alone makes the question likelier, in nats. A pair
                without it must do so by more.
            num_rows: of each passage, at most.

        Returns:
            None if no passage leads to a document in scope that makes the question likelier, or if
            the question names two itself: then it asks for these.
        """
        named = self._named(windows[:_MAX_FOLLOWED], num_rows)
        others = self._others({name for *_, name in named}, num_rows)
        tried = [link for link in named if link[2] in others][:_MAX_PAIRS]
        if not tried:
            return None
        gains = gains_of(
            self.ask_back([others[name][1] for *_, name in tried], [each for _, each, _ in tried])
        )
        for i in gains.sum(dim=1).argsort(descending=True, stable=True).tolist():
            number, _, name = tried[i]
            if number == 0 or float(gains[i].sum()) > least:
                return Pair(number, others[name][0], gains[i])
        return None

    def _named(self, windows: Sequence[Window], num_rows: int) -> list[tuple[int, Passage, str]]:
        """Return the documents that passages around windows name: number of the window, passage,
        name. Those that the question names itself are left out."""
        known = self.links.titles_in(self.question, self.backend, self.scope)
        if self.tokenizer is None or len(known) > 1:
            return []
        named = []
        for number, window in enumerate(windows):
            passage = passage_around(window, self.backend, num_rows)
            if passage is None:
                continue
            document = self.backend.catalog.document(passage.document)
            text = text_of_rows(document, passage.first, passage.stop, self.tokenizer)
            titles = self.links.titles_in(text, self.backend, self.scope)
            for title, names in titles.items():
                if title not in known and len(names) <= _MAX_PAIRS:  # more are no name of one
                    named += [(number, passage, name) for name in names if name != document.name]
        return named

    def _others(self, names: Collection[str], num_rows: int) -> dict[str, tuple[Window, Passage]]:
        """Return the best place of each of some documents, if it makes the question likelier."""
        places: dict[str, tuple[Window, Passage]] = {}
        scope = self.backend.catalog.scope(names, missing_ok=True)
        for window in self.find(scope) if names else ():
            passage = passage_around(window, self.backend, num_rows)
            if passage is not None and len(places) < _MAX_PAIRS:
                places.setdefault(passage.document, (window, passage))
        if not places:
            return {}
        alone = gains_of(self.ask_back([passage for _, passage in places.values()], None))
        likelier = (alone.sum(dim=1) > 0).tolist()
        return dict(itertools.compress(places.items(), likelier))


def passage_around(window: Window, backend: MemoryBackend, num_rows: int) -> Passage | None:
    """Return the passage of at most `num_rows` rows around a window; None if it was removed."""
    routed = choose_passages([window], backend, Budget(num_rows, 1))
    return routed[0].passage if routed else None


def together(
    windows: Sequence[Window],
    num_likely: int,
    gains: Mapping[Passage, Tensor],
    budget: Budget,
    follower: Follower,
) -> Together:
    """Put windows first whose passages have something of their own to say.

    Others stay if they are likely, and not in the passage around a better one: a wrong passage
    beside the right one costs right answers.

    Args:
        windows: best first.
        num_likely: how many of them may be what is asked for.
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
    first, explained, led_to = 0, of_windows[0], []
    if pair is not None:
        first, explained, led_to = pair.number, pair.gains, [pair.window]
    rest = [
        i
        for i, window in enumerate(windows)
        if i != first and not any(window.is_near(other, budget.min_distance) for other in led_to)
    ]
    adding = _adding(of_windows[rest], explained, budget.num_passages - 1 - len(led_to))
    order = [rest[i] for i in adding]
    order += [i for i in rest if i not in order]
    needed = [windows[first], *led_to, *(windows[i] for i in order[: len(adding)])]
    likely = [windows[i] for i in order[len(adding) :] if i < num_likely]
    every = [*needed, *likely]
    kept = spaced(every, len(every), min_distance=budget.num_rows // 2)
    # The best alone is not always right.
    return Together(kept, len(needed) if len(needed) > 1 else budget.num_passages)


def _adding(gains: Tensor, explained: Tensor, count: int) -> list[int]:
    """Return which passages explain tokens that those before them do not: at most `count`.

    Args:
        gains: (n, q) by how much each makes each token likelier, in nats.
        explained: (q,) by how much what is there already does.
    """
    adding: list[int] = []
    explained = explained.clamp(min=0)
    for number in range(len(gains)):
        if len(adding) == count:
            break
        if float(telling((gains[number] - explained).clamp(min=0))) >= _LEAST_ADDED:
            adding.append(number)
            explained = explained.maximum(gains[number])
    return adding
