"""Retrieved rows to documents and quoted spans: which passage made the model say it.

A recording holds, for every generated token, layer and head, the rows that were attended and their
share of the softmax. Summed over tokens, layers and heads, that share is a row's *mass*; the mass
of a passage is that of its tokens. Attention sinks are left out: their mass says nothing about
their content.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
import numpy as np

from emt.citations.recording import Recording, Step
from emt.citations.sentences import passages_of
from emt.errors import MemoryUseError
from emt.memory.memory import Memory
from emt.passage import Retrieved
from memory_backends import StoredDocument


@dataclass(frozen=True)
class Citation:
    """A passage that received memory attention.

    Attributes:
        document: its name.
        start: first character in the document's text, or None if it was written as ids.
        end: the character after its last, or None.
        text: the passage, exactly as in the document.
        share: of all memory attention mass, attention sinks and removed documents left out; more
            than 0, at most 1.
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
        share: of the memory attention mass of this generated token, attention sinks and removed
            documents left out; more than 0, at most 1.
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
    layers: Collection[int] | None = None,
    top: int = 5,
) -> list[Citation]:
    """Rank the passages that carried most memory attention for a generated text.

    What was removed between recording and citing is left out.

    Args:
        memory: the memory that was recorded.
        recording: of one `generate` call.
        sequence: which row of the batch.
        num_tokens: how many generated tokens to explain, from the first; all if None.
        beam_indices: (T,) the batch row that each token came from, as `generate` returns them for
            beams.
        layers: whose attention counts; all if None. `content_layers` gives those that tell most.
        top: how many passages to return at the most.

    Returns:
        Passages (sentences) with their shares, highest first; none if no memory was attended to.

    Raises:
        MemoryUseError: the recording has no such sequence, or a number is negative.
    """
    check_numbers(num_tokens, top)
    ids, mass = mass_of(steps_of(recording, sequence, num_tokens, beam_indices, layers))
    rows = _Rows(memory, ids)
    mass = np.where(rows.is_content, mass, 0.0)
    total = float(mass.sum())
    citations = []
    for document, mine in rows.documents:
        mine = mine[mass[mine] > 0]
        passages = passages_of(document)
        at = np.searchsorted(passages[:, 0], rows.token[mine], side="right") - 1
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
    layers: Collection[int] | None = None,
    top: int = 3,
) -> list[list[RowCitation]]:
    """Rank, for every generated token, the rows that carried most of its memory attention.

    Args:
        memory: as in `cite`.
        recording: as in `cite`.
        sequence: as in `cite`.
        num_tokens: as in `cite`.
        beam_indices: as in `cite`.
        layers: as in `cite`.
        top: how many rows for each token, at the most.

    Raises:
        MemoryUseError: as `cite`.
    """
    check_numbers(num_tokens, top)
    steps = steps_of(recording, sequence, num_tokens, beam_indices, layers)
    all_ids, _ = mass_of(steps)
    rows = _Rows(memory, all_ids)
    explained = []
    for step in steps:
        ids, mass = mass_of([step])
        at = np.searchsorted(all_ids, ids)
        mass = np.where(rows.is_content[at], mass, 0.0)
        best = np.argsort(-mass, kind="stable")[:top]
        explained.append(
            [
                RowCitation(
                    row=int(ids[row]),
                    document=str(rows.owner[at[row]]),
                    token=int(rows.token[at[row]]),
                    share=float(mass[row] / mass.sum()),
                )
                for row in best
                if mass[row] > 0
            ]
        )
    return explained


