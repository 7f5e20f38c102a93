"""Retrieval-augmented generation, to compare with: chunks of documents, ranked for a question."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, cast

import bm25s
import numpy as np
import numpy.typing as npt

from emt.errors import ConfigError
from experiments.responder import Responder


class Retriever(Protocol):
    """Ranks texts for questions."""

    def best(self, question: str, count: int) -> list[int]:
        """Return the indices of the best texts, best first: `count` of them, or all there are."""


class BM25:
    """Words in common, the rare ones counting more; English stop words left out.

    Args:
        texts: the texts that are ranked, at least one.

    Source:
        Lù, BM25S: Orders of magnitude faster lexical search via eager sparse scoring
        (arXiv 2407.03618); its defaults k1 = 1.5, b = 0.75.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._length = len(texts)
        words = bm25s.tokenize(list(texts), stopwords="en", show_progress=False)
        self._index = None  # of stop words only, nothing can be ranked
        if any(words.ids):
            self._index = bm25s.BM25()
            self._index.index(words, show_progress=False)

    def scores(self, question: str) -> npt.NDArray[np.float32]:
        """Return how well each text suits, (n,); 0 for those without a word of the question."""
        (words,) = bm25s.tokenize([question], stopwords="en", return_ids=False, show_progress=False)
        known = [word for word in words if self._index and word in self._index.vocab_dict]
        if self._index is None or not known:
            return np.zeros(self._length, dtype=np.float32)
        return cast(npt.NDArray[np.float32], self._index.get_scores(known))

    def best(self, question: str, count: int) -> list[int]:
        """Return the indices of the best texts, best first: `count` of them, or all there are."""
        return [int(index) for index in np.argsort(-self.scores(question), kind="stable")[:count]]


class Chunks:
    """Documents in chunks of equal length, ready to be ranked.

    Args:
        texts: whole documents; a chunk is never of two.
        responder: the model whose tokens are counted.
        num_tokens: length of a chunk.
        retriever: as `retriever_of` takes it.

    Attributes:
        texts: the chunks, in order.
    """

    def __init__(
        self, texts: Iterable[str], responder: Responder, num_tokens: int, retriever: str = "bm25"
    ) -> None:
        self.texts = [piece for text in texts for piece in responder.split(text, num_tokens)]
        self._retriever = retriever_of(retriever)(self.texts)

    def best(self, question: str, count: int) -> list[str]:
        """Return the best chunks, best first."""
        return [self.texts[index] for index in self._retriever.best(question, count)]


def retriever_of(name: str) -> Callable[[Sequence[str]], Retriever]:
    """Return the class of a retriever.

    Args:
        name: "bm25", or "module:Class" of one's own, such as of an embedding model.

    Raises:
        ConfigError: there is none.
    """
    if name == "bm25":
        return BM25
    try:
        retriever = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"retriever must be bm25, or module:Class in PYTHONPATH; got {name!r}: {error}."
        ) from error
    if not callable(getattr(retriever, "best", None)):
        raise ConfigError(f"retriever '{name}' must be a class with best(question, count).")
    return cast(Callable[[Sequence[str]], Retriever], retriever)
