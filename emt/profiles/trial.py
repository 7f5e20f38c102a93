"""A trial of a model's heads: texts and questions are read, and each head searches the texts.

A head is right about a question if most of what its queries retrieve is around the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import numpy as np
from torch import Tensor
from torch.nn.functional import normalize

from emt.errors import ConfigError, MemoryUseError
from emt.model.attached import AttachedModel
from emt.model.chat import prompt_ids
from emt.profiles.examples import Example
from emt.routing.evidence import Hits, best_windows
from emt.routing.head_search import TOPK
from emt.routing.queries import unit_queries
from emt.routing.question import question_of
from memory_backends import Rows

Head = tuple[int, int]  # layer, query head

DISTANCE = 64  # tokens between a memory and the queries
MAX_CHARACTERS = 8000  # of a text
_NEAR = 48  # rows between the evidence and the answer, at most
_BATCH = 256  # queries searched at once
# Prompts say more than a question does, and what they say is found nowhere or everywhere.
_ENDINGS = ("", "\nAnswer in a few words.", "", "\nPlease answer briefly and say why.")


@dataclass(frozen=True)
class HeadReader:
    """Reads texts as a memory does, and prompts as they are routed.

    Attributes:
        model: the attached model.
        tokenizer: the model's, a fast one, which tells where tokens stand in a text.
        read: turns token ids into rows as the memory does, window by window, and stores nothing.

    Raises:
        MemoryUseError: there is no tokenizer.
        ConfigError: the tokenizer is not a fast one.
    """

    model: AttachedModel
    tokenizer: Any
    read: Callable[[list[int]], Iterator[Rows]]

    def __post_init__(self) -> None:
        if self.tokenizer is None:
            raise MemoryUseError("a head profile needs a tokenizer. Give attach() one.")
        if not self.tokenizer.is_fast:
            raise ConfigError(
                "a head profile needs a fast tokenizer, which tells where tokens stand in a text; "
                f"got {type(self.tokenizer).__name__}. Give attach() a fast one."
            )

    def queries(self, prompt: str) -> dict[int, Tensor]:
        """Return the unit queries of the question in a prompt: layer -> (H, T, D) float32."""
        ids = prompt_ids(self.tokenizer, prompt)
        question = question_of(ids, self.tokenizer)
        layers = self.model.full_attention_layers
        of_layers = unit_queries(self.model, ids[: question.stop], layers, distance=DISTANCE)
        return {layer: queries[:, question.first :] for layer, queries in of_layers.items()}


@dataclass(frozen=True)
class Trial:
    """Texts and questions that were read.

    Attributes:
        keys: layer -> unit keys (Hkv, N, D) float32 of all texts.
        is_sink: (N,) bool, rows that are attention sinks, which no search finds.
        queries: layer -> unit queries (H, T, D) float32 of all questions, one after another.
        lengths: of each question, in tokens.
        answers: the row in the middle of each question's answer.
        means: layer -> (H, D) the means of `queries`.
    """

    keys: dict[int, Tensor]
    is_sink: Tensor
    queries: dict[int, Tensor]
    lengths: list[int]
    answers: list[float]
    means: dict[int, Tensor]

    @classmethod
    def read(
        cls, reader: HeadReader, examples: Sequence[Example], on_step: Callable[[str], object]
    ) -> Self:
        """Read the texts of examples, and their questions; tell `on_step` what is being done.

        The answers must stand in the first 8,000 characters of their texts.
        """
        keys, is_sink, texts = _read_texts(reader, examples, on_step)
        questions = []
        for number, example in enumerate(examples):
            on_step(f"question {number + 1}")
            questions.append(reader.queries(example.question + _ENDINGS[number % len(_ENDINGS)]))
        queries = {layer: torch.cat([each[layer] for each in questions], 1) for layer in keys}
        layer = next(iter(keys))
        return cls(
            keys,
            is_sink,
            queries,
            [of_layers[layer].shape[1] for of_layers in questions],
            [_middle_row(example, *texts[example.document]) for example in examples],
            {layer: of_layer.mean(1) for layer, of_layer in queries.items()},
        )

    def num_heads(self, layer: int) -> int:
        """Return how many query heads a layer has."""
        return self.means[layer].shape[0]

    def are_right(self, heads: Sequence[Head]) -> list[bool]:
        """Let some heads search together; tell of each question whether they find its answer."""
        retrieved = [self._search(*head) for head in heads]
        right = []
        for number, answer in enumerate(self.answers):
            scores = torch.cat([of_head[number][0] for of_head in retrieved])
            ids = torch.cat([of_head[number][1] for of_head in retrieved])
            windows = best_windows(Hits.of_search(ids.numpy(), scores.numpy()), 1, min_distance=1)
            right.append(bool(windows) and abs(windows[0].peak - answer) <= _NEAR)
        return right

    def _search(self, layer: int, head: int) -> list[tuple[Tensor, Tensor]]:
        """Search one head's keys for each token of each question: scores and ids, each (T, k)."""
        queries = self.queries[layer][head] - self.means[layer][head]
        group_size = self.num_heads(layer) // self.keys[layer].shape[0]
        keys = self.keys[layer][head // group_size]
        best = []
        for batch in torch.split(queries, _BATCH):
            scores = batch @ keys.T
            scores[:, self.is_sink] = -torch.inf
            best.append(scores.topk(min(TOPK, scores.shape[1]), dim=1))
        scores, ids = map(torch.cat, zip(*best, strict=True))
        ids[scores == -torch.inf] = -1
        of_questions = torch.split(scores, self.lengths), torch.split(ids, self.lengths)
        return list(zip(*of_questions, strict=True))


def _read_texts(
    reader: HeadReader, examples: Sequence[Example], on_step: Callable[[str], object]
) -> tuple[dict[int, Tensor], Tensor, dict[str, tuple[int, np.ndarray]]]:
    """Return layer -> unit keys (Hkv, N, D) of all texts, which rows are sinks, and the texts.

    Of each text that is its first row, and the characters [start, stop) of its tokens, (T, 2).
    """
    parts: dict[int, list[Tensor]] = {layer: [] for layer in reader.model.full_attention_layers}
    sinks: list[np.ndarray] = []
    texts: dict[str, tuple[int, np.ndarray]] = {}
    num_rows = 0
    for text in dict.fromkeys(example.document for example in examples):
        on_step(f"reading text {len(texts) + 1}")
        encoded = reader.tokenizer(
            text[:MAX_CHARACTERS],
            add_special_tokens=False,
            return_offsets_mapping=True,
            verbose=False,  # a text may be longer than what the model reads at once
        )
        texts[text] = num_rows, np.array(encoded["offset_mapping"])
        for rows in reader.read(encoded["input_ids"]):
            for layer, of_layer in parts.items():
                of_layer.append(rows.keys[layer].float().cpu())
            sinks.append(rows.sinks)
            num_rows += len(rows)
    keys = {layer: normalize(torch.cat(of_layer, 1), dim=-1) for layer, of_layer in parts.items()}
    return keys, torch.from_numpy(np.concatenate(sinks)), texts


def _middle_row(example: Example, first_row: int, offsets: np.ndarray) -> float:
    """Return the row in the middle of an answer."""
    is_answer = (offsets[:, 1] > example.start) & (offsets[:, 0] < example.end)
    return first_row + float(np.flatnonzero(is_answer).mean())
