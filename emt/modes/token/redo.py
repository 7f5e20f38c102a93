"""Active retrieval: a step of `generate` that is uncertain is redone with more memories.

A forward hook looks at the next-token entropy of each step. Where it is above the threshold, the
last token leaves the cache again and its forward is run once more with a larger topk; the token is
then chosen from the new logits, and later steps see its new keys and values. Each sequence of a
batch decides for itself: one that is certain keeps its logits, keys and values bit for bit.

The first tokens of a prompt are never redone, only its last one, which chooses a token.

Source: Klett and Ahle, Extended Mind Transformers (arXiv 2406.02332), active retrieval.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from emt.citations.recording import Recording
from emt.config import MemoryConfig, Uncertainty
from emt.errors import ConfigError
from emt.turn import asking

if TYPE_CHECKING:
    from emt.memory.memory import Memory

_redoing: ContextVar[object] = ContextVar("emt_redoing", default=None)

_UNTOLD = ("output_attentions", "output_hidden_states")
_SEVERAL_TOKENS = (
    "assistant_model",
    "prompt_lookup_num_tokens",
    "assistant_early_exit",
    "prefill_chunk_size",
    "custom_generate",
)


def check_can_redo(model: PreTrainedModel, options: Mapping[str, Any]) -> None:
    """Refuse a call of `generate` whose steps cannot be redone.

    Raises:
        ConfigError: naming the option.
    """
    config = options.get("generation_config") or getattr(model, "generation_config", None)

    def asked(name: str) -> Any:
        given = options.get(name)
        return getattr(config, name, None) if given is None else given

    wrong = [name for name in (*_SEVERAL_TOKENS, *_UNTOLD) if asked(name)]
    if wrong:
        raise ConfigError(
            f"the setting uncertainty redoes steps of one token; got {wrong[0]}. "
            "Generate without it, or with memory.using(uncertainty=None)."
        )
    if asked("use_cache") is False:  # the default of some families
        raise ConfigError(
            "the setting uncertainty takes a token back from the cache; got use_cache=False. "
            "Pass use_cache=True, or generate with memory.using(uncertainty=None)."
        )


@contextlib.contextmanager
def redoing(model: PreTrainedModel, memory: Memory) -> Iterator[None]:
    """Redo the uncertain steps of what this thread generates in a `with` block."""
    mine = _Redo(memory)
    hooks = [
        model.register_forward_pre_hook(mine.before, with_kwargs=True),
        model.register_forward_hook(mine.after, with_kwargs=True),
    ]
    token = _redoing.set(mine)
    try:
        yield
    finally:
        _redoing.reset(token)
        for hook in hooks:
            hook.remove()


class _Redo:
    """The steps of one `generate` call.

    Other threads may run the same model meanwhile, and torch may call their hooks while they are
    being put in or taken out, then without keywords. So who calls is asked first.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._rewound: list[DynamicSlidingWindowLayer] = []
        self._recordings: list[Recording] = []

    def before(self, module: nn.Module, args: tuple[Any, ...], *keywords: Any) -> None:
        """Let sliding layers keep the key that the next one pushes out of the window."""
        if _redoing.get() is not self:
            return
        (options,) = keywords
        cache = _checked(options.get("past_key_values"))
        self._recordings = self._memory.recordings
        self._rewound = [
            layer
            for layer in cache.layers
            if isinstance(layer, DynamicSlidingWindowLayer) and not layer.record_past
        ]
        for layer in self._rewound:
            layer.record_past = True

    def after(self, module: nn.Module, args: tuple[Any, ...], *keywords_and_output: Any) -> None:
        """Redo the step if it is uncertain, and change its output in place."""
        if _redoing.get() is not self:
            return
        options, output = keywords_and_output
        uncertainty = self._memory.in_force.uncertainty
        config = None if uncertainty is None else self._config_of_redo(uncertainty)
        if uncertainty is not None and config is not None:
            uncertain = next_token_entropy(output.logits[:, -1]) > uncertainty.entropy
            if uncertain.any():
                self._redo(module, options, output, uncertain, config)
        for layer in self._rewound:
            if layer.is_initialized:  # a layer that shares another's keys is not
                layer.crop(0)  # to the window's size again
            layer.record_past = False

    def _config_of_redo(self, uncertainty: Uncertainty) -> MemoryConfig | None:
        """Return what a step is redone with; None if it would find nothing more."""
        memory, config = self._memory, self._memory.in_force
        more = config.replace(topk=uncertainty.topk, uncertainty=None)
        finds_more = any(more.topk_of(n) > config.topk_of(n) for n in memory.num_in_scope)
        return more if finds_more and memory.is_read else None

    def _redo(
        self,
        module: nn.Module,
        options: dict[str, Any],
        output: Any,
        uncertain: Tensor,
        config: MemoryConfig,
    ) -> None:
        cache: Any = options["past_key_values"]
        before = [
            (layer, layer.keys[:, :, -1:].clone(), layer.values[:, :, -1:].clone())
            for layer in cache.layers
            if layer.is_initialized
        ]
        for layer, _, _ in before:
            layer.crop(-1)
        with asking(self._memory, config):
            again = module.forward(**_last_token(options))
        output.logits[uncertain, -1] = again.logits[uncertain, -1]
        for layer, keys, values in before:
            certain = ~uncertain.to(keys.device)
            layer.keys[certain, :, -1:] = keys[certain]
            layer.values[certain, :, -1:] = values[certain]
        for recording in self._recordings:
            recording.redone(uncertain)


def next_token_entropy(logits: Tensor) -> Tensor:
    """Return the entropy of next-token distributions, in nats: (B, V) logits to (B,) float32."""
    shares = torch.softmax(logits.float(), dim=-1)
    entropy: Tensor = torch.special.entr(shares).sum(dim=-1)
    return entropy


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
            "memory.using(uncertainty=None)."
        )
    return cache


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
