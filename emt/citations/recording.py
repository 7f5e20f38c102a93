"""What the queries of a run attended to, step by step, and the documents that it comes from."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from emt.citations.attended import of_sequence, sum_mass
from emt.citations.citing import Citation, CitedDocuments, RowCitation, Sources
from emt.citations.generated import ChosenTokens, choosing_queries
from emt.errors import MemoryUseError
from emt.passage import Passage, Recalled, Retrieved, Routed, Step


class Recording:
    """The retrievals of every forward in a `Memory.recording` block, on the CPU; it can be cited.

    Iterating, indexing and `len` go over forwards in which something was retrieved: of a `generate`
    call, the first is the prompt's, and each later one is one new token's, or that of several
    drafted ones. A step maps a layer to a `Retrieved`, whose queries are those that chose a next
    token (Q is 1 but for drafts) unless whole prompts are recorded. A step that was redone for the
    setting `uncertainty` is there once, as it was redone. Forwards beside the text that `generate`
    returns are left out: those of unconditional prompts and of assistants.

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
        self._forwards: dict[ChosenTokens, Step] = {}
        self._num_replaced = 0  # rows that redone steps had retrieved before
        self.num_redone = 0
        self.routed: list[Routed] = []
        self.recalled: list[Sequence[Sequence[Recalled]]] = []

    def add(self, retrieved: Retrieved, tokens: ChosenTokens | None = None) -> None:
        """Append one layer's retrievals.

        Args:
            retrieved: of all queries of a forward, or of its last ones.
            tokens: the tokens that the forward chooses, the same object for all of its layers; None
                for a single one, where a layer seen before begins the next forward.
        """
        if tokens is None:
            last = next(reversed(self._forwards), None)
            is_next = last is None or max(self._forwards[last]) >= retrieved.layer_idx
            tokens = ChosenTokens() if last is None or is_next else last
        if not (self.whole_prompt or tokens.num_tokens):
            return
        kept = slice(None if self.whole_prompt else -tokens.num_tokens, None)
        self._forwards.setdefault(tokens, {})[retrieved.layer_idx] = replace(
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

    def redone(self, rows: Tensor, tokens: ChosenTokens, again: ChosenTokens) -> None:
        """Let a forward that is a redo of another one take its place.

        Args:
            rows: (B,) bool, which sequences were redone; the others keep what they had.
            tokens: what the forward chose at first.
            again: what the redo chose.
        """
        rows = rows.cpu()
        self.num_redone += int(rows.sum())
        first, redone = self._forwards.get(tokens), self._forwards.pop(again, None)
        if first is None or redone is None:  # the recording began, or ended, meanwhile
            return
        self._num_replaced += sum(
            int((retrieved.ids[rows, :, -1:] >= 0).sum()) for retrieved in first.values()
        )
        self._forwards[tokens] = {idx: _replaced(first[idx], redone[idx], rows) for idx in redone}

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
        """Rank what a text was copied from, or else what its queries attended to.

        First comes what has most of the attention that copies: each query's to rows of the very
        token that it chose. What copies nothing follows, by the attention that it received; so
        does everything where it is not known what was said: in forwards by hand, in a call that
        was broken off, and for beams unless the call returned `beam_indices`.

        The text is what a `generate` call returned; that of several calls, one after the other; and
        of forwards made by hand, one token for each. The query that chose a token counts, even if
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
            Sentences that were attended to, or all recalled passages; none if there was no memory.

        Raises:
            MemoryUseError: the recording has no such sequence, a number is negative, `by` is
                another word, or it cannot be told which queries chose the tokens.
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
        """Rank, for every generated token, the rows that its query attended to.

        Those of the same token come first, since it is copied from them, then the others; both by
        attention. Arguments and errors are those of `citations`.
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
    ) -> tuple[CitedDocuments, Sequence[int]]:
        """Return what can be cited for a sequence, and the batch rows that its tokens came from."""
        for name, number in (("num_tokens", num_tokens), ("top", top)):
            if number is not None and number < 0:
                raise MemoryUseError(f"{name} must be at least 0; got {number}.")
        queries = choosing_queries(self._forwards)[:num_tokens]
        chosen = of_sequence(queries, sequence, beam_indices)
        attended = sum_mass(chosen, layers, self._sources.content_layers)
        return CitedDocuments(attended, self._sources), chosen.rows

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
        return len(self._forwards)

    def __getitem__(self, step: int) -> Step:
        return list(self._forwards.values())[step]

    def __iter__(self) -> Iterator[Step]:
        return iter(list(self._forwards.values()))


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
