"""The rows of a batch while it is generated: their texts, their ends, the answers of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria

from emt.calls import overrides_of
from emt.citations.recording import Recording
from emt.ingest.carry import FIRST_ROWS
from emt.memory.memory import Memory
from emt.model.positions import max_positions
from emt.serving.answer_text import AnswerText
from emt.serving.prompt import Answer, Answered, FinishReason, PendingPrompt, Piece
from emt.serving.remembering import says_something, turn_in_batch
from emt.serving.sampling import Sampling
from emt.serving.sources import sources_of


class Progress(StoppingCriteria):
    """Follows the rows of one batch, and settles each prompt as soon as its rows have ended.

    Args:
        model: that generates.
        memory: its memory.
        batch: the prompts, each of which has `n` rows, one after the other.
        recording: of what the batch attends to; None if the memory is not used.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        memory: Memory,
        batch: Sequence[PendingPrompt],
        recording: Recording | None,
    ) -> None:
        tokenizer = cast(PreTrainedTokenizerBase, memory.tokenizer)
        end_ids = _end_ids(model)
        self._memory = memory
        self._batch = batch
        self._recording = recording
        self._positions = max_positions(model.config.get_text_config())
        self._rows = [
            _Row(pending, number, tokenizer, end_ids)
            for pending in batch
            for number in range(pending.prompt.n)
        ]
        self._num_steps = 0

    @property
    def samplings(self) -> list[Sampling]:
        """How each row chooses its tokens."""
        return [row.pending.prompt.sampling_of(row.number) for row in self._rows]

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        """Take the new token of each row, the last of (B, T); return (B,) which rows have ended."""
        if not self._num_steps:
            self._bound_rows()
        self._num_steps += 1
        for row, token_id in zip(self._rows, input_ids[:, -1].tolist(), strict=True):
            row.take(token_id)
        for pending in self._batch:
            rows = [number for number, row in enumerate(self._rows) if row.pending is pending]
            if not pending.is_settled and all(self._rows[number].has_ended for number in rows):
                self._settle(pending, rows, input_ids)
        ended = [row.has_ended for row in self._rows]
        return torch.tensor(ended, device=input_ids.device)

    def _bound_rows(self) -> None:
        """Let each row end before the model's last position: recalled rows stand on some, too."""
        if self._positions is None:
            return
        recalled = [] if self._recording is None else self._recording.recalled
        prompts = recalled[0] if recalled else ()
        times = len(self._rows) // max(len(prompts), 1)
        for number, row in enumerate(self._rows):
            passages = prompts[number // times] if prompts else ()
            num_rows = sum(each.passage.stop - each.passage.first for each in passages)
            num_rows += FIRST_ROWS if num_rows else 0
            room = self._positions - len(row.pending.prompt.token_ids) - num_rows
            row.max_new_tokens = max(min(row.max_new_tokens, room), 1)

    def _settle(self, pending: PendingPrompt, rows: Sequence[int], input_ids: Tensor) -> None:
        if pending.is_cancelled:
            return
        try:
            generation = overrides_of(self._memory).generation
            if generation is not None:  # else it tells only at its end which tokens it chose
                generation.text.returned(input_ids[:, -self._num_steps :], None)
            pending.tell(Answered([self._answer(number, input_ids) for number in rows]))
        except Exception as error:
            pending.fail(error)

    def _answer(self, number: int, input_ids: Tensor) -> Answer:
        row = self._rows[number]
        text, prompt = row.text, row.pending.prompt
        sources = sources_of(
            self._memory,
            self._recording,
            number,
            text.token_texts,
            access=prompt.access,
            by_token=prompt.by_token,
        )
        turn = None
        if prompt.conversation is not None and says_something(
            prompt.conversation, sources.passages
        ):
            lengths = [len(each.pending.prompt.token_ids) for each in self._rows]
            turn = turn_in_batch(
                self._memory,
                prompt.conversation,
                text.content,
                input_ids,
                number,
                lengths,
                self._num_steps,
            )
        return Answer(text.content, row.reason or "length", len(text.token_ids), sources, turn)


class _Row:
    """One answer that is being generated."""

    def __init__(
        self,
        pending: PendingPrompt,
        number: int,
        tokenizer: PreTrainedTokenizerBase,
        end_ids: frozenset[int],
    ) -> None:
        prompt = pending.prompt
        self.pending = pending
        self.number = number
        self.max_new_tokens = prompt.max_new_tokens
        self.reason: FinishReason | None = None
        self.text = AnswerText(tokenizer, prompt.token_ids[-1], prompt.stop, strip=prompt.is_chat)
        self._end_ids = end_ids

    @property
    def has_ended(self) -> bool:
        return self.reason is not None or self.pending.is_cancelled

    def take(self, token_id: int) -> None:
        if self.has_ended:
            return
        text = self.text
        piece = text.add(token_id)
        if token_id in self._end_ids or text.is_stopped:
            self.reason = "stop"
        elif len(text.token_ids) >= self.max_new_tokens:
            self.reason = "length"
        if self.reason is not None:
            piece += text.end()
        if piece:
            self.pending.tell(Piece(self.number, piece))


def _end_ids(model: PreTrainedModel) -> frozenset[int]:
    """Return the ids that end an answer."""
    config = getattr(model, "generation_config", None)
    ids = getattr(config, "eos_token_id", None)
    if ids is None:
        return frozenset()
    return frozenset([ids] if isinstance(ids, int) else ids)
