"""Retrieved rows to documents and quoted spans: which passage made the model say it.

A recording holds, for every generated token, layer and head, the rows that were attended and their
share of the softmax. Summed over tokens, layers and heads, that share is a row's *mass*; the mass
of a passage is that of its tokens. Attention sinks are left out: their mass says nothing about
their content.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from emt.errors import MemoryUseError
from emt.memory import Memory
from emt.recording import Recording, Step
from memory_backends import StoredDocument

_SENTENCE_END = re.compile(r"(?<=[.!?])[\"'\u201d\u2019)\]]*\s+|\n+")
_MAX_PASSAGE = 400  # characters; a longer sentence is cut at a space
_TOKENS_PER_PASSAGE = 32  # of documents that were written as ids


@dataclass(frozen=True)
class Citation:
    """A passage that received memory attention.

    Attributes:
        document: its name.
        start: first character in the document's text, or None if it was written as ids.
        end: the character after its last, or None.
        text: the passage, exactly as in the document.
        share: of all memory attention mass, sinks left out; 0 to 1.
    """

    document: str
    start: int | None
    end: int | None
    text: str
    share: float


@dataclass(frozen=True)
class RowCitation:
    """A row that one generated token attended to.

    Attributes:
        row: its id.
        document: its document's name.
        token: its index in the document's token ids.
        share: of the memory attention mass of this generated token, sinks left out; 0 to 1.
    """

    row: int
    document: str
    token: int
    share: float


def cite(
    memory: Memory,
    recording: Recording,
    *,
    sequence: int = 0,
    num_tokens: int | None = None,
    beam_indices: Sequence[int] | torch.Tensor | None = None,
    top: int = 5,
) -> list[Citation]:
    """Rank the passages that carried most memory attention for a generated text.

    Args:
        memory: the memory that was recorded.
        recording: of one `generate` call.
        sequence: which row of the batch.
        num_tokens: how many generated tokens to explain, from the first; all if None.
        beam_indices: (T,) the batch row that each token came from, as `generate` returns them for
            beams.
        top: how many passages to return at the most.

    Returns:
        Passages (sentences) with their shares, highest first.

    Raises:
        MemoryUseError: the recording has no such sequence.
    """
    steps = _steps_of(recording, sequence, num_tokens, beam_indices)
    ids, mass = _mass(steps)
    found = _Rows(memory, ids)
    total = float(mass[found.is_content].sum())
    citations = []
    for document in found.documents.values():
        mine = np.flatnonzero(found.is_content & (found.owner == document.name))
        passages = _passages(document)
        at = np.searchsorted(passages[:, 0], found.token[mine], side="right") - 1
        for passage in np.unique(at):
            share = float(mass[mine[at == passage]].sum()) / total
            citations.append(_citation(memory, document, passages[passage], share))
    return sorted(citations, key=lambda citation: -citation.share)[:top]


def cite_tokens(
    memory: Memory,
    recording: Recording,
    *,
    sequence: int = 0,
    num_tokens: int | None = None,
    beam_indices: Sequence[int] | torch.Tensor | None = None,
    top: int = 3,
) -> list[list[RowCitation]]:
    """Rank, for every generated token, the rows that carried most of its memory attention.

    Args:
        memory: as in `cite`.
        recording: as in `cite`.
        sequence: as in `cite`.
        num_tokens: as in `cite`.
        beam_indices: as in `cite`.
        top: how many rows for each token, at the most.
    """
    explained = []
    for step in _steps_of(recording, sequence, num_tokens, beam_indices):
        ids, mass = _mass([step])
        found = _Rows(memory, ids)
        mass = np.where(found.is_content, mass, 0.0)
        best = np.argsort(-mass, kind="stable")[:top]
        explained.append(
            [
                RowCitation(
                    row=int(ids[at]),
                    document=str(found.owner[at]),
                    token=int(found.token[at]),
                    share=float(mass[at] / mass.sum()),
                )
                for at in best
                if mass[at] > 0
            ]
        )
    return explained


def _steps_of(
    recording: Recording,
    sequence: int,
    num_tokens: int | None,
    beam_indices: Sequence[int] | torch.Tensor | None,
) -> list[Step]:
    """Return the recorded steps, each cut down to the sequence's batch row: (H, Q, k)."""
    steps = list(recording)[:num_tokens]
    if beam_indices is None:
        rows = [sequence] * len(steps)
    else:
        rows = [int(row) for row in beam_indices if int(row) >= 0]
    if steps:
        batch = min(next(iter(step.values())).ids.shape[0] for step in steps)
        if not all(0 <= row < batch for row in rows):
            raise MemoryUseError(
                f"sequence must be 0 to {batch - 1}, the recorded batch; got {sequence}. "
                "For beams, pass the beam_indices that generate() returns."
            )
    return [
        {layer: retrieved.of_sequence(row) for layer, retrieved in step.items()}
        for step, row in zip(steps, rows, strict=False)
    ]


