"""Tiny random models of every family that transformers has: configs shrunk by the names of fields.

Families are many and their fields are few: a size is called `hidden_size` or `d_model`, hardly ever
anything else. `tests/tiny_exceptions.py` says what these rules get wrong.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.tiny_exceptions import EXCEPTIONS

VOCAB_SIZE = 97
NUM_LAYERS = 4
_NOISE = 0.1  # on every weight, so that norms, biases, sinks and gates take part

_LAYER_COUNTS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"),
    *("num_decoder_layers", "num_blocks", "encoder_layers", "num_encoder_layers"),
)
_SIZES: dict[int, tuple[str, ...]] = {
    VOCAB_SIZE: ("vocab_size", "decoder_vocab_size", "unpadded_vocab_size"),
    64: (
        *("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_size", "embedding_dim"),
        *("word_embed_proj_dim", "attention_hidden_size", "lru_width", "input_embedding_size"),
        *("output_embedding_size", "router_hidden_size"),
        *("adapter_in_dim", "adapter_out_dim", "adapter_input_size"),
    ),
    96: (
        *("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_hidden_size"),
        *("dff", "dim_ff", "d_inner", "feed_forward_size", "moe_intermediate_size"),
        *("shared_expert_intermediate_size", "shared_intermediate_size", "intermediate_size_mlp"),
        *("expert_ffn_hidden_size", "dense_intermediate_size", "shared_experts_intermediate_size"),
        *("moe_shared_expert_intermediate_size", "n_inner"),
    ),
    4: (
        *("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"),
        *("decoder_attention_heads", "encoder_attention_heads", "num_decoder_attention_heads"),
        *("num_encoder_attention_heads", "swa_num_attention_heads", "index_n_heads"),
        *("linear_num_key_heads", "linear_num_value_heads", "linear_num_heads"),
        *("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"),
        *("mamba_dt_rank", "time_step_rank", "index_topk_blocks"),
    ),
    2: (
        *("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"),
        *("mem_len", "zero_expert_num"),
    ),
    1: (
        *("n_group", "topk_group", "num_expert_group", "n_shared_experts", "num_shared_experts"),
        *("moe_num_shared_experts", "num_nextn_predict_layers", "first_k_dense_replace"),
        *("num_dense_layers",),
    ),
    16: (
        *("head_dim", "swa_head_dim", "d_head", "dim_head", "attention_head_size", "kv_channels"),
        *("qk_nope_head_dim", "linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"),
        *("query_pre_attn_scalar", "index_head_dim", "global_head_dim", "v_head_dim"),
        *("mamba_d_state", "state_size", "ssm_state_size", "mamba_chunk_size", "chunk_size"),
        *("laurel_rank", "hidden_size_per_layer_input", "gated_norm_rank", "attention_head_dim"),
        *("rotary_dim", "d_rel", "index_block_size"),
    ),
    8: ("qk_rope_head_dim",),
    24: ("qk_head_dim",),
    32: ("q_lora_rank", "kv_lora_rank", "o_lora_rank"),
    512: (
        *("sliding_window", "sliding_window_size", "window_size", "attention_window_size"),
        *("local_attention", "attention_chunk_size", "keep_window_size", "index_topk"),
        *("rel_extent", "local_attention_window_len"),
    ),
    4096: (
        *("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "model_max_length"),
        *("max_target_positions", "context_length", "original_max_position_embeddings"),
        *("floor_scale",),
    ),
}
_SIZE_OF = {name: size for size, names in _SIZES.items() for name in names}
_NEEDED = {"head_dim", "n_routed_experts", "num_experts_per_tok"}  # also where the default is None
_KV_HEADS = {"num_key_value_heads", "swa_num_key_value_heads", "num_kv_heads"}
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_IMPLIED = set(PreTrainedConfig().to_dict()) | {"model_type", "transformers_version"}


def causal_families() -> list[str]:
    """List the model types that `AutoModelForCausalLM` knows, in order."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(model_type: str) -> PreTrainedConfig:
    """Return a family's config with every size made small.

    Raises:
        Exception: whatever its config class raises, where the rules and exceptions do not do.
    """
    return _tiny(CONFIG_MAPPING[model_type]())


def build_tiny(model_type: str, **options: Any) -> PreTrainedModel:
    """Return a seeded random model of a family, in evaluation mode, float32.

    Args:
        model_type: one of `causal_families()`.
        **options: of `from_config`.
    """
    config = tiny_config(model_type)
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, **options
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(_NOISE * noise)
    return model.eval()


def _tiny(config: PreTrainedConfig) -> PreTrainedConfig:
    return type(config)(**{**_shrunk(config), **EXCEPTIONS.get(config.model_type, {})})


def _shrunk(config: PreTrainedConfig) -> dict[str, Any]:
    """Return arguments that make a smaller config of the same class, the exceptions left out."""
    given: dict[str, Any] = {}
    picked = _layers(config)
    for name, value in _fields(config).items():
        if isinstance(value, PreTrainedConfig):
            given[name] = _tiny(value)
        elif _is_per_layer(value, config):
            given[name] = [value[idx] for idx in picked]
        elif (small := _smaller(name, value, config)) is not None:
            given[name] = small
    if "is_decoder" in inspect.signature(type(config)).parameters:
        given["is_decoder"] = True
    return given


def _fields(config: PreTrainedConfig) -> dict[str, Any]:
    """Return what a config was given or has by default, under the names it goes by."""
    return {
        name: value
        for name, value in vars(config).items()
        if not name.startswith("_") and (name not in _IMPLIED or name in _SPECIAL)
    }


def _smaller(name: str, value: Any, config: PreTrainedConfig) -> Any:
    """Return the small value of one field; None leaves it."""
    if name in _SPECIAL:
        return _SPECIAL[name]
    if name == "head_dim" and hasattr(config, "qk_rope_head_dim"):
        return _SIZE_OF["qk_rope_head_dim"]
    if value is None and name in _NEEDED:
        return _SIZE_OF[name]
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    if name in _LAYER_COUNTS:
        return NUM_LAYERS
    if name in _KV_HEADS:
        heads = {vars(config).get(other) for other in ("num_attention_heads", "n_head")}
        return 4 if value in heads else min(value, 2)
    if name in _SIZE_OF:
        return min(value, _SIZE_OF[name]) if value else value
    if name.endswith(("_token_id", "_token_index", "_id")) and value >= VOCAB_SIZE:
        return VOCAB_SIZE - 1
    return None


def _num_layers(config: PreTrainedConfig) -> int:
    return int(next((getattr(config, name) for name in _LAYER_COUNTS if hasattr(config, name)), 0))


def _is_per_layer(value: Any, config: PreTrainedConfig) -> bool:
    return isinstance(value, list) and len(value) == _num_layers(config)


def _layers(config: PreTrainedConfig) -> list[int]:
    """Pick layers that show every kind there is: the first of each, then the first ones."""
    num_layers = _num_layers(config)
    lists = [value for value in _fields(config).values() if _is_per_layer(value, config)]
    kinds = [tuple(str(one[idx]) for one in lists) for idx in range(num_layers)]
    first = [idx for idx, kind in enumerate(kinds) if kind not in kinds[:idx]]
    rest = [idx for idx in range(num_layers) if idx not in first]
    return sorted((first + rest)[:NUM_LAYERS])
