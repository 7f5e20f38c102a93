"""A config chooses a backend by name, one that somebody else has registered included."""

import torch

from emt import MemoryConfig, attach
from memory_backends import register_searcher
from memory_backends.search.manual import ManualSearcher
from tests.families import build


class Counting(ManualSearcher):
    """Exact search that counts its calls."""

    num_searches = 0

    def candidates(self, *args):
        Counting.num_searches += 1
        return super().candidates(*args)


register_searcher("counting", Counting)


@torch.no_grad()
def test_a_registered_searcher_serves_a_memory():
    logits = []
    document, prompt = torch.arange(3, 60), torch.arange(5, 12)[None]
    for memory_type in ("manual", "counting"):
        model = build("llama")
        config = MemoryConfig.published(memory_type=memory_type, topk=4, remove_special_ids=False)
        attach(model, config).write(document, document="d")
        logits.append(model(prompt).logits)
    assert torch.equal(logits[0], logits[1])
    assert Counting.num_searches == 3  # once in each layer
