"""What the rules of `tests/tiny_models.py` get wrong, family by family."""

from __future__ import annotations

from typing import Any

EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
            for kind in ("full_attention", "sliding_attention")
        }
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "gemma3n_text": {
        "num_kv_shared_layers": 2,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "reformer": {"axial_pos_embds_dim": (16, 48), "axial_pos_shape": (64, 64)},
    "xmod": {"languages": ("en_XX",), "default_language": "en_XX"},
    "dots1": {"n_shared_experts": 1},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 512,
        "indexer_compress_ratio": 4,
        "ple_embed_dim": 64,
    },
    "xlstm": {"qk_dim_factor": 1.0},
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 32,
        "swa_kv_lora_rank": 32,
        "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 16,
        "head_dim": 24,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "zamba": {
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "gemma4_text": {
        "head_dim": 8,  # it does not scale its logits: with more dims, float32 is too coarse
        "global_head_dim": 8,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
}

NOT_BUILT: dict[str, str] = {
    "blt": "needs a byte patcher and three more models beside it",
    "gemma3n": "its vision tower needs timm; its text model is gemma3n_text",
    "gemma4_assistant": "drafts for another model, whose keys and values it must be given",
    "gemma4_unified_assistant": "drafts for another model, whose keys and values it must be given",
    "musicgen": "speaks audio codes; its decoder's config is not the one that is mapped",
    "musicgen_melody": "speaks audio codes; its decoder's config is not the one that is mapped",
}
