"""The model families emt is tested with: tiny random models, built in code, and the prefix oracle.

`scripts/families_table.py` writes the first table of docs/families.md from `FAMILIES`, so the two
cannot disagree.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from emt.ingest.encoder import encode
from emt.ingest.rows import RowReader
from emt.ingest.windows import Windows
from emt.memory.memory import Memory
from emt.model import hook
from memory_backends import Document

VOCAB_SIZE = 97

_SMALL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_NAMED_DIFFERENTLY = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)


_built: list[PreTrainedModel] = []


@dataclass(frozen=True)
class Family:
    """A tiny model of one family.

    Attributes:
        model_type: as transformers names it.
        options: config keys beyond `_SMALL`, or instead of them.
        note: what is special about its attention, for the table.
        drop: keys of `_SMALL` that this family does not have.
        carries: whether `carry_context` can make its cache.
    """

    model_type: str
    note: str
    options: dict[str, Any] = field(default_factory=dict)
    drop: tuple[str, ...] = ()
    carries: bool = True

    def build(self, *, dtype: torch.dtype = torch.float32, **more: Any) -> PreTrainedModel:
        """Return a seeded random model in evaluation mode."""
        small = {key: value for key, value in _SMALL.items() if key not in self.drop}
        config = AutoConfig.for_model(self.model_type, **{**small, **self.options, **more})
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        _built.append(model.to(dtype).eval())
        return model


FAMILIES = [
    Family("llama", "grouped-query attention"),
    Family("mistral", "sliding window, here off", {"sliding_window": None}),
    Family("qwen2", "biases on queries and keys"),
    Family("qwen3", "query and key norms", {"head_dim": 16}),
    Family("phi3", "half of each head rotated", {"partial_rotary_factor": 0.5}),
    Family(
        "gemma2",
        "soft cap; every other layer has a sliding window",
        {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 512},
    ),
    Family(
        "gemma3_text",
        "norms; two RoPE bases; sliding windows",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 512,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    Family(
        "gpt_oss",
        "attention sinks; sliding windows; experts",
        {
            "head_dim": 16,
            "sliding_window": 512,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        },
    ),
    Family("cohere", "interleaved RoPE"),
    Family("glm", "half of each head rotated, interleaved", {"head_dim": 16}),
    Family("olmo2", "norms over all heads"),
    Family(
        "gpt_neox",
        "multi-head; a quarter of each head rotated; parallel residual",
        {"rotary_pct": 0.25},
        drop=("num_key_value_heads",),
    ),
    Family(
        "gpt2",
        "learned positions",
        {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 4096},
        drop=_NAMED_DIFFERENTLY,
    ),
    Family("starcoder2", "layer norms with bias"),
    Family("stablelm", "a quarter of each head rotated", {"partial_rotary_factor": 0.25}),
    Family("granite", "own attention multiplier", {"attention_multiplier": 0.2}),
    Family("smollm3", "some layers without RoPE", {"no_rope_layers": [1, 0, 1]}),
    Family(
        "mixtral",
        "experts",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    Family(
        "qwen3_moe",
        "query and key norms; experts",
        {
            "head_dim": 16,
            "moe_intermediate_size": 32,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    Family(
        "deepseek_v3",
        "latent attention: keys wider than values, their last dims rotated; experts",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 32,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 12,
            "moe_intermediate_size": 32,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
        carries=False,
    ),
    Family(
        "llama4_text",
        "rotation by complex numbers; chunks; one layer without RoPE; experts",
        {
            "head_dim": 16,
            "intermediate_size_mlp": 96,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "attention_chunk_size": 512,
            "no_rope_layers": [1, 1, 0],
            "layer_types": ["chunked_attention", "chunked_attention", "full_attention"],
        },
    ),
    Family(
        "gemma4_text",
        "the last layers share keys and values; two RoPE bases",
        {
            "head_dim": 16,
            "global_head_dim": 16,
            "sliding_window": 512,
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": VOCAB_SIZE,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        carries=False,
    ),
    Family("hunyuan_v1_dense", "keys normalised after their rotation", {"head_dim": 16}),
    Family(
        "mpt",
        "ALiBi; attention inline, through an adapter",
        {"d_model": 64, "n_heads": 4, "n_layers": 3},
        drop=_NAMED_DIFFERENTLY,
    ),
    Family(
        "bloom",
        "ALiBi; attention inline, through an adapter",
        {"n_head": 4, "n_layer": 3},
        drop=_NAMED_DIFFERENTLY[1:],
    ),
    Family(
        "falcon",
        "grouped-query attention; attention inline, through an adapter",
        {"new_decoder_architecture": True, "num_kv_heads": 2},
        drop=("num_key_value_heads",),
    ),
    Family(
        "falcon",
        "ALiBi, multi-query attention; attention inline, through an adapter",
        {"alibi": True},
        drop=("num_key_value_heads",),
    ),
    Family(
        "gptj",
        "half of each head rotated, interleaved; attention inline, through an adapter",
        {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 4096, "rotary_dim": 8},
        drop=_NAMED_DIFFERENTLY,
    ),
    Family(
        "codegen",
        "half of each head rotated, interleaved; attention inline, through an adapter",
        {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 4096, "rotary_dim": 8},
        drop=_NAMED_DIFFERENTLY,
    ),
]

REFUSED = [
    Family(
        "xglm",
        "sinusoidal positions, attention inline",
        {"d_model": 64, "num_layers": 3, "attention_heads": 4, "ffn_dim": 96},
        drop=_NAMED_DIFFERENTLY,
    ),
    Family(
        "gpt_neox_japanese",
        "RoPE, attention inline",
        drop=("num_key_value_heads",),
    ),
]


@torch.no_grad()
def oracle_error(
    model: PreTrainedModel,
    memory: Memory,
    *,
    num_prefix: int = 40,
    lengths: tuple[int, ...] = (12,),
    topk: int | None = None,
) -> float:
    """Return the largest logit difference between a full-context run and the prefix oracle.

    The oracle: keys and values of the first tokens become memories at their true positions, every
    layer reads all of them (`topk` of them, if given), and the rest runs with `position_ids` that
    go on from there. Several `lengths` make a left-padded batch.
    """
    torch.manual_seed(1)
    prefix = torch.randint(3, VOCAB_SIZE, (num_prefix,))
    suffixes = [torch.randint(3, VOCAB_SIZE, (length,)) for length in lengths]
    decoder = memory._attached("test").decoder()
    reader = RowReader(decoder, dict.fromkeys(memory.backend.layout.layers))
    rows = encode(reader, prefix, Windows(num_prefix, num_prefix))
    with memory.using(enabled=False):
        expected = [
            model(torch.cat([prefix, suffix])[None]).logits[0, num_prefix:] for suffix in suffixes
        ]
    memory.backend.add(Document("prefix", prefix.int().numpy()), rows)
    width = max(lengths)
    input_ids = torch.zeros(len(lengths), width, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, suffix in enumerate(suffixes):
        input_ids[row, width - len(suffix) :] = suffix
        attention_mask[row, width - len(suffix) :] = 1
    position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0) + num_prefix
    everything = memory.using(topk=topk or num_prefix, layers=list(memory.backend.layout.layers))
    with everything, _placed(decoder, memory, lambda ids: num_prefix - ids):
        logits = model(input_ids, attention_mask=attention_mask, position_ids=position_ids).logits
    return max(
        float((logits[row, width - len(suffix) :] - expected[row]).abs().max())
        for row, suffix in enumerate(suffixes)
    )


@contextlib.contextmanager
def _placed(
    decoder: PreTrainedModel, memory: Memory, distance: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """Tell linear biases how far away each memory is; positions of other families do that."""

    class Placing:
        begin, end = staticmethod(memory.begin), staticmethod(memory.end)

        def attend(self, call: hook.AttentionCall) -> tuple[Tensor, Tensor | None]:
            if call.alibi is not None:
                call = replace(call, alibi=replace(call.alibi, distance=distance))
            return memory.attend(call)

    bound = [module for module in decoder.modules() if hook.is_bound(module)]
    hook.bind(decoder, bound, Placing())
    try:
        yield
    finally:
        hook.bind(decoder, bound, memory)


def let_go_of_models() -> None:
    """Keep no model any more; without it, models live as long as the test that built them.

    Memories do not keep their models, and many tests have no other use for one.
    """
    _built.clear()


def build(model_type: str, **options: Any) -> PreTrainedModel:
    """Build one family by name."""
    return next(family for family in FAMILIES if family.model_type == model_type).build(**options)
