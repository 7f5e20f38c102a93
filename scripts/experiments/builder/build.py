"""Counterfactual items from articles with questions: the builder of retrieval's data."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from emt.errors import ConfigError
from emt.model.loading import load
from experiments.builder.articles import Article
from experiments.builder.assignment import Assignment
from experiments.builder.counterfactual import Counterfactual, counterfactual
from experiments.builder.cutting import CountTokens
from experiments.builder.edits import Rejected
from experiments.builder.pool import NamePool
from experiments.builder.settings import BuildSettings


class Built(NamedTuple):
    """What was made, and what was not.

    Attributes:
        items: as they are written.
        report: plain JSON types: questions, items of each split, kinds, and rejections by reason.
    """

    items: list[dict[str, Any]]
    report: dict[str, Any]


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
            changed = counterfactual(article, question, pool, draw, settings.max_replacements)
            if changed.kind.kind not in settings.kinds:
                raise Rejected("of a kind that is not wanted")
            made.append(changed)
        except Rejected as error:
            rejected[error.reason] += 1
    items = Assignment(made, settings, count).items()
    report = {
        "articles": len(articles),
        "questions": len(pairs),
        "counterfactuals": len(made),
        "in no split": len(made) - len({item["source_id"] for item in items}),
        "items": dict(Counter(item["split"] for item in items)),
        "kinds": dict(Counter(item["answer_kind"] for item in items)),
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
