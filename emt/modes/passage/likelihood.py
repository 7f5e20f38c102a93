"""How likely a question is after the rows of each of several passages, and after none.

The rows are stored: nothing of the passages is read again. Several passages are tried in one
forward of the question's tokens; the tokens before them do not see the rows, and are computed once.

Source: Sachan et al., Improving Passage Retrieval with Zero-Shot Question Generation (arXiv
2204.07496), where each passage is read again for each question.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from emt.model.attached import AttachedModel
from emt.model.attention_call import AttentionCall
from emt.model.devices import input_device, no_autocast
from emt.model.forward import Forward, signature_of
from emt.model.references import alive
from emt.model.watch import watching
from emt.modes.passage.frame import Frame
from emt.modes.passage.locate import Placement, locate
from emt.modes.passage.reach import Reach, reach_of
from emt.modes.passage.rows import PlacedRows
from emt.passage import Passage
from emt.routing.question import Asking
from memory_backends import MemoryBackend


class _Asked(NamedTuple):
    """What does not depend on passages, of the question that was asked last.

    Attributes:
        asking: of the question.
        cache: of the tokens before the passages; None if it cannot be kept.
        after_none: (1, q - 1) float32, the log-probabilities after no passage; None before the
            first forward.
    """

    asking: Asking
    cache: DynamicCache | None
    after_none: Tensor | None


class QuestionLikelihood:
    """Asks a model how likely a question is after passages, while the model's weights are as they
    are: what does not depend on the passages is computed once.

    Args:
        model: the attached model; in evaluation mode.
    """

    def __init__(self, model: AttachedModel) -> None:
        self._model = model
        self._reaches: dict[int, Reach] = {}  # of each layer
        self._last: _Asked | None = None

    @torch.no_grad()
    def __call__(
        self,
        asking: Asking,
        passages: Sequence[Passage],
        backend: MemoryBackend,
        *,
        beside: Sequence[Passage] | None = None,
    ) -> Tensor:
        """Return the log-probabilities of a question's tokens after each passage.

        The first token is left out: passages are put before it, and what chooses it does not see
        them.

        Args:
            asking: what is read of the prompt, of which q tokens ask.
            passages: n passages, each tried alone.
            backend: where their rows are.
            beside: n passages, each put between one of the others and the question; None for none.

        Returns:
            (n + 1, q - 1) float32, in nats; in the last row, after no passage.

        Raises:
            ConfigError: the rows would stand beyond the model's positions.
            DocumentError: rows of a passage were removed.
            MemoryUseError: the model is gone.
        """
        chosen = torch.tensor(asking.tokens[1:], dtype=torch.long) - asking.at
        if not len(chosen):
            return torch.zeros(len(passages) + 1, 0)
        places = [asking.at] * len(passages)
        tried = [passages] if beside is None else [passages, beside]
        placements = locate(backend, list(zip(*tried, strict=True)), places)
        with no_autocast(input_device(alive(self._model.decoder, "route"))):
            last = self._last
            if last is None or last.asking is not asking:
                last = _Asked(asking, self._cache_before(asking), None)
            if last.after_none is not None:
                found = self._after(placements, last, chosen, backend)
                return torch.cat([found, last.after_none])
            found = self._after([*placements, Placement((), asking.at)], last, chosen, backend)
        self._last = last._replace(after_none=found[-1:])
        return found

    def _after(
        self,
        placements: Sequence[Placement],
        last: _Asked,
        chosen: Tensor,
        backend: MemoryBackend,
    ) -> Tensor:
        """Return the log-probabilities (n, q - 1) of tokens after each of n placements' rows.

        Args:
            placements: what is put before the question.
            last: the question.
            chosen: (q - 1,) int64, which of its tokens, counted from `at`.
            backend: where the rows are.
        """
        if not placements:
            return torch.zeros(0, len(chosen))
        asking = last.asking
        rows = PlacedRows.read(self._model, backend, placements)
        model, decoder = (
            alive(model, "route") for model in (self._model.model, self._model.decoder)
        )
        options: dict[str, Any] = {"use_cache": False}
        asked = asking.token_ids
        if last.cache is None:
            chosen = chosen + asking.at
        else:
            asked, cache = asked[asking.at :], copy.deepcopy(last.cache)
            cache.batch_repeat_interleave(len(placements))
            options = {"use_cache": True, "past_key_values": cache}
        options["input_ids"] = asked.to(input_device(decoder)).expand(len(placements), -1)
        logits = self._logits(model, Forward(decoder, (), options), rows, chosen - 1)
        targets = asked[chosen].to(logits.device)
        # One passage after another: each needs a copy as large as the vocabulary, a token.
        losses = [cross_entropy(row.float(), targets, reduction="none") for row in logits]
        return -torch.stack(losses).cpu()

    def _logits(
        self, model: PreTrainedModel, forward: Forward, rows: PlacedRows, kept: Tensor
    ) -> Tensor:
        """Return the logits (B, n, V) that some tokens of a forward have after rows.

        Args:
            model: the causal language model.
            forward: of its decoder.
            rows: of each of B prompts.
            kept: (n,) int64, which of the new tokens.
        """
        frame = Frame.of(rows, forward)
        options = frame.moved(forward).options
        takes = "logits_to_keep" in signature_of(model).parameters
        if takes:
            options = {**options, "logits_to_keep": kept.to(input_device(forward.decoder))}

        def compute(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
            return frame.place(call, self._reach(call)).compute()

        with watching(forward.decoder, compute):
            logits: Tensor = model(**options, return_dict=True).logits
        return logits if takes else logits[:, kept.to(logits.device)]

    def _cache_before(self, asking: Asking) -> DynamicCache | None:
        """Return the cache of the tokens before the passages; prompts of a batch often share it."""
        before, last = asking.token_ids[: asking.at], self._last
        if last is not None and torch.equal(last.asking.token_ids[: last.asking.at], before):
            return last.cache
        return self._cache(before)

    def _cache(self, before: Tensor) -> DynamicCache | None:
        """Return the keys and values of the tokens before the passages, (t,) int64.

        None if there are none, or if the model keeps anything else, such as the state of a
        recurrent layer, which cannot be repeated for each passage.
        """
        if not len(before):
            return None
        decoder = alive(self._model.decoder, "route")
        before = before.to(input_device(decoder))
        with watching(decoder):
            output = decoder(input_ids=before[None], use_cache=True, return_dict=True)
        cache = getattr(output, "past_key_values", None)
        if type(cache) is not DynamicCache:
            return None
        kinds = {type(layer) for layer in cache.layers}
        return cache if kinds <= {DynamicLayer, DynamicSlidingWindowLayer} else None

    def _reach(self, call: AttentionCall) -> Reach:
        reach = self._reaches.get(call.layer_idx)
        if reach is None:
            reach = self._reaches[call.layer_idx] = reach_of(self._model.config, call)
        return reach
