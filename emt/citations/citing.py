"""Attended rows to documents and quoted spans: which text made the model say it.

The mass of a sentence or a passage is that of its rows. Attention sinks are left out, since their
mass says nothing about their content, and so is what was removed since it was recorded.

What copies ranks first: attention to rows of the very token that is said. Heads attend to much that
is like the context and does not decide what comes next; those that find a fact in a text attend to
the token that they make the model say.

Source: Wu et al., Retrieval Head Mechanistically Explains Long-Context Factuality (arXiv
2404.15574), which tells such heads by this.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from emt.citations.attended import Attended
from emt.citations.characters import decode_whole
from emt.citations.sentences import sentences_of
from emt.passage import Recalled
from memory_backends import MemoryBackend, StoredDocument


@dataclass(frozen=True)
class Sources:
    """Where a recording looks up the text of its rows when it is asked for citations.

    Attributes:
        backend: returns the store of the memory.
        layers: returns the layers that read memories, ascending.
        tokenizer: decodes documents that were written as ids; None to quote nothing of these.
    """

    backend: Callable[[], MemoryBackend]
    layers: Callable[[], Sequence[int]]
    tokenizer: PreTrainedTokenizerBase | None

    @property
    def content_layers(self) -> Sequence[int]:
        """The upper half of the layers that read memories, whose attention tells most.

        Early layers attend to a few function words whatever is asked, and layers with a window to
        what is near; in a sum over all layers these outweigh the others. Seen on SmolLM2 and
        Gemma-3-270M.
        """
        layers = self.layers()
        return layers[len(layers) // 2 :]


@dataclass(frozen=True)
class Citation:
    """A sentence or a recalled passage, and the attention that a generated text gave it.

    Attributes:
        start: first character in the document's text, or None if it was written as ids.
        end: the character after its last, or None.
        text: the quote, exactly as in the document, without spaces around it.
        copied: its part of the attention that copies, 0 to 1: that of each query to rows of the
            very token that it chose. 0 where nothing was copied, or what was said is not known.
        share: its part of all memory attention mass, 0 to 1; attention sinks and removed documents
            are left out of both.
        attention: its part of all attention in the layers that count, local tokens included; the
            mean over the generated tokens.
        token_attention: the same for each generated token.
        score: how much the prompt was found to be about it, as `RoutedPassage.score`; None for a
            sentence, and for a passage that the caller chose.
    """

    document: str
    start: int | None
    end: int | None
    text: str
    copied: float
    share: float
    attention: float
    token_attention: tuple[float, ...]
    score: float | None = None


@dataclass(frozen=True)
class RowCitation:
    """A row that one generated token attended to.

    Attributes:
        row: its id, in a document of the name `document`.
        token: its index in the document's token ids.
        share: its part of the memory attention mass of this generated token, above 0, at most 1;
            attention sinks and removed documents are left out.
    """

    row: int
    document: str
    token: int
    share: float


@dataclass(frozen=True)
class Span:
    """Tokens `first` to `stop` - 1 of a document, which may be cited.

    Attributes:
        pairs: (m,) int64, the pairs (generated token, row) that stand in it.
        score: as in `Citation`.
    """

    document: StoredDocument
    first: int
    stop: int
    pairs: np.ndarray
    score: float | None = None


class CitedDocuments:
    """The documents that a sequence's tokens attended to: spans of them, ranked and quoted."""

    def __init__(self, attended: Attended, sources: Sources) -> None:
        self._sources = sources
        self._catalog = sources.backend().catalog
        self._num_heads = np.maximum(attended.num_heads, 1)
        self._recorded, at = np.unique(attended.rows, return_inverse=True)
        owners = self._catalog.document_of_rows(self._recorded.tolist())
        names = np.array([owners.get(row, "") for row in self._recorded.tolist()], dtype=object)
        tokens, token_ids = np.zeros((2, len(names)), dtype=np.int64)
        is_content = names != ""
        documents = [self._catalog.document(name) for name in dict.fromkeys(owners.values())]
        for document in documents:
            places = np.flatnonzero(names == document.name)
            rows = self._recorded[places] - document.first_row
            tokens[places] = document.row_tokens[rows]
            token_ids[places] = document.token_ids[tokens[places]]
            is_content[places] = ~np.isin(rows, document.sink_rows)
        # from here on, pairs are those that count: of content, with some mass
        counted = np.flatnonzero(is_content[at] & (attended.mass > 0))
        self._generated, self._mass = attended.tokens[counted], attended.mass[counted]
        is_copied = token_ids[at[counted]] == attended.said[self._generated]
        self._copied = np.where(is_copied, self._mass, 0.0)
        self._rows, self._tokens = attended.rows[counted], tokens[at[counted]]
        self._names = names[at[counted]]
        self._documents = documents

    def sentences(self) -> list[Span]:
        """Return the sentences that were attended to."""
        spans = []
        for document in self._documents:
            pairs = np.flatnonzero(self._names == document.name)
            sentences = sentences_of(document)
            at = np.searchsorted(sentences[:, 0], self._tokens[pairs], side="right") - 1
            order = np.argsort(at, kind="stable")
            numbers, starts = np.unique(at[order], return_index=True)
            for number, part in zip(numbers, np.split(pairs[order], starts[1:]), strict=False):
                first, stop = sentences[number].tolist()
                spans.append(Span(document, first, stop, part))
        return spans

    def passages(self, recalled: Iterable[Recalled]) -> list[Span]:
        """Return those of the recalled passages whose rows are still there."""
        spans = []
        for passage, score in ((each.passage, each.score) for each in recalled):
            if not self._catalog.has_document(passage.document):
                continue
            document = self._catalog.document(passage.document)
            first, stop = document.first_row + passage.first, document.first_row + passage.stop
            if first not in self._recorded:  # another document has the name now
                continue
            pairs = np.flatnonzero((self._rows >= first) & (self._rows < stop))
            tokens = document.row_tokens[passage.first : passage.stop]
            spans.append(Span(document, int(tokens[0]), int(tokens[-1]) + 1, pairs, score))
        return spans

    def cite(self, spans: Iterable[Span], top: int | None) -> list[Citation]:
        """Return citations of the spans: by copied mass, then by mass, highest first."""
        parts = [
            (_part(self._copied, span.pairs), _part(self._mass, span.pairs), span) for span in spans
        ]
        parts.sort(key=lambda part: (-part[0], -part[1]))
        return [self._citation(span, copied, share) for copied, share, span in parts[:top]]

    def cite_rows(self, top: int | None) -> list[list[RowCitation]]:
        """Return, for each generated token, the rows that it copies, then the others, by mass."""
        num_tokens = len(self._num_heads)
        bounds = np.searchsorted(self._generated, np.arange(num_tokens + 1)).tolist()
        cited = []
        for start, stop in itertools.pairwise(bounds):
            mass, copied = self._mass[start:stop], self._copied[start:stop]
            best = np.lexsort((-mass, -copied))[:top] + start
            cited.append([self._row_citation(pair, float(mass.sum())) for pair in best.tolist()])
        return cited

    def _citation(self, span: Span, copied: float, share: float) -> Citation:
        generated, mass = self._generated[span.pairs], self._mass[span.pairs]
        attention = np.bincount(generated, mass, len(self._num_heads)) / self._num_heads  # (T,)
        quote = quoted(span.document, span.first, span.stop, self._sources.tokenizer)
        return Citation(
            span.document.name,
            *quote,
            copied=copied,
            share=share,
            attention=float(attention.mean()),
            token_attention=tuple(attention.tolist()),
            score=span.score,
        )

    def _row_citation(self, pair: int, total: float) -> RowCitation:
        return RowCitation(
            row=int(self._rows[pair]),
            document=str(self._names[pair]),
            token=int(self._tokens[pair]),
            share=float(self._mass[pair]) / total,
        )


def _part(mass: np.ndarray, pairs: np.ndarray) -> float:
    """Return which part of all mass some pairs have; 0 where there is none."""
    return float(mass[pairs].sum()) / (float(mass.sum()) or 1.0)


def quoted(
    document: StoredDocument, first: int, stop: int, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[int | None, int | None, str]:
    """Quote tokens `first` to `stop` - 1 of a document; `tokenizer` decodes one of ids.

    Returns:
        The first character and the one after the last, None for a document of ids, and the text,
        without spaces around it.
    """
    if document.text is None or document.offsets is None:
        if tokenizer is None:
            return None, None, ""
        return None, None, decode_whole(document.token_ids, first, stop, tokenizer).strip()
    spans = document.offsets[first:stop]
    spans = spans[spans[:, 1] > spans[:, 0]]  # without special tokens
    start, end = int(spans[:, 0].min(initial=len(document.text))), int(spans[:, 1].max(initial=0))
    text = document.text[start:end]
    start += len(text) - len(text.lstrip())
    return start, start + len(text.strip()), text.strip()
