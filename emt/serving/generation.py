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
    StoppingCriteriaList,
)

from emt.memory.memory import Memory
from emt.model.devices import input_device
from emt.serving.limits import Limits
from emt.serving.progress import Progress
from emt.serving.prompt import PendingPrompt, Prompt
from emt.serving.remembering import hidden
from emt.serving.sampling import Sampler
from memory_backends.catalog import Catalog

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
        group, num_rows, longest, most_new = None, 0, 0, 0
        for pending in waiting:
            if pending.is_cancelled:  # taken out of the queue, and left out of the batch
                batch.append(pending)
                continue
            prompt = pending.prompt
            rows, limits = num_rows + prompt.n, self._limits
            length = max(longest, len(prompt.token_ids))
            num_new = max(most_new, prompt.max_new_tokens)
            fits = rows <= limits.max_batch and rows * (length + num_new) <= limits.max_batch_tokens
            if group is None or (fits and prompt.group == group):
                batch.append(pending)
                group, num_rows, longest, most_new = prompt.group, rows, length, num_new
        return batch

    def answer(self, batch: Sequence[PendingPrompt]) -> None:
        """Answer prompts, or tell them why not. What one of them does wrong harms no other."""
        try:
            self._memory.refresh()  # what another process has written
        except Exception as error:
            for pending in batch:
                pending.fail(error)
            return
        batch = [each for each in batch if not each.is_cancelled and self._checked(each)]
        if not batch:
            return
        self._on_batch(sum(pending.prompt.n for pending in batch))
        try:
            self._generate(batch)
        except Exception as error:
            if len(batch) > 1:
                _logger.warning("a batch of %d failed: each is answered alone", len(batch))
            for pending in batch:
                if pending.is_settled:
                    continue
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
        with catalog.snapshot():
            scopes = [_scope_of(prompt, catalog) for prompt in prompts]
        settings = dict(prompts[0].settings)
        for name in ("documents", "where"):
            wanted = [scope.get(name) for scope in scopes]
            if len({repr(one) for one in wanted}) == 1:  # not ==: True is not 1 here
                settings[name] = wanted[0]
            else:
                of_rows = zip(prompts, wanted, strict=True)
                settings[name] = [one for prompt, one in of_rows for _ in range(prompt.n)]
        return settings


def _scope_of(prompt: Prompt, catalog: Catalog) -> dict[str, Any]:
    """Return the documents that a prompt may read, as settings of `Memory.using`."""
    scope = prompt.access.scope(catalog, prompt.documents, prompt.where)
    if prompt.conversation is not None:  # what the prompt has is not recalled as well
        seen = prompt.access.documents(catalog).values()
        out = hidden(catalog, prompt.access, prompt.conversation)
        scope["documents"] = [name for name in scope.get("documents", seen) if name not in out]
    return scope


def padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return prompts as a batch, (B, T) int64 padded on the left, and its mask.

    Each is padded with its own first token: nothing attends to padding, but processors that look at
    all ids, as a penalty of repetition does, find no token that its prompt does not have.
    """
    width = max(map(len, prompts))
    ids = [[prompt[0]] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids), torch.tensor(mask)