def content_layers(memory: Memory) -> list[int]:
    """Return the upper half of the layers that read memories: those that see the whole context.

    Early layers attend to a few function words whatever is asked, and layers with a window to what
    is near; in the sum over all layers these outweigh what others attend to for its content. Seen
    on SmolLM2 and Gemma-3-270M.
    """
    return memory.layers[len(memory.layers) // 2 :]


def check_numbers(num_tokens: int | None, top: int) -> None:
    """Refuse negative numbers.

    Raises:
        MemoryUseError: naming the one.
    """
    for name, number in (("num_tokens", num_tokens), ("top", top)):
        if number is not None and number < 0:
            raise MemoryUseError(f"{name} must be at least 0; got {number}.")


def steps_of(
    recording: Recording,
    sequence: int,
    num_tokens: int | None,
    beam_indices: Sequence[int] | torch.Tensor | None,
    layers: Collection[int] | None,
) -> list[Step]:
    """Return the recorded steps, cut down to the layers and the sequence's row: (H, Q, k).

    The arguments are those of `cite`.

    Raises:
        MemoryUseError: as `cite`.
    """
    steps = list(recording)[:num_tokens]
    if beam_indices is None:
        rows = [sequence] * len(steps)
    else:
        rows = [int(row) for row in beam_indices if int(row) >= 0]
    if steps:
        batch = min(next(iter(step.values())).ids.shape[0] for step in steps)
        wrong = [row for row in rows if not 0 <= row < batch]
        if wrong:
            name = "sequence" if beam_indices is None else "beam_indices"
            raise MemoryUseError(
                f"{name} must be 0 to {batch - 1}, the recorded batch; got {wrong[0]}. "
                "For beams, pass one row of the beam_indices that generate() returns."
            )
    return [
        {
            layer: retrieved.of_sequence(row)
            for layer, retrieved in step.items()
            if layers is None or layer in layers
        }
        for step, row in zip(steps, rows, strict=False)
    ]


def mass_of(steps: Iterable[Step]) -> tuple[np.ndarray, np.ndarray]:
    """Sum the softmax shares of each row over tokens, layers and heads.

    Args:
        steps: of one sequence, as `steps_of` returns them.

    Returns:
        (n,) int64 row ids, ascending, and (n,) float64, their mass.
    """
    parts = [_part(retrieved) for step in steps for retrieved in step.values()]
    if not parts:
        return np.empty(0, dtype=np.int64), np.empty(0)
    ids = np.concatenate([part[0] for part in parts])
    weights = np.concatenate([part[1] for part in parts])
    unique, inverse = np.unique(ids[ids >= 0], return_inverse=True)
    return unique, np.bincount(inverse, weights=weights[ids >= 0], minlength=len(unique))


def _part(retrieved: Retrieved) -> tuple[np.ndarray, np.ndarray]:
    """Return row ids, in which some may come twice, and what they got."""
    ids, weights = retrieved.ids, retrieved.weights  # (H, Q, k)
    if ids.stride()[:2] == (0, 0):  # recalled: the same rows for all heads and queries
        return ids[0, 0].numpy(), weights.sum((0, 1), dtype=torch.float64).numpy()
    return ids.numpy().ravel(), weights.numpy().ravel()


class _Rows:
    """Where rows come from: `owner`, `token`, and `is_content` (still there, and no sink).

    `documents` has each document with the positions of its rows.
    """

    def __init__(self, memory: Memory, ids: np.ndarray) -> None:
        catalog = memory.backend.catalog
        owners = catalog.document_of_rows(ids.tolist())
        self.owner = np.array([owners.get(row, "") for row in ids.tolist()], dtype=object)
        self.token = np.zeros(len(ids), dtype=np.int64)
        self.is_content = self.owner != ""
        self.documents: list[tuple[StoredDocument, np.ndarray]] = []
        for name in dict.fromkeys(owners.values()):
            document = catalog.document(name)
            mine = np.flatnonzero(self.owner == name)
            at = ids[mine] - document.first_row
            self.token[mine] = document.row_tokens[at]
            self.is_content[mine] = ~np.isin(at, document.sink_rows)
            self.documents.append((document, mine))


def _citation(
    memory: Memory, document: StoredDocument, passage: np.ndarray, share: float
) -> Citation:
    start, end, text = quoted(memory, document, int(passage[0]), int(passage[1]))
    return Citation(document.name, start, end, text, share)


def quoted(
    memory: Memory, document: StoredDocument, first: int, stop: int
) -> tuple[int | None, int | None, str]:
    """Quote tokens of a document.

    Args:
        memory: whose tokenizer decodes what was written as ids.
        document: the document.
        first: the first token.
        stop: one after the last token.

    Returns:
        The first character and the one after the last, None for a document of ids, and the text,
        without spaces around it.
    """
    if document.text is None or document.offsets is None:
        ids = document.token_ids[first:stop].tolist()
        text = "" if memory.tokenizer is None else str(memory.tokenizer.decode(ids))
        return None, None, text
    spans = document.offsets[first:stop]
    spans = spans[spans[:, 1] > spans[:, 0]]  # without special tokens
    start, end = int(spans[:, 0].min(initial=len(document.text))), int(spans[:, 1].max(initial=0))
    text = document.text[start:end]
    start += len(text) - len(text.lstrip())
    return start, start + len(text.strip()), text.strip()
