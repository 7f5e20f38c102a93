"""Greedy continuations of prompts, in this process or, as a program, in a new one.

python -m tests.model.continuing STORE NUM_TOKENS < prompts.json
"""

import json
import sys

import torch

from emt import MemoryConfig, attach
from emt.cli import quiet
from emt.model.loading import load

SETTINGS = {"sinks": "one", "topk": 4, "index": "Flat"}


def continuations(model, tokenizer, prompts, num_tokens):
    """Return so many greedy token ids for each prompt, all prompts in one left-padded batch."""
    encoded = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    output = model.generate(
        **encoded,
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    return output[:, encoded.input_ids.shape[1] :].tolist()


def main():
    """Open a store with `vector_db` and continue the prompts on stdin."""
    torch.set_num_threads(1)
    with quiet():
        loaded = load()
    config = MemoryConfig.published(memory_type="vector_db", path=sys.argv[1], **SETTINGS)
    memory = attach(loaded.model, config, tokenizer=loaded.tokenizer)
    tokens = continuations(loaded.model, loaded.tokenizer, json.load(sys.stdin), int(sys.argv[2]))
    json.dump(
        {"rows": len(memory), "index": memory.backend.searcher.factory, "tokens": tokens},
        sys.stdout,
    )


if __name__ == "__main__":
    main()
