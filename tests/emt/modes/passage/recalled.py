"""Memories of one document, and logits beside those of a run with the document in the prompt."""

import torch

from emt import MemoryConfig, attach
from tests.families import VOCAB_SIZE

TOLERANCE = 2e-5
BACKENDS = {"manual": {}, "vector_db": {"index": "Flat"}}
NUM_ROWS = 40
SMALL_WINDOWS = [
    ("mistral", {"sliding_window": 16}),
    ("gemma2", {"sliding_window": 16}),
    ("gemma3_text", {"sliding_window": 16}),
    ("gemma4_text", {"sliding_window": 16}),
    ("gpt_oss", {"sliding_window": 16}),
    ("gpt_oss", {"sliding_window": 45}),
    ("llama4_text", {"attention_chunk_size": 16}),
    ("llama4_text", {"attention_chunk_size": 45}),
]
SCALED = {
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "longrope": {
        "rope_type": "longrope",
        "factor": 2.0,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
        "original_max_position_embeddings": 64,
    },
}


def tokens(count, seed):
    return torch.randint(3, VOCAB_SIZE, (count,), generator=torch.Generator().manual_seed(seed))


def remembering(model, document, memory_type="manual", **settings):
    options = {"remove_special_ids": False, "layers": [0], **BACKENDS[memory_type], **settings}
    memory = attach(model, MemoryConfig.published(memory_type=memory_type, **options))
    memory.write(document, document="d")
    return memory


def left_padded(prompts):
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    return ids, mask


def stepwise(model, ids, mask):
    cache, found = None, []
    for step in range(ids.shape[1]):
        output = model(
            ids[:, step : step + 1],
            attention_mask=mask[:, : step + 1],
            past_key_values=cache,
            use_cache=True,
        )
        cache = output.past_key_values
        found.append(output.logits)
    return torch.cat(found, dim=1)


def largest_error(found, expected):
    """Compare the last tokens of each row, padding left out."""
    return max(
        float((row[len(row) - len(alone) :] - alone).abs().max())
        for row, alone in zip(found, expected, strict=True)
    )
