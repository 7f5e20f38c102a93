"""Recalled passages, cited: where each stands, why it was chosen, and what attention it received.

Of all the attention that a layer's heads have to give when they choose a token, a passage gets what
its rows get, attention sinks left out. The share is absolute: what the passages do not get went to
the prompt and the answer themselves.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
import numpy as np

from emt.citations.citing import check_numbers, content_layers, mass_of, quoted, steps_of
from emt.citations.recording import Recording, Step
from emt.memory.memory import Memory
from emt.passage import Recalled, Retrieved


@dataclass(frozen=True)
class CitedPassage:
    """A passage that was recalled for a generated text.

    Attributes:
        document: its name.
        start: first character in the document's text, or None if it was written as ids.
        end: the character after its last, or None.
        text: the passage, exactly as in the document.
        score: how much the prompt was found to be about it, as `RoutedPassage.score`; None where
            the caller chose it.
        attention: its share of all attention of the layers that count, the mean over the generated
            tokens.
        token_attention: the same for each generated token.
    """

    document: str
    start: int | None
    end: int | None
    text: str
    score: float | None
    attention: float
    token_attention: tuple[float, ...]


def cite_passages(
    memory: Memory,
    recording: Recording,
    *,
    sequence: int = 0,
    num_tokens: int | None = None,
    beam_indices: Sequence[int] | torch.Tensor | None = None,
    layers: Collection[int] | None = None,
) -> list[CitedPassage]:
    """Say which passages were recalled for a generated text, and what they were worth to it.

    What was removed between recording and citing is left out.

    Args:
        memory: the memory that was recorded.
        recording: of one `generate` call, in passage mode or in a `recalling` block.
        sequence: as in `cite`.
        num_tokens: as in `cite`.
        beam_indices: as in `cite`.
        layers: whose attention counts; if None, `content_layers`, for early layers and those with a
            window attend to what is near, whatever is asked.

    Returns:
        The passages, by the attention they received, highest first; none if nothing was recalled.

    Raises:
        MemoryUseError: as `cite`.
    """
    check_numbers(num_tokens, 0)
    steps = steps_of(recording, sequence, num_tokens, beam_indices, layers)
    if not steps:
        return []
    if layers is None:
        telling = set(content_layers(memory))
        steps = [{idx: step[idx] for idx in step if idx in telling} or step for step in steps]
    received = [_received(step) for step in steps]
    recorded = {row for shares in received for row in shares}
    rows = [sequence] if beam_indices is None else [int(row) for row in beam_indices if row >= 0]
    cited = []
    for recalled in _recalled(recording, rows):
        name, first = recalled.passage.document, recalled.passage.first
        if not memory.backend.catalog.has_document(name):
            continue
        document = memory.backend.catalog.document(name)
        if document.first_row + first not in recorded:  # another document has the name now
            continue
        last = recalled.passage.stop - 1
        content = np.setdiff1d(np.arange(first, last + 1), document.sink_rows) + document.first_row
        shares = tuple(sum(of_row.get(row, 0.0) for row in content.tolist()) for of_row in received)
        tokens = document.row_tokens[[first, last]].tolist()
        start, end, text = quoted(memory, document, tokens[0], tokens[1] + 1)
        mean = sum(shares) / len(shares)
        cited.append(CitedPassage(name, start, end, text, recalled.score, mean, shares))
    return sorted(cited, key=lambda passage: -passage.attention)


def _recalled(recording: Recording, rows: Sequence[int]) -> Iterator[Recalled]:
    """Yield the passages of some sequences of a batch, each once.

    Of n prompts each has batch / n consecutive sequences: its beams.
    """
    batch = max((len(found.ids) for step in recording for found in step.values()), default=1)
    known = set()
    for prompts in recording.recalled:
        for prompt in sorted({row * len(prompts) // batch for row in rows}):
            for recalled in prompts[prompt]:
                if recalled.passage not in known:
                    known.add(recalled.passage)
                    yield recalled


def _received(step: Step) -> dict[int, float]:
    """Return what each row got of the attention of the query that chose a token, 0 to 1."""
    last = {
        layer_idx: Retrieved(
            layer_idx, found.ids[:, -1:], found.scores[:, -1:], found.weights[:, -1:]
        )
        for layer_idx, found in step.items()
    }
    num_heads = sum(len(found.ids) for found in last.values())
    ids, mass = mass_of([last])
    return dict(zip(ids.tolist(), (mass / num_heads).tolist(), strict=True))
