"""A .gguf file of a tiny random Llama with a vocabulary of words, some of its weights quantised."""

import gguf
import numpy as np

LAYERS, WIDTH, HIDDEN, VOCAB = 2, 32, 64, 40
SHAPES = {
    "token_embd": (VOCAB, WIDTH),
    "output_norm": (WIDTH,),
    "output": (VOCAB, WIDTH),
    **{
        f"blk.{layer}.{name}": shape
        for layer in range(LAYERS)
        for name, shape in {
            "attn_norm": (WIDTH,),
            "attn_q": (WIDTH, WIDTH),
            "attn_k": (WIDTH // 2, WIDTH),
            "attn_v": (WIDTH // 2, WIDTH),
            "attn_output": (WIDTH, WIDTH),
            "ffn_norm": (WIDTH,),
            "ffn_gate": (HIDDEN, WIDTH),
            "ffn_up": (HIDDEN, WIDTH),
            "ffn_down": (WIDTH, HIDDEN),
        }.items()
    },
}


def write_gguf(path, seed=0):
    """Write a file; return the values of its tensors by their names in it, float32."""
    random = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(WIDTH // 4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(
        ["<bos>", "<eos>", *(chr(ord("a") + n) for n in range(26)), *"0123456789", "ab", "Ġ"]
    )
    writer.add_token_types([3, 3, *[1] * (VOCAB - 2)])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    values = {}
    for name, shape in SHAPES.items():
        value = random.standard_normal(shape).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q8_0 if len(shape) == 2 else gguf.GGMLQuantizationType.F32
        blocks = gguf.quants.quantize(value, kind)
        writer.add_tensor(f"{name}.weight", blocks, raw_dtype=kind)
        values[name] = gguf.quants.dequantize(blocks, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values
