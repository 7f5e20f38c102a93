"""Memories that questions are asked of: documents of question sets, and others up to a size."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from emt.errors import ConfigError
from emt.ingest.corpus import Corpus
from experiments.comparison.sets import Question, QuestionSet, Text


@dataclass(frozen=True)
class Filled:
    """Documents of one memory, and the questions asked about them.

    Attributes:
        name: the set whose documents these are, or "all".
        size: "64k" or "1M" tokens of all documents, or "own" for those of the sets alone.
        documents: those that are asked about first.
        questions: those whose evidence is among the documents.
        left_out: set -> how many questions have no room.
    """

    name: str
    size: str
    documents: list[Text]
    questions: list[Question]
    left_out: dict[str, int]

    @property
    def label(self) -> str:
        """Its name and size, such as "squad-64k"."""
        return f"{self.name}-{self.size}"


def filled_memories(
    sets: Sequence[QuestionSet],
    *,
    together: bool,
    sizes: Sequence[int] | None,
    distractors: Sequence[str],
    cut: Callable[[str, int | None], tuple[str, int]],
) -> Iterator[Filled]:
    """Fill memories of several sizes, smallest first; all sizes have the same questions.

    A memory has the documents that are asked about, as many as the smallest size has room for; then
    the others of the sets, as far as they fit; then distractors.

    Args:
        sets: sets about the same documents share a memory.
        together: all sets share one.
        sizes: tokens of each memory, ascending; None for the sets' documents and no others.
        distractors: files and folders of other texts, used in order; the last is cut off where the
            size is reached.
        cut: returns a text's first n tokens, or all of them, and their number.

    Raises:
        ConfigError: documents of one name differ, no question has room, or there are not enough
            distractors.
        CorpusError: distractors cannot be read.
    """
    groups: dict[str, list[QuestionSet]] = {}
    for one in sets:
        groups.setdefault("all" if together else one.documents_of, []).append(one)
    others = _Others(distractors, cut)
    for name, group in groups.items():
        documents = _joined(group)
        lengths = {each: cut(text.text, None)[1] for each, text in documents.items()}
        room = sum(lengths.values()) if sizes is None else sizes[0]
        questions, left_out, used = _with_room(group, lengths, room)
        for size in sizes or [room]:
            names, total = dict.fromkeys(used), sum(lengths[each] for each in used)
            for each, length in lengths.items():
                if each not in names and total + length <= size:
                    names[each] = None
                    total += length
            chosen = [documents[each] for each in names]
            if sizes is not None:
                chosen += others.up_to(size - total)
            yield Filled(
                name, "own" if sizes is None else size_name(size), chosen, questions, left_out
            )


def size_name(num_tokens: int) -> str:
    """Return "64k" or "1M", where that is the number rounded."""
    millions, thousands = f"{num_tokens / 1e6:.3g}M", f"{num_tokens / 1e3:.3g}k"
    return millions if num_tokens >= 999_500 else thousands


def _joined(sets: Iterable[QuestionSet]) -> dict[str, Text]:
    documents: dict[str, Text] = {}
    for one in sets:
        for name, text in one.documents.items():
            if documents.setdefault(name, text) != text:
                raise ConfigError(
                    f"the sets {', '.join(each.name for each in sets)} have different documents "
                    f"of the name '{name}'. Set together to false, or leave one out."
                )
    return documents


def _with_room(
    sets: Sequence[QuestionSet], lengths: dict[str, int], room: int
) -> tuple[list[Question], dict[str, int], list[str]]:
    """Return the questions whose documents fit, how many do not, and these documents.

    Sets take turns, so that each gets its part.
    """
    used: dict[str, None] = {}
    kept: dict[str, list[Question]] = {one.name: [] for one in sets}
    left_out = dict.fromkeys(kept, 0)
    for turn in itertools.zip_longest(*(one.questions for one in sets)):
        for question in filter(None, turn):
            new = [name for name in question.documents if name not in used]
            length = sum(lengths[name] for name in new)
            if length <= room:
                room -= length
                used |= dict.fromkeys(new)
                kept[question.set].append(question)
            else:
                left_out[question.set] += 1
    for name, questions in kept.items():
        if not questions:
            raise ConfigError(
                f"no document that set '{name}' asks about has room in the smallest memory. "
                "Raise the smallest size."
            )
    return list(itertools.chain(*kept.values())), left_out, list(used)


class _Others:
    """Distractors, read once, and only as many as are needed."""

    def __init__(
        self, sources: Sequence[str], cut: Callable[[str, int | None], tuple[str, int]]
    ) -> None:
        self._waiting = iter(Corpus(sources) if sources else ())
        self._cut = cut
        self._read: list[tuple[Text, int]] = []

    def up_to(self, size: int) -> list[Text]:
        """Return as many as have `size` tokens."""
        chosen: list[Text] = []
        for text, length in self._all():
            if size <= 0:
                break
            if length > size:
                text = text._replace(text=self._cut(text.text, size)[0])
            if text.text.strip():
                chosen.append(text)
            size -= length
        if size > 0:
            raise ConfigError(
                f"a memory needs more texts: {size:,} tokens are missing. Name more files or "
                "folders in distractors, or lower sizes."
            )
        return chosen

    def _all(self) -> Iterator[tuple[Text, int]]:
        yield from self._read
        for document in self._waiting:
            text = Text(f"distractor {document.name}", document.text)
            self._read.append((text, self._cut(text.text, None)[1]))
            yield self._read[-1]
