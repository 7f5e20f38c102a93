"""A trial of a model's heads: texts and questions are read, and each head searches the texts.

What a head finds is evidence, as in routing (`emt/routing/evidence.py`): of each run of rows, and
for each question. A head is the better, the farther the evidence where the answer stands is above
that of everywhere else.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import numpy as np
from torch import Tensor
from torch.nn.functional import max_pool1d, normalize, pad
from torch.nn.utils.rnn import pad_sequence

from emt.errors import ConfigError, MemoryUseError
from emt.ingest.batch import batches
from emt.model.attached import AttachedModel
from emt.model.chat import prompt_ids
from emt.profiles.examples import Example
from emt.routing.evidence import BLOCK, BLOCKS_PER_WINDOW
from emt.routing.head_search import TOPK
from emt.routing.queries import unit_queries
from emt.routing.question import question_of
from memory_backends import Rows

Head = tuple[int, int]  # layer, query head

DISTANCE = 64  # tokens between a memory and the queries
MAX_CHARACTERS = 8000  # of a text
_NEAR = 48  # rows between the middle of a window and the answer, at most
_BLOCKS_PER_HIT = 4  # a query retrieves a quarter of all blocks of rows, at most 64 blocks
_BATCH = 256  # queries searched at once
_TOKENS_AT_ONCE = 1024  # of prompts that share a forward
_MIN_DEVIATION = 0.05  # of the best window's evidence
_NOT_FOUND = -4.0  # below all similarities


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

    def tokenize(self, text: str) -> tuple[list[int], np.ndarray]:
        """Return the token ids of a text, and the characters [start, stop) of each, (T, 2)."""
        encoded = self.tokenizer(
            text[:MAX_CHARACTERS],
            add_special_tokens=False,
            return_offsets_mapping=True,
            verbose=False,  # a text may be longer than what the model reads at once
        )
        return encoded["input_ids"], np.array(encoded["offset_mapping"])

    def prompt(self, question: str) -> tuple[Tensor, int]:
        """Return a prompt's tokens to the end of its question, (T,), and the first that asks."""
        ids = prompt_ids(self.tokenizer, question)
        asked = question_of(ids, self.tokenizer)
        return ids[: asked.stop], asked.first

    def queries(self, prompts: Sequence[Tensor]) -> dict[int, Tensor]:
        """Return the unit queries of prompts, each (T,), from one forward: layer -> (B, H, T, D).

        T is that of the longest; what comes after the end of another one is of padding.
        """
        padded = pad_sequence(list(prompts), batch_first=True)
        return unit_queries(self.model, padded, self.model.full_attention_layers, distance=DISTANCE)


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
        cls,
        reader: HeadReader,
        examples: Sequence[Example],
        on_tokens: Callable[[int, int], object],
    ) -> Self:
        """Read the texts of examples, and their questions.

        The answers must stand in the first 8,000 characters of their texts. `on_tokens` is told how
        many tokens were read, and how many there are.
        """
        documents = dict.fromkeys(example.document for example in examples)
        texts = [reader.tokenize(document) for document in documents]
        prompts = [reader.prompt(example.question) for example in examples]
        lengths = [len(ids) for ids, _ in texts]
        progress = _Progress(on_tokens, sum(lengths) + sum(len(ids) for ids, _ in prompts))
        keys, is_sink = _read_texts(reader, [ids for ids, _ in texts], progress)
        queries = _read_prompts(reader, prompts, progress)
        starts = itertools.accumulate(lengths, initial=0)
        places = {
            document: (start, offsets)
            for document, start, (_, offsets) in zip(documents, starts, texts, strict=False)
        }
        return cls(
            keys,
            is_sink,
            queries,
            [len(ids) - first for ids, first in prompts],
            [_middle_row(example, *places[example.document]) for example in examples],
            {layer: of_layer.mean(1) for layer, of_layer in queries.items()},
        )

    @property
    def heads(self) -> list[Head]:
        """All heads that were tried."""
        return [(layer, head) for layer in self.keys for head in range(len(self.means[layer]))]

    def evidence(self, heads: Sequence[Head]) -> Tensor:
        """Let heads search for each question: the evidence (Q, W) float32 of each window.

        Windows are runs of 64 rows, each beginning 16 rows after the one before.
        """
        return torch.stack([self._evidence(*head) for head in heads]).sum(0)

    def _evidence(self, layer: int, head: int) -> Tensor:
        queries = self.queries[layer][head] - self.means[layer][head]  # (T, D)
        group_size = len(self.means[layer]) // self.keys[layer].shape[0]
        keys = self.keys[layer][head // group_size]  # (N, D)
        best = []
        for batch in torch.split(queries, _BATCH):
            scores = (batch @ keys.T).masked_fill_(self.is_sink, _NOT_FOUND)  # (T', N)
            scores = pad(scores, (0, -len(keys) % BLOCK), value=_NOT_FOUND)
            blocks = scores.view(len(batch), -1, BLOCK).amax(-1)  # (T', blocks)
            k = min(TOPK, -(-blocks.shape[1] // _BLOCKS_PER_HIT))
            excess = (blocks - blocks.topk(k, dim=1).values[:, -1:]).clamp(min=0)
            best.append(max_pool1d(excess, min(BLOCKS_PER_WINDOW, excess.shape[1]), stride=1))
        of_questions = torch.split(torch.cat(best), self.lengths)
        return torch.stack([of_tokens.sum(0) for of_tokens in of_questions])

    def is_near(self, num_windows: int) -> Tensor:
        """Tell which windows are around the answer of each question, (Q, W) bool."""
        middles = torch.arange(num_windows) * BLOCK + BLOCK * BLOCKS_PER_WINDOW // 2
        return (middles - torch.tensor(self.answers)[:, None]).abs() <= _NEAR

    def deviations(self, evidence: Tensor) -> tuple[Tensor, Tensor]:
        """Tell how far the evidence around the answers stands above that of all other windows.

        Args:
            evidence: (Q, W) float32.

        Returns:
            For each question, in standard deviations of the other windows' evidence, (Q,) float32;
            and whether the best window is around the answer, (Q,) bool.
        """
        is_near = self.is_near(evidence.shape[1])
        num_others = (~is_near).sum(1).clamp(min=1)
        of_answer = evidence.masked_fill(~is_near, 0).amax(1)
        of_others = evidence.masked_fill(is_near, 0)
        mean = of_others.sum(1) / num_others
        variance = (of_others**2).sum(1) / num_others - mean**2
        least = _MIN_DEVIATION * evidence.amax(1).clamp(min=1e-6)  # where others hardly differ
        deviation = variance.clamp(min=0).sqrt().maximum(least)
        return (of_answer - mean) / deviation, of_answer > of_others.amax(1)


class _Progress:
    """Tells `on_tokens` how many of all tokens were read."""

    def __init__(self, on_tokens: Callable[[int, int], object], total: int) -> None:
        self._on_tokens, self._num_read, self._total = on_tokens, 0, total
        self.add(0)

    def add(self, num_tokens: int) -> None:
        self._num_read += num_tokens
        self._on_tokens(self._num_read, self._total)


def _read_texts(
    reader: HeadReader, texts: Sequence[list[int]], progress: _Progress
) -> tuple[dict[int, Tensor], Tensor]:
    """Return layer -> unit keys (Hkv, N, D) of all texts, and which rows are sinks, (N,)."""
    keys: dict[int, list[Tensor]] = {layer: [] for layer in reader.model.full_attention_layers}
    sinks: list[np.ndarray] = []
    for token_ids in texts:
        for rows in reader.read(token_ids):
            for layer, of_layer in keys.items():
                of_layer.append(normalize(rows.keys[layer].float().cpu(), dim=-1))
            sinks.append(rows.sinks)
            progress.add(len(rows))
    unit_keys = {layer: torch.cat(of_layer, 1) for layer, of_layer in keys.items()}
    return unit_keys, torch.from_numpy(np.concatenate(sinks))


def _read_prompts(
    reader: HeadReader, prompts: Sequence[tuple[Tensor, int]], progress: _Progress
) -> dict[int, Tensor]:
    """Return layer -> unit queries (H, T, D) of what asks in all prompts, one after another.

    Prompts of similar lengths share a forward.
    """
    lengths = [len(ids) for ids, _ in prompts]
    of_prompts: dict[int, dict[int, Tensor]] = {}
    for batch in batches(lengths, _TOKENS_AT_ONCE):
        together = reader.queries([prompts[number][0] for number in batch])
        for place, number in enumerate(batch):
            asking = slice(prompts[number][1], lengths[number])
            of_prompts[number] = {
                layer: queries[place, :, asking].clone() for layer, queries in together.items()
            }
            progress.add(lengths[number])
    return {
        layer: torch.cat([of_prompts[number][layer] for number in range(len(prompts))], 1)
        for layer in reader.model.full_attention_layers
    }


def _middle_row(example: Example, first_row: int, offsets: np.ndarray) -> float:
    """Return the row in the middle of an answer."""
    is_answer = (offsets[:, 1] > example.start) & (offsets[:, 0] < example.end)
    return first_row + float(np.flatnonzero(is_answer).mean())
