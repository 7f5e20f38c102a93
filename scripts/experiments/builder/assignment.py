"""Counterfactuals dealt out to splits, so that every split has many articles, and made items."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

from experiments.builder.counterfactual import Counterfactual
from experiments.builder.cutting import CountTokens, cut
from experiments.builder.settings import BuildSettings

ItemRow = dict[str, Any]


class Assignment:
    """Makes items of counterfactuals, for each split of some settings.

    Args:
        made: the counterfactuals.
        settings: what is wanted.
        count: tells how many tokens a text has.
    """

    def __init__(
        self, made: Sequence[Counterfactual], settings: BuildSettings, count: CountTokens
    ) -> None:
        self._settings, self._count = settings, count
        self._made = list(made)
        random.Random(settings.seed).shuffle(self._made)
        self._lengths = {one.article.text: count(one.article.text) for one in self._made}
        self._taken: set[int] = set()

    def items(self) -> list[ItemRow]:
        """Return the items, split by split; splits take turns, so none gets all questions."""
        waiting = {split: self._fitting(split) for split in self._settings.splits}
        of_article: dict[str, Counter[str]] = {split: Counter() for split in waiting}
        items: dict[str, list[ItemRow]] = {split: [] for split in waiting}
        while any(waiting.values()):
            for split, left in waiting.items():
                item = self._next(split, left, of_article[split])
                if item is not None:
                    items[split].append(item)
                if len(items[split]) == self._settings.items_per_split:
                    left.clear()
        return [item for of_split in items.values() for item in of_split]

    def _fitting(self, split: str) -> list[int]:
        low = self._settings.splits[split][0]
        return [i for i, one in enumerate(self._made) if self._lengths[one.article.text] >= low]

    def _next(self, split: str, left: list[int], counts: Counter[str]) -> ItemRow | None:
        """Take the next question, of the article that has the fewest items in this split."""
        most = self._settings.items_per_article
        while left:
            index = min(left, key=lambda i: counts[self._made[i].article.text])
            left.remove(index)
            made = self._made[index]
            if most is not None and counts[made.article.text] >= most:
                left.clear()  # its article had the fewest
            elif self._settings.reuse_questions or index not in self._taken:
                item = self._item(made, split)
                if item is not None:
                    counts[made.article.text] += 1
                    self._taken.add(index)
                    return item
        return None

    def _item(self, made: Counterfactual, split: str) -> ItemRow | None:
        """Return an item as it is written; None if its article is too short."""
        title, question = made.article.title, made.question
        draw = random.Random(f"{self._settings.seed} {split} {title} {question.id}")
        place = (made.answer_start, made.answer_start + len(made.answer))
        limits = self._settings.splits[split]
        part = cut(made.text(), title, place, limits, self._count, draw)
        if part is None:
            return None
        shift, kept = 0, 0
        for edit in made.edits:
            kept += part.start <= edit.start + shift < part.stop
            shift += edit.growth
        digest = hashlib.sha256(f"{split} {question.id} {made.answer}".encode()).hexdigest()
        return {
            "id": f"{self._settings.name}-{split}-{digest[:8]}",
            "title": title,
            "split": split,
            "context": part.context,
            "question": question.text,
            "answer": made.answer,
            "original_answer": made.original_answer,
            "n_replacements": kept,
            "source": self._settings.source,
            "source_id": question.id,
            "n_tokens": part.n_tokens,
            "answer_start": part.answer_start,
            "answer_depth": round(part.answer_start / len(part.context), 4),
            "construction": part.construction,
            "article_tokens": self._lengths[made.article.text],
            "answer_kind": made.kind.kind,
            "answer_type": made.kind.type,
        }
