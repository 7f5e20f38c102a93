"""Active retrieval: a step of `generate` that is uncertain is redone with more memories.

A forward hook looks at the next-token entropy of each step. Where it is above the threshold, the
last token leaves the cache again and its forward is run once more, a turn with a larger topk; the
token is then chosen from the new logits, and later steps see its new keys and values. Each sequence
of a batch decides for itself: one that is certain keeps its logits, keys and values bit for bit.

The first tokens of a prompt are never redone, only its last one, which chooses a token.

Source: Klett and Ahle, Extended Mind Transformers (arXiv 2406.02332), active retrieval.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from emt.calls import GenerateOptions, Generation, overrides_of, overriding
from emt.config import MemoryConfig
from emt.errors import ConfigError
from emt.model.forward import signature_of
from emt.modes.guard import DRAFTS, refuse
from emt.turn import Turn

_WITHOUT_REDO = "memory.using(uncertainty=None)"


def check_can_redo(options: GenerateOptions) -> None:
    """Refuse a call of `generate` whose steps cannot be redone.

    Raises:
        ConfigError: naming the option.
    """
    several_tokens = options.chosen(*DRAFTS, "prefill_chunk_size", "custom_generate")
    not_redone = options.chosen("output_attentions", "output_hidden_states")
    refuse(
        "the setting uncertainty redoes steps of one token",
        [*several_tokens, *not_redone],
        _WITHOUT_REDO,
    )
    if options.get("use_cache") is False:  # the default of some families
        raise ConfigError(
            "the setting uncertainty takes a token back from the cache; got use_cache=False. "
            f"Pass use_cache=True, or generate with {_WITHOUT_REDO}."
        )


@contextlib.contextmanager
def redoing(model: PreTrainedModel, memory: object, generation: Generation) -> Iterator[None]:
    """Redo the uncertain steps of a `generate()` call in a `with` block.

    Args:
        model: the causal language model.
        memory: whose turns its forwards are.
        generation: the call.
    """
    redo = _Redo(memory, generation)
    hooks = [
        model.register_forward_pre_hook(redo.before, with_kwargs=True),
        model.register_forward_hook(redo.after, with_kwargs=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Redo:
    """The steps of one `generate` call.

    Other threads may run the same model meanwhile, and torch may call their hooks while they are
    being put in or taken out, then without keywords. So who calls is asked first.
    """

    def __init__(self, memory: object, generation: Generation) -> None:
        self._memory = memory
        self._generation = generation
        self._recording_past: list[DynamicSlidingWindowLayer] = []

    @property
    def _is_ours(self) -> bool:
        """Whether it is our call that this thread runs."""
        return overrides_of(self._memory).generation is self._generation

    def before(self, module: nn.Module, args: tuple[Any, ...], *keywords: Any) -> None:
        """Let sliding layers keep the key that the next one pushes out of the window."""
        if not self._is_ours:
            return
        options = _by_name(module, args, keywords[0])
        cache = _checked(options.get("past_key_values"))
        self._recording_past = [
            layer
            for layer in cache.layers
            if isinstance(layer, DynamicSlidingWindowLayer) and not layer.record_past
        ]
        for layer in self._recording_past:
            layer.record_past = True

    def after(self, module: nn.Module, args: tuple[Any, ...], *keywords_and_output: Any) -> None:
        """Redo the step if it is uncertain, and change its output in place."""
        if not self._is_ours:
            return
        keywords, output = keywords_and_output
        turn: Turn = self._generation.last_turn
        uncertainty, config = turn.config.uncertainty, _config_of_redo(turn)
        if uncertainty is not None and config is not None:
            is_uncertain = next_token_entropy(output.logits[:, -1]) > uncertainty.entropy
            if is_uncertain.any():
                options = _by_name(module, args, keywords)
                self._redo(module, options, output, is_uncertain, config, turn)
        for layer in self._recording_past:
            if layer.is_initialized:  # a layer that shares another's keys is not
                layer.crop(0)  # to the window's size again
            layer.record_past = False

    def _redo(
        self,
        module: nn.Module,
        options: dict[str, Any],
        output: Any,
        is_uncertain: Tensor,
        config: MemoryConfig,
        turn: Turn,
    ) -> None:
        cache: Any = options["past_key_values"]
        before = [
            (layer, layer.keys[:, :, -1:].clone(), layer.values[:, :, -1:].clone())
            for layer in cache.layers
            if layer.is_initialized
        ]
        for layer, _, _ in before:
            layer.crop(-1)
        with overriding(self._memory, config=config):
            again = module.forward(**_last_token(options))  # without our own hooks
        output.logits[is_uncertain, -1] = again.logits[is_uncertain, -1]
        for layer, keys, values in before:
            is_certain = ~is_uncertain.to(keys.device)
            layer.keys[is_certain, :, -1:] = keys[is_certain]
            layer.values[is_certain, :, -1:] = values[is_certain]
        redone: Turn = self._generation.last_turn
        for recording in turn.recordings:
            recording.redone(is_uncertain, turn.chosen, redone.chosen)


def _config_of_redo(turn: Turn) -> MemoryConfig | None:
    """Return what a step is redone with; None if it would retrieve nothing more."""
    config = turn.config
    if config.uncertainty is None or turn.mode is None or not turn.mode.retrieves:
        return None
    more = config.replace(topk=config.uncertainty.topk, uncertainty=None)
    retrieves_more = any(more.topk_of(n) > config.topk_of(n) for n in turn.num_searchable)
    return more if retrieves_more else None


def _checked(cache: Any) -> Any:
    """Return a cache whose last token can be taken back.

    Raises:
        ConfigError: it is of another kind.
    """
    kinds = [type(layer) for layer in cache.layers] if isinstance(cache, DynamicCache) else [None]
    others = [kind for kind in kinds if kind not in (DynamicLayer, DynamicSlidingWindowLayer)]
    if others or cache.offloading:  # the last token may still be on its way to the CPU
        layers = f" with {others[0].__name__}" if others and others[0] is not None else ""
        raise ConfigError(
            "the setting uncertainty takes a token back from a DynamicCache, not offloaded; got "
            f"{type(cache).__name__}{layers}. Generate without cache_implementation, or with "
            f"{_WITHOUT_REDO}."
        )
    return cache


def _by_name(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> dict[str, Any]:
    """Return all arguments of a forward as keywords."""
    return {**dict(zip(signature_of(module).parameters, args, strict=False)), **keywords}


def _last_token(options: dict[str, Any]) -> dict[str, Any]:
    """Return the keywords of a forward, cut down to the last of its tokens."""
    cut = dict(options)
    for name in ("input_ids", "inputs_embeds"):
        if cut.get(name) is not None:
            cut[name] = cut[name][:, -1:]
    for name in ("position_ids", "token_type_ids", "cache_position"):
        if cut.get(name) is not None:
            cut[name] = cut[name][..., -1:]
    return cut


def next_token_entropy(logits: Tensor) -> Tensor:
    """Return the entropy of next-token distributions, in nats: (B, V) logits to (B,) float32."""
    shares = torch.softmax(logits.float(), dim=-1)
    entropy: Tensor = torch.special.entr(shares).sum(dim=-1)
    return entropy
