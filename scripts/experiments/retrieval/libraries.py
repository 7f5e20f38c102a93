"""The documents of one memory: those of the items, and others until it has its size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from emt.errors import ConfigError
from emt.ingest.corpus import Corpus
from experiments.items import Item
from experiments.responder import Responder


@dataclass(frozen=True)
class Library:
    """Documents of one memory, and the questions asked about them.

    Attributes:
        label: what results are grouped by: an item's split, or the memory's size.
        documents: (name, text) pairs.
        items: those whose documents are among them.
    """

    label: str
    documents: list[tuple[str, str]]
    items: list[Item]


def libraries_of(
    items: Sequence[Item], sizes: Sequence[int], distractors: Sequence[str], responder: Responder
) -> list[Library]:
    """Fill memories of several sizes; each holds what the smaller one does, and more.

    All have the same items, as many as the smallest has room for.

    Args:
        items: those of one title have the same context.
        sizes: tokens of each memory, ascending.
        distractors: files and folders of other texts, used in order; the last is cut off where the
            size is reached.
        responder: the model whose tokens are counted.

    Raises:
        ConfigError: no item fits, or there are not enough distractors.
        CorpusError: distractors cannot be read.
    """
    documents: list[tuple[str, str]] = []
    used, kept = 0, []
    for item in items:
        is_new = item.title not in dict(documents)
        length = len(responder.split(item.context, 1)) if is_new else 0
        if used + length <= sizes[0]:
            used += length
            kept.append(item)
            documents += [(item.title, item.context)] if is_new else []
    if not kept:
        raise ConfigError(
            f"no item's document fits a memory of {sizes[0]:,} tokens. Raise the smallest size."
        )
    libraries = []
    others = _others(distractors)
    rest: tuple[str, str] | None = None
    for size in sizes:
        while used < size:
            name, text = rest or next(others, ("", ""))
            if not text:
                raise ConfigError(
                    f"a memory of {size:,} tokens needs more texts: items and distractors have "
                    f"{used:,}. Name more files or folders in distractors."
                )
            pieces = responder.split(text, 1)
            num_taken = min(len(pieces), size - used)
            documents.append((name, "".join(pieces[:num_taken])))
            used += num_taken
            remainder = "".join(pieces[num_taken:])
            rest = (f"{name} (continued)", remainder) if remainder else None
        libraries.append(Library(label_of(size), list(documents), kept))
    return libraries


def label_of(size: int) -> str:
    """Return "64k" or "1M", where that is the number rounded."""
    return f"{size / 1e6:g}M" if size >= 1_000_000 else f"{size / 1e3:g}k"


def _others(distractors: Sequence[str]) -> Iterator[tuple[str, str]]:
    if distractors:
        for document in Corpus(distractors):
            yield f"distractor {document.name}", document.text
