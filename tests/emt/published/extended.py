"""A tiny published model, its memories, and what it is asked."""

import torch

import emt
from tests.emt.reference_fixtures import REFERENCE

MEMORY = list(range(3, 90))
PROMPT = torch.tensor([[40, 41, 42, 43, 44]])
LLAMA = REFERENCE / "llama_gqa"


def llama(**options):
    options = {"external_memories": MEMORY, "topk": 3, **options}
    return emt.ExtendedLlamaForCausalLM.from_pretrained(LLAMA, **options)


@torch.no_grad()
def logits(model, ids=PROMPT, **options):
    return model(ids, **options).logits
