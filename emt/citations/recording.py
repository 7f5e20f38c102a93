"""What the queries of a run attended to, step by step, and the documents that it comes from."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from emt.citations.attended import batch_rows, sum_mass
from emt.citations.citing import Citation, CitedDocuments, RowCitation, Sources
from emt.errors import MemoryUseError
from emt.passage import Passage, Recalled, Retrieved, Routed, Step


class Recording:
    """The retrievals of every forward in a `Memory.recording` block, on the CPU; it can be cited.

    Iterating, indexing and `len` go over forwards: the first is the prompt's, each later one of a
    `generate` call is one new token's. A step maps a layer to a `Retrieved`, whose Q is 1 (the
    query that chose the next token) unless whole prompts are recorded. A step that was redone for
    the setting `uncertainty` is there once, as it was redone.

    Rows of recalled passages are recorded as if each query had retrieved them, after those that it
    did retrieve, in their order in the prompt; all heads and queries have the same.

    Args:
        sources: where citations look up the text of rows.

    Attributes:
        whole_prompt: whether all queries of a prompt are recorded.
        routed: what each prompt was found to be about, where passages are recalled for it.
        recalled: of each set of prompts that passages were put into together, those of each.
        num_redone: how often a step was redone, counted for each sequence of a batch.
    """

    def __init__(self, sources: Sources, *, whole_prompt: bool = False) -> None:
        self.whole_prompt = whole_prompt
        self._sources = sources
        self._steps: list[Step] = []
        self._num_replaced = 0  # rows that redone steps had retrieved before
        self.num_redone = 0
        self.routed: list[Routed] = []
        self.recalled: list[Sequence[Sequence[Recalled]]] = []

    def add(self, retrieved: Retrieved) -> None:
        """Append one layer's retrievals; a layer seen before begins the next step."""
        kept = slice(None) if self.whole_prompt else slice(-1, None)
        if not self._steps or max(self._steps[-1]) >= retrieved.layer_idx:
            self._steps.append({})
        self._steps[-1][retrieved.layer_idx] = replace(
            retrieved,
            ids=_kept(retrieved.ids[:, :, kept]),
            scores=_kept(retrieved.scores[:, :, kept]),
            weights=_kept(retrieved.weights[:, :, kept]),
        )

    def route(self, routed: Sequence[Routed]) -> None:
        """Append what the prompts of a forward are about."""
        self.routed.extend(routed)

    def recall(self, passages: Sequence[Sequence[Recalled]]) -> None:
        """Keep which passages the forward that runs has, those of each prompt."""
        if not any(kept is passages for kept in self.recalled):
            self.recalled.append(passages)

    def redone(self, rows: Tensor) -> None:
        """Let the last step, a redo of the one before it, take its place.

        Args:
            rows: (B,) bool, which sequences were redone; the others keep what they had.
        """
        again, first = self._steps.pop(), self._steps.pop()
        rows = rows.cpu()
        self._num_replaced += sum(
            int((retrieved.ids[rows, :, -1:] >= 0).sum()) for retrieved in first.values()
        )
        self.num_redone += int(rows.sum())
        self._steps.append({idx: _replaced(first[idx], again[idx], rows) for idx in again})

    @property
    def num_retrieved(self) -> int:
        """Rows that the recorded queries retrieved or were given, over all layers and heads.

        What a redone step had retrieved before counts, too.
        """
        kept = sum(int((layer.ids >= 0).sum()) for step in self for layer in step.values())
        return kept + self._num_replaced

    def citations(
        self,
        by: Literal["sentence", "passage"] = "sentence",
        *,
        sequence: int = 0,
        num_tokens: int | None = None,
        beam_indices: Sequence[int] | Tensor | None = None,
        layers: Collection[int] | None = None,
        top: int | None = 5,
    ) -> list[Citation]:
        """Rank what carried most memory attention when the tokens of a text were chosen.

        The recording must be of one `generate` call. The query that chose a token counts, even if
        whole prompts are recorded. What was removed since is left out.

        Args:
            by: rank the sentences of all documents, or the passages that were recalled.
            sequence: the row of the batch.
            num_tokens: how many generated tokens to explain, from the first; None for all.
            beam_indices: (T,) instead of `sequence`, the batch row that each token came from, as
                `generate` returns them for beams.
            layers: whose attention counts; None for the upper half of those that read memories,
                which tell most.
            top: how many to return at the most; None for all.

        Returns:
            Sentences that were attended to, or all recalled passages, by the attention that they
            received, highest first; none if there was no memory.

        Raises:
            MemoryUseError: the recording has no such sequence, a number is negative, or `by` is
                another word.
        """
        if by not in ("sentence", "passage"):
            raise MemoryUseError(f"by must be 'sentence' or 'passage'; got {by!r}.")
        documents, rows = self._cited_documents(sequence, num_tokens, beam_indices, layers, top)
        if by == "sentence":
            return documents.cite(documents.sentences(), top)
        return documents.cite(documents.passages(self._recalled_for(rows)), top)

    def token_citations(
        self,
        *,
        sequence: int = 0,
        num_tokens: int | None = None,
        beam_indices: Sequence[int] | Tensor | None = None,
        layers: Collection[int] | None = None,
        top: int | None = 3,
    ) -> list[list[RowCitation]]:
        """Rank, for every generated token, the rows that carried most of its memory attention.

        Arguments and errors are those of `citations`.
        """
        documents, _ = self._cited_documents(sequence, num_tokens, beam_indices, layers, top)
        return documents.cite_rows(top)

    def _cited_documents(
        self,
        sequence: int,
        num_tokens: int | None,
        beam_indices: Sequence[int] | Tensor | None,
        layers: Collection[int] | None,
        top: int | None,
    ) -> tuple[CitedDocuments, list[int]]:
        """Return what can be cited for a sequence, and the batch rows that its tokens came from."""
        for name, number in (("num_tokens", num_tokens), ("top", top)):
            if number is not None and number < 0:
                raise MemoryUseError(f"{name} must be at least 0; got {number}.")
        steps = self._steps[:num_tokens]
        rows = batch_rows(steps, sequence, beam_indices)
        attended = sum_mass(steps, rows, layers, self._sources.content_layers)
        return CitedDocuments(attended, self._sources), rows

    def _recalled_for(self, rows: Iterable[int]) -> list[Recalled]:
        """Return the passages that some rows of the batch were given, each once.

        Of n prompts each has batch / n consecutive sequences: its beams.
        """
        batch = max((len(layer.ids) for step in self for layer in step.values()), default=1)
        recalled: dict[Passage, Recalled] = {}
        for prompts in self.recalled:
            for prompt in sorted({row * len(prompts) // batch for row in rows}):
                for each in prompts[prompt]:
                    recalled.setdefault(each.passage, each)
        return list(recalled.values())

    def __len__(self) -> int:
        return len(self._steps)

    def __getitem__(self, step: int) -> Step:
        return self._steps[step]

    def __iter__(self) -> Iterator[Step]:
        return iter(self._steps)


def _replaced(first: Retrieved, again: Retrieved, rows: Tensor) -> Retrieved:
    """Return a layer's retrievals with the last query's, of some sequences, as they were redone."""
    more = again.ids.shape[-1] - first.ids.shape[-1]
    parts: dict[str, Any] = {}
    for name, nothing in (("ids", -1), ("scores", -torch.inf), ("weights", 0.0)):
        part = pad(getattr(first, name), (0, more), value=nothing)  # (B, H, Q, k)
        part[rows, :, -1:] = getattr(again, name)[rows]
        parts[name] = part
    return replace(first, **parts)


def _kept(part: Tensor) -> Tensor:
    part = part.detach()
    if part.untyped_storage().nbytes() < part.numel() * part.element_size():
        return part.cpu()  # the same for many heads and queries: stays small
    return part.to("cpu", copy=True)  # a view would keep the whole prompt's
