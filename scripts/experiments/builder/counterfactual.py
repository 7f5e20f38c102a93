"""One question to one counterfactual: its article states another answer, and only that one."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

from experiments.builder.articles import Article, Question
from experiments.builder.edits import Change, Edit, Rejected, apply
from experiments.builder.folded import fold, folded, phrase, stands_in
from experiments.builder.kinds import AnswerKind, kind_of
from experiments.builder.names import NameChange
from experiments.builder.pool import Answer, NamePool, answers_of, has_the

_TRIES = 40
_VOWEL_SOUND = re.compile(r"[aeiou]|8|11(?!\d)|18(?!\d)")
_CONVERTED = re.compile(r"[\s-]*[^\s\d(]{0,12}\s*\([^\d()]{0,8}[\d,.]+")  # "187 feet (57 m)"
_LONG_WORD = 4  # shorter ones of a question are mostly grammar


@dataclass(frozen=True)
class Counterfactual:
    """An article changed so that a question has another answer.

    Attributes:
        article: as it was.
        question: about it.
        edits: of the article's text.
        kind: of the answer.
        original_answer: true, and nowhere in the changed text.
        answer: in its place.
        answer_start: of the occurrence that supports it, in the changed text.
    """

    article: Article
    question: Question
    edits: tuple[Edit, ...]
    kind: AnswerKind
    original_answer: str
    answer: str
    answer_start: int

    def text(self) -> str:
        """Return the changed article."""
        return apply(self.article.text, self.edits)


def counterfactual(
    article: Article, question: Question, pool: NamePool, draw: random.Random, max_replacements: int
) -> Counterfactual:
    """Change an article so that a question has another answer of the same type.

    Args:
        article: with the question.
        question: one of its questions.
        pool: names that may replace names.
        draw: the source of randomness.
        max_replacements: an answer that stands more often in the article is rejected.

    Raises:
        Rejected: with the reason.
    """
    answers = answers_of(question)
    if not answers:
        raise Rejected("no answer")
    old = answers[0]
    kind = kind_of(question.text, old.text)
    if kind is None:
        raise Rejected("answer of no known type")
    reason = "no other answer of its type"
    for change in islice(_changes(article, old, kind, pool, draw), _TRIES):
        edits = _checked_edits(change, article, question, old, max_replacements)
        made = _made(article, question, kind, old, edits)
        fault = _fault(made, change)
        if fault is None:
            _check_gone(made, change, answers)
            return made
        reason = fault
    raise Rejected(reason)


def _changes(
    article: Article, old: Answer, kind: AnswerKind, pool: NamePool, draw: random.Random
) -> Iterator[Change]:
    """Yield what may be put in place of an answer."""
    if kind.changes is not None:
        stop = kind.number_stop
        if stop is not None and _CONVERTED.match(article.text, old.start + stop):
            raise Rejected("in other units beside it")
        yield from kind.changes(draw)
        return
    type = pool.type_of(old.text)
    with_the = has_the(article.text, old.start)
    if type is None:
        raise Rejected("answer of several types")
    if with_the and type.startswith("person"):
        raise Rejected("answer of no known type")  # a people or an office, not a person
    for name in pool.others(old.text, with_the, draw):
        yield NameChange(old.text, name, type == "person")


def _checked_edits(
    change: Change, article: Article, question: Question, old: Answer, max_replacements: int
) -> list[Edit]:
    """Return the edits of an article; they do not depend on the new answer but for their text."""
    if _stands(change, article.title):
        raise Rejected("answer in the title")
    if _stands(change, question.text) or stands_in(old.text, question.text):
        raise Rejected("answer in the question")
    edits = change.edits(article.text)
    if len(edits) > max_replacements:
        raise Rejected("answer too frequent")
    crossing = [edit for edit in edits if edit.start < old.stop and edit.stop > old.start]
    if not crossing:
        raise Rejected("answer not found by its rule")
    if any(edit.start < old.start or edit.stop > old.stop for edit in crossing):
        raise Rejected("part of a longer name")
    return edits


def _made(
    article: Article, question: Question, kind: AnswerKind, old: Answer, edits: list[Edit]
) -> Counterfactual:
    inside = [
        Edit(edit.start - old.start, edit.stop - old.start, edit.text)
        for edit in edits
        if old.start <= edit.start < old.stop
    ]
    answer = apply(old.text, inside)
    start = old.start + sum(edit.growth for edit in edits if edit.stop <= old.start)
    return Counterfactual(article, question, tuple(edits), kind, old.text, answer, start)


def _fault(made: Counterfactual, change: Change) -> str | None:
    """Return why a new answer does not do; None if it does."""
    before, question = made.article.text, made.question.text
    if _stands(change.back(), before) or stands_in(made.answer, before):
        return "no answer that is new to the article"
    if isinstance(change, NameChange) and fold(change.new) in folded(before).text:
        return "no answer that is new to the article"
    if _stands(change.back(), question) or stands_in(made.answer, question):
        return "new answer in the question"
    if any(_article_breaks(before, edit) for edit in made.edits):
        return "a or an before it"
    after = made.text()
    words = {word for word in re.findall(r"\w+", fold(question)) if len(word) >= _LONG_WORD}
    if any(_word_counts(before)[word] != _word_counts(after)[word] for word in words):
        return "words of the question would change"
    return None


def _check_gone(made: Counterfactual, change: Change, answers: list[Answer]) -> None:
    """Raise Rejected if something of the true answer is left, whatever the new one is."""
    after = made.text()
    if change.edits(after) or stands_in(made.original_answer, after):
        raise Rejected("true answer remains")
    if isinstance(change, NameChange) and _derived_remains(change, made.kind, after):
        raise Rejected("a word made of the true answer remains")
    if any(stands_in(other.text, after) for other in answers[1:]):
        raise Rejected("another annotator's answer remains")


def _stands(change: Change, text: str) -> bool:
    try:
        return bool(change.edits(text))
    except Rejected:
        return True


def _article_breaks(text: str, edit: Edit) -> bool:
    """Tell whether "a" or "an" before an edit would no longer fit."""
    match = re.search(r"(?<!\w)(an?)\s$", text[max(0, edit.start - 4) : edit.start], re.IGNORECASE)
    if match is None:
        return False
    return bool(_VOWEL_SOUND.match(fold(edit.text))) != (match[1].lower() == "an")


def _derived_remains(change: NameChange, kind: AnswerKind, text: str) -> bool:
    """Tell whether "Georgian" is left of Georgia, "Marxist" of Karl Marx, "Baikal" of the lake."""
    name = change.old.split()[-1] if change.is_person else change.old
    if re.search(rf"(?<!\w){phrase(name)}\w", folded(text).text) is not None:
        return True
    has_kind_first = kind.type.endswith(" ...")  # "lake ..."
    return has_kind_first and stands_in(" ".join(change.old.split()[1:]), text)


@lru_cache(maxsize=8)
def _word_counts(text: str) -> Counter[str]:
    return Counter(re.findall(r"\w+", folded(text).text))
