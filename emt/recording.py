"""What the queries of a run retrieved, step by step: the raw material of citations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from emt.retrieval import Retrieved

Step = dict[int, Retrieved]  # layer -> what its queries retrieved in one forward


class Recording:
    """The retrievals of every forward since `Memory.recording` began, on the CPU.

    Iterating, indexing and `len` go over forwards: the first is the prompt's, each later one of a
    `generate` call is one new token's. A step maps a layer to a `Retrieved`, whose Q is 1 (the
    query that chose the next token) unless whole prompts are recorded.
    """

    def __init__(self, *, whole_prompt: bool = False) -> None:
        self._whole_prompt = whole_prompt
        self._steps: list[Step] = []

    def add(self, retrieved: Retrieved) -> None:
        """Append one layer's retrievals; a layer seen before begins the next step."""
        kept = slice(None) if self._whole_prompt else slice(-1, None)
        if not self._steps or max(self._steps[-1]) >= retrieved.layer_idx:
            self._steps.append({})
        self._steps[-1][retrieved.layer_idx] = replace(
            retrieved,
            ids=_kept(retrieved.ids[:, :, kept]),
            scores=_kept(retrieved.scores[:, :, kept]),
            weights=_kept(retrieved.weights[:, :, kept]),
        )

    def __len__(self) -> int:
        return len(self._steps)

    def __getitem__(self, step: int) -> Step:
        return self._steps[step]

    def __iter__(self) -> Iterator[Step]:
        return iter(self._steps)


def _kept(part: Tensor) -> Tensor:
    return part.detach().to("cpu", copy=True)  # a view would keep the whole prompt's
