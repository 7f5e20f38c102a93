"""Counterfactual items from articles with questions: the builder of retrieval's data."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from tqdm import tqdm

from emt.errors import ConfigError
from emt.model.loading import load
from experiments.builder.articles import Article, read_articles
from experiments.builder.changes import Rejected
from experiments.builder.counterfactuals import Counterfactual, counterfactual
from experiments.builder.cutting import CountTokens, Cut, cut
from experiments.builder.pool import NamePool

KINDS = ("year", "number", "entity")


@dataclass(frozen=True)
class BuildSettings:
    """What to build, from what.

    Attributes:
        articles: a file that `read_articles` reads.
        output: items as JSON lines; the report is beside it, with `.report.json`.
        source: what the articles are, for each item's `source`.
        name: what ids begin with.
        model: whose tokens are counted; None counts words and punctuation marks.
        splits: name -> [lowest, highest] number of tokens.
        items_per_split: at most; None for as many as there are.
        items_per_article: at most, in one split; None for any number.
        reuse_questions: one question may be in several splits, which then compare in pairs.
        max_replacements: an answer that stands more often in its article is rejected.
        kinds: of answers that are wanted.
        columns: our name of a column -> the data set's.
        seed: of all that is random.

    Raises:
        ConfigError: a value out of range.
    """

    articles: str
    output: str
    source: str = ""
    name: str = "item"
    model: str | None = None
    splits: dict[str, list[int]] = field(default_factory=dict)
    items_per_split: int | None = None
    items_per_article: int | None = None
    reuse_questions: bool = False
    max_replacements: int = 20
    kinds: list[str] = field(default_factory=lambda: list(KINDS))
    columns: dict[str, str] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        for name, kind in (("articles", str), ("output", str), ("columns", dict), ("splits", dict)):
            if not isinstance(getattr(self, name), kind) or (
                kind is str and not getattr(self, name)
            ):
                raise ConfigError(f"{name} must be {_A[kind]}; got {getattr(self, name)!r}.")
        for name in ("items_per_split", "items_per_article", "max_replacements"):
            value = getattr(self, name)
            if value is None and name != "max_replacements":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} must be a whole number from 1; got {value!r}.")
        if not isinstance(self.seed, int):
            raise ConfigError(f"seed must be a whole number; got {self.seed!r}.")
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown or not self.kinds:
            raise ConfigError(f"kinds must be some of {', '.join(KINDS)}; got {self.kinds!r}.")
        if not self.splits:
            raise ConfigError("splits must name at least one; got none. Try {2k: [1500, 2048]}.")
        for name, limits in self.splits.items():
            whole = isinstance(limits, list | tuple) and [type(limit) for limit in limits]
            if whole != [int, int] or not 0 < limits[0] <= limits[1]:
                raise ConfigError(
                    f"split '{name}' must be [lowest, highest] in tokens; got {limits!r}."
                )


_A = {str: "text", dict: "a mapping"}


@dataclass(frozen=True)
class Built:
    """What was made, and what was not.

    Attributes:
        items: as they are written.
        report: plain JSON types: questions, items of each split, kinds, and rejections by reason.
    """

    items: list[dict[str, Any]]
    report: dict[str, Any]


def build(settings: BuildSettings) -> Built:
    """Read articles and make counterfactual items of them.

    Raises:
        ConfigError, DocumentError: the articles, or the model, cannot be read.
    """
    articles = read_articles(settings.articles, settings.columns)
    return build_items(articles, settings, token_counter(settings.model))


def build_items(articles: Sequence[Article], settings: BuildSettings, count: CountTokens) -> Built:
    """Make counterfactual items of articles; the same settings make the same items.

    Args:
        articles: with questions.
        settings: all but their files is used.
        count: tells how many tokens a text has.
    """
    pool = NamePool(articles)
    rejected: Counter[str] = Counter()
    made: list[Counterfactual] = []
    pairs = [(article, question) for article in articles for question in article.questions]
    for article, question in tqdm(pairs, desc="questions", disable=None):
        draw = random.Random(f"{settings.seed} {article.title} {question.id}")
        try:
            found = counterfactual(article, question, pool, draw, settings.max_replacements)
            if found.kind.kind not in settings.kinds:
                raise Rejected("of a kind that is not wanted")
            made.append(found)
        except Rejected as error:
            rejected[error.reason] += 1
    items = _Assignment(made, settings, count).items()
    used = len({item["source_id"] for item in items})
    report = {
        "articles": len(articles),
        "questions": len(pairs),
        "counterfactuals": len(made),
        "in no split": len(made) - used,
        "items": {split: _count(items, "split", split) for split in settings.splits},
        "kinds": {kind: _count(items, "answer_kind", kind) for kind in KINDS},
        "rejected": dict(rejected.most_common()),
    }
    return Built(items, report)


def write_items(built: Built, output: Path | str) -> None:
    """Write items as JSON lines, and the report beside them.

    Raises:
        ConfigError: they cannot be written.
    """
    path = Path(output)
    lines = [json.dumps(item, ensure_ascii=False) + "\n" for item in built.items]
    report = json.dumps(built.report, ensure_ascii=False, indent=2) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(lines), encoding="utf-8")
        path.with_suffix(".report.json").write_text(report, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"output '{path}' cannot be written: {error.strerror}.") from error


def token_counter(model: str | None) -> CountTokens:
    """Return what counts a model's tokens in a text; words and marks for None.

    Raises:
        ConfigError: the model cannot be loaded.
    """
    if model is None:
        return lambda text: len(re.findall(r"\w+|[^\w\s]", text))
    tokenizer = load(model).tokenizer

    @lru_cache(maxsize=65536)
    def count(text: str) -> int:
        return len(tokenizer(text, verbose=False)["input_ids"])

    return count


class _Assignment:
    """Deals counterfactuals out to splits, so that every split has many articles."""

    def __init__(
        self, made: Sequence[Counterfactual], settings: BuildSettings, count: CountTokens
    ) -> None:
        self._settings, self._count = settings, count
        self._made = list(made)
        random.Random(settings.seed).shuffle(self._made)
        self._lengths = {id(one.article): count(one.article.text) for one in self._made}
        self._taken: set[int] = set()

    def items(self) -> list[dict[str, Any]]:
        """Return the items, split by split; splits take turns, so none gets all questions."""
        waiting = {split: self._fitting(split) for split in self._settings.splits}
        of_article: dict[str, Counter[int]] = {split: Counter() for split in waiting}
        found: dict[str, list[dict[str, Any]]] = {split: [] for split in waiting}
        while any(waiting.values()):
            for split, left in waiting.items():
                item = self._next(split, left, of_article[split])
                if item is not None:
                    found[split].append(item)
                if len(found[split]) == self._settings.items_per_split:
                    left.clear()
        return [item for split in found.values() for item in split]

    def _fitting(self, split: str) -> list[int]:
        low = self._settings.splits[split][0]
        return [i for i, one in enumerate(self._made) if self._lengths[id(one.article)] >= low]

    def _next(self, split: str, left: list[int], counts: Counter[int]) -> dict[str, Any] | None:
        """Take the next question, of the article that has the fewest items in this split."""
        most = self._settings.items_per_article
        while left:
            index = min(left, key=lambda i: counts[id(self._made[i].article)])
            left.remove(index)
            one = self._made[index]
            if most is not None and counts[id(one.article)] >= most:
                left.clear()  # it had the fewest
            elif self._settings.reuse_questions or index not in self._taken:
                item = self._item(one, split)
                if item is not None:
                    counts[id(one.article)] += 1
                    self._taken.add(index)
                    return item
        return None

    def _item(self, one: Counterfactual, split: str) -> dict[str, Any] | None:
        text, title = one.text(), one.article.title
        low, high = self._settings.splits[split]
        draw = random.Random(f"{self._settings.seed} {split} {title} {one.question.id}")
        where = (one.answer_start, one.answer_start + len(one.answer))
        part = cut(text, title, where, (low, high), self._count, draw)
        return None if part is None else _record(one, part, split, self._settings, self._lengths)


def _record(
    one: Counterfactual,
    part: Cut,
    split: str,
    settings: BuildSettings,
    lengths: dict[int, int],
) -> dict[str, Any]:
    """Return an item as it is written."""
    shift, kept = 0, 0
    for edit in one.edits:
        kept += part.start <= edit.start + shift < part.stop
        shift += len(edit.text) - (edit.stop - edit.start)
    digest = hashlib.sha256(f"{split} {one.question.id} {one.answer}".encode()).hexdigest()
    return {
        "id": f"{settings.name}-{split}-{digest[:8]}",
        "title": one.article.title,
        "split": split,
        "context": part.context,
        "question": one.question.text,
        "answer": one.answer,
        "original_answer": one.original_answer,
        "n_replacements": kept,
        "source": settings.source,
        "source_id": one.question.id,
        "n_tokens": part.n_tokens,
        "answer_start": part.answer_start,
        "answer_depth": round(part.answer_start / len(part.context), 4),
        "construction": part.construction,
        "article_tokens": lengths[id(one.article)],
        "answer_kind": one.kind.kind,
        "answer_type": one.kind.type,
    }


def _count(items: Sequence[dict[str, Any]], key: str, value: str) -> int:
    return sum(item[key] == value for item in items)
