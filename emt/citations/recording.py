"""What the queries of a run attended to, step by step: the raw material of citations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from emt.passage import Recalled, Retrieved, Routed

Step = dict[int, Retrieved]  # layer -> what its queries retrieved in one forward


class Recording:
    """The retrievals of every forward since `Memory.recording` began, on the CPU.

    Iterating, indexing and `len` go over forwards: the first is the prompt's, each later one of a
    `generate` call is one new token's. A step maps a layer to a `Retrieved`, whose Q is 1 (the
    query that chose the next token) unless whole prompts are recorded. A step that was redone for
    the setting `uncertainty` is there once, as it was redone.

    Rows of recalled passages are there as if each query had retrieved them, in the order they were
    put, after those that it did retrieve; all heads and queries have the same.

    Attributes:
        whole_prompt: whether all queries of a prompt are recorded.
        routed: what each prompt was found to be about, where passages are recalled for it.
        recalled: of each set of prompts that passages were put into together, those of each.
        num_redone: how often a step was redone, counted for each sequence of a batch.
    """

    def __init__(self, *, whole_prompt: bool = False) -> None:
        self.whole_prompt = whole_prompt
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
        if not any(known is passages for known in self.recalled):
            self.recalled.append(passages)

    def redone(self, rows: Tensor) -> None:
        """Let the last step, a redo of the one before it, take its place.

        Args:
            rows: (B,) bool, which sequences were redone; the others keep what they had.
        """
        again, first = self._steps.pop(), self._steps.pop()
        rows = rows.cpu()
        self._num_replaced += sum(
            int((found.ids[rows, :, -1:] >= 0).sum()) for found in first.values()
        )
        self.num_redone += int(rows.sum())
        self._steps.append({idx: _replaced(first[idx], again[idx], rows) for idx in again})

    @property
    def num_retrieved(self) -> int:
        """Rows that the recorded queries retrieved or were given, over all layers and heads.

        What a redone step had retrieved before counts, too.
        """
        kept = sum(int((found.ids >= 0).sum()) for step in self for found in step.values())
        return kept + self._num_replaced

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
