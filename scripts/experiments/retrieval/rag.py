"""Retrieval-augmented generation, to compare with: chunks of documents, ranked for a question."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, cast

from emt.errors import ConfigError
from emt.routing.words import bm25s_for
from experiments.retrieval.answering import Responder


class Retriever(Protocol):
    """Ranks texts for questions."""

    def best(self, question: str, count: int) -> list[int]:
        """Return the indices of the best texts, best first: `count` of them, or all there are."""


class BM25:
    """Words in common, the rare ones counting more; English stop words left out.

    Args:
        texts: what is ranked, at least one.

    Raises:
        ConfigError: bm25s is not installed.

    Source:
        Lù, BM25S: Orders of magnitude faster lexical search via eager sparse scoring
        (arXiv 2407.03618); its defaults k1 = 1.5, b = 0.75.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._library = bm25s_for("retrieval-augmented generation")
        self._length = len(texts)
        words = self._words(texts)
        self._index = None  # stop words only: nothing to rank by
        if any(words.ids):
            self._index = self._library.BM25()
            self._index.index(words, show_progress=False)

    def best(self, question: str, count: int) -> list[int]:
        """Return the indices of the best texts, best first: `count` of them, or all there are."""
        count = min(count, self._length)
        if self._index is None:
            return list(range(count))
        found = self._index.retrieve(self._words([question]), k=count, show_progress=False)
        return [int(index) for index in found.documents[0]]

    def _words(self, texts: Sequence[str]) -> Any:
        return self._library.tokenize(list(texts), stopwords="en", show_progress=False)


RETRIEVERS: dict[str, Callable[[Sequence[str]], Retriever]] = {"bm25": BM25}


def retriever_of(name: Any) -> Callable[[Sequence[str]], Retriever]:
    """Find what makes a retriever of texts.

    Args:
        name: one of `RETRIEVERS`; or "module:Class" of one's own, such as of an embedding model:
            it is called with the texts, and has `best`.

    Raises:
        ConfigError: there is none.
    """
    if isinstance(name, str) and name in RETRIEVERS:
        return RETRIEVERS[name]
    module, colon, attribute = name.partition(":") if isinstance(name, str) else ("", "", "")
    if not (module and colon and attribute):
        known = ", ".join(RETRIEVERS)
        raise ConfigError(f"retriever must be {known}, or module:Class of your own; got {name!r}.")
    try:
        found: Any = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"retriever '{name}' cannot be imported: {error}. Is its folder in PYTHONPATH?"
        ) from error
    if not callable(getattr(found, "best", None)):
        raise ConfigError(f"retriever '{name}' must be a class with best(question, count).")
    return cast(Callable[[Sequence[str]], Retriever], found)


class Chunks:
    """Documents in chunks of equal length, ready to be ranked.

    Args:
        texts: whole documents; a chunk is never of two.
        responder: whose tokens are counted.
        num_tokens: length of a chunk.
        retriever: as `retriever_of` takes it.

    Attributes:
        texts: the chunks, in order.
    """

    def __init__(
        self, texts: Iterable[str], responder: Responder, num_tokens: int, retriever: str = "bm25"
    ) -> None:
        self.texts = [piece for text in texts for piece in responder.split(text, num_tokens)]
        self._retriever: Retriever = retriever_of(retriever)(self.texts)

    def best(self, question: str, count: int) -> list[str]:
        """Return the best chunks, best first."""
        return [self.texts[index] for index in self._retriever.best(question, count)]
