"""Prompts that wait are answered together: one `generate`, each with passages of its own.

`generate` stays the stock one and greedy. A logits processor lets each row choose its own tokens, a
stopping criterion sees every new token, hands its text on, and says which rows have ended.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from emt.calls import overrides_of
from emt.citations.recording import Recording
from emt.ingest.carry import FIRST_ROWS
from emt.memory.memory import Memory
from emt.model.devices import input_device
from emt.model.positions import max_positions
from emt.serving.answer_text import AnswerText
from emt.serving.limits import Limits
from emt.serving.prompt import Answer, Answered, FinishReason, PendingPrompt, Piece
from emt.serving.remembering import hidden, says_something, turn_in_batch
from emt.serving.sampling import Sampler
from emt.serving.sources import sources_of

_logger = logging.getLogger(__name__)


class Generator:
    """Answers batches of prompts; only the engine's thread calls it.

    Args:
        model: the model that the memory is attached to.
        memory: with a tokenizer.
        limits: of a batch.
        on_batch: told how many answers each batch has.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        memory: Memory,
        limits: Limits,
        on_batch: Callable[[int], object],
    ) -> None:
        self._model = model
        self._memory = memory
        self._limits = limits
        self._on_batch = on_batch

    def together(self, waiting: Sequence[PendingPrompt]) -> list[PendingPrompt]:
        """Return which of the prompts that wait are answered in the next batch."""
        batch: list[PendingPrompt] = []
        group, num_rows, width = None, 0, 0
        for pending in waiting:
            if pending.is_cancelled:  # taken out of the queue, and left out of the batch
                batch.append(pending)
                continue
            prompt = pending.prompt
            rows, widest = num_rows + prompt.n, max(width, prompt.width)
            limits = self._limits
            fits = rows <= limits.max_batch and rows * widest <= limits.max_batch_tokens
            if group is None or (fits and prompt.group == group):
                batch.append(pending)
                group, num_rows, width = prompt.group, rows, widest
        return batch

    def answer(self, batch: Sequence[PendingPrompt]) -> None:
        """Answer prompts, or tell them why not. What one of them does wrong harms no other."""
        batch = [
            pending for pending in batch if not pending.is_cancelled and self._checked(pending)
        ]
        if not batch:
            return
        self._on_batch(sum(pending.prompt.n for pending in batch))
        try:
            self._generate(batch)
        except Exception as error:
            open_ones = [pending for pending in batch if not pending.is_settled]
            if len(batch) > 1:
                _logger.warning("a batch of %d failed: each is answered alone", len(batch))
            for pending in open_ones:
                if len(batch) == 1 or pending.has_text:
                    pending.fail(error)
                else:
                    self.answer([pending])

    def _checked(self, pending: PendingPrompt) -> bool:
        """Tell whether a prompt's settings are right; if not, it is told."""
        try:
            with self._memory.using(**self._settings([pending])):
                return True
        except Exception as error:
            pending.fail(error)
            return False

    def _generate(self, batch: Sequence[PendingPrompt]) -> None:
        prompts = [p.prompt.token_ids for p in batch for _ in range(p.prompt.n)]
        input_ids, attention_mask = (part.to(input_device(self._model)) for part in padded(prompts))
        is_recorded = batch[0].prompt.settings.get("enabled", True)
        with (
            torch.no_grad(),
            self._memory.using(**self._settings(batch)),
            self._memory.recording() if is_recorded else nullcontext() as recording,
        ):
            progress = Progress(self._model, self._memory, batch, recording)
            cast(Any, self._model).generate(
                input_ids,
                attention_mask=attention_mask,
                max_new_tokens=max(pending.prompt.max_new_tokens for pending in batch),
                do_sample=False,
                num_beams=1,
                use_cache=True,
                pad_token_id=int(input_ids[0, 0]),  # of rows that have ended
                logits_processor=LogitsProcessorList([Sampler(progress.samplings)]),
                stopping_criteria=StoppingCriteriaList([progress]),
            )

    def _settings(self, batch: Sequence[PendingPrompt]) -> dict[str, Any]:
        """Return the settings of `Memory.using` for prompts of one group.

        Raises:
            DocumentError: a document is unknown, or not to be seen; `where` is not a filter.
        """
        prompts, catalog = [pending.prompt for pending in batch], self._memory.backend.catalog
        scopes = [each.access.scope(catalog, each.documents, each.where) for each in prompts]
        for prompt, scope in zip(prompts, scopes, strict=True):
            if prompt.conversation is not None:  # what the prompt has is not recalled as well
                names = scope.get("documents", catalog.document_names())
                out = hidden(catalog, prompt.access, prompt.conversation)
                scope["documents"] = [name for name in names if name not in out]
        settings = dict(prompts[0].settings)
        for name in ("documents", "where"):
            wanted = [scope.get(name) for scope in scopes]
            if len({repr(one) for one in wanted}) == 1:  # not ==: True is not 1 here
                settings[name] = wanted[0]
            else:
                of_rows = zip(prompts, wanted, strict=True)
                settings[name] = [one for prompt, one in of_rows for _ in range(prompt.n)]
        return settings


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
    def samplings(self) -> list[Any]:
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
        prompts = (
            self._recording.recalled[0] if self._recording and self._recording.recalled else ()
        )
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


def padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return prompts as a batch, (B, T) int64 padded on the left, and its mask.

    Each is padded with its own first token: nothing attends to padding, but processors that look at
    all ids, as a penalty of repetition does, find no token that its prompt does not have.
    """
    width = max(map(len, prompts))
    ids = [[prompt[0]] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids), torch.tensor(mask)


def _end_ids(model: PreTrainedModel) -> frozenset[int]:
    """Return the ids that end an answer."""
    config = getattr(model, "generation_config", None)
    ids = getattr(config, "eos_token_id", None)
    if ids is None:
        return frozenset()
    return frozenset([ids] if isinstance(ids, int) else ids)