def _mass(steps: Iterable[Step]) -> tuple[np.ndarray, np.ndarray]:
    """Sum the softmax shares of each row; return ids, ascending, and their mass."""
    parts = [retrieved for step in steps for retrieved in step.values()]
    if not parts:
        return np.empty(0, dtype=np.int64), np.empty(0)
    ids = np.concatenate([part.ids.numpy().ravel() for part in parts])
    weights = np.concatenate([part.weights.numpy().ravel() for part in parts])
    unique, inverse = np.unique(ids[ids >= 0], return_inverse=True)
    return unique, np.bincount(inverse, weights=weights[ids >= 0], minlength=len(unique))


class _Rows:
    """Where rows come from: `owner`, `token`, and `is_content` (still there, and no sink)."""

    def __init__(self, memory: Memory, ids: np.ndarray) -> None:
        catalog = memory.backend.catalog
        owners = catalog.document_of_rows(ids.tolist())
        self.owner = np.array([owners.get(row, "") for row in ids.tolist()], dtype=object)
        self.token = np.zeros(len(ids), dtype=np.int64)
        self.is_content = self.owner != ""
        self.documents: dict[str, StoredDocument] = {}
        for name in dict.fromkeys(owners.values()):
            document = catalog.document(name)
            self.documents[name] = document
            mine = np.flatnonzero(self.owner == name)
            at = ids[mine] - document.first_row
            self.token[mine] = document.row_tokens[at]
            self.is_content[mine] = ~np.isin(at, document.sink_rows)


def _passages(document: StoredDocument) -> np.ndarray:
    """Return (first token, stop token) of each passage of a document, in order: (P, 2)."""
    num_tokens = len(document.token_ids)
    if document.text is None or document.offsets is None:
        starts = np.arange(0, num_tokens, _TOKENS_PER_PASSAGE)
    else:
        ends = np.array(_passage_ends(document.text))
        # A token belongs to the passage that its last character is in.
        passage = np.searchsorted(ends, document.offsets[:, 1], side="left")
        passage = np.maximum.accumulate(passage)
        starts = np.flatnonzero(np.diff(passage, prepend=-1))
    return np.stack([starts, np.append(starts[1:], num_tokens)], axis=1)


def _passage_ends(text: str) -> list[int]:
    """Return where passages end: at sentences, lines, or a space in what is too long."""
    ends: list[int] = []
    start = 0
    for stop in [*(match.end() for match in _SENTENCE_END.finditer(text)), len(text)]:
        while stop - start > _MAX_PASSAGE:
            space = text.rfind(" ", start + 1, start + _MAX_PASSAGE)
            start = space + 1 if space > start else start + _MAX_PASSAGE
            ends.append(start)
        if stop > start:
            ends.append(stop)
            start = stop
    return ends


def _citation(
    memory: Memory, document: StoredDocument, passage: np.ndarray, share: float
) -> Citation:
    first, stop = int(passage[0]), int(passage[1])
    if document.text is None or document.offsets is None:
        ids = document.token_ids[first:stop].tolist()
        text = "" if memory.tokenizer is None else str(memory.tokenizer.decode(ids))
        return Citation(document.name, None, None, text, share)
    spans = document.offsets[first:stop]
    start, end = int(spans[:, 0].min()), int(spans[:, 1].max())
    quoted = document.text[start:end]
    start += len(quoted) - len(quoted.lstrip())
    return Citation(document.name, start, start + len(quoted.strip()), quoted.strip(), share)
