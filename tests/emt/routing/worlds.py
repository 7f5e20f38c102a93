"""A tiny model, a profile made by hand, and documents to route to."""

import torch

from emt import MemoryConfig, attach, detach
from emt.routing.head_profile import HeadProfile, ProfiledHead
from emt.routing.head_search import HeadSearch
from emt.routing.router import Router
from tests.emt.modes.generation import GREEDY, NEW, chosen
from tests.emt.modes.passage.recalled import BACKENDS, left_padded, tokens
from tests.families import build

NAMES = ("one", "two", "three")
ROWS, PASSAGES = 24, 2
HEADS = ((0, 1), (2, 3))


def attached_model(memory):
    return memory._attached("test")


def router_of(memory):
    """Return a router with the memory's head profile."""
    return Router(attached_model(memory), memory.profile, memory.tokenizer)


def heads_of(memory):
    """Return what searches with the memory's head profile."""
    return HeadSearch(attached_model(memory), memory.profile)


def profile_of(model, heads=HEADS):
    """Return a profile of some heads of a model, with means that are not zero."""
    attached = attached_model(attach(model))
    dim = attached.layout.layers[heads[0][0]].head_dim
    detach(model)
    generator = torch.Generator().manual_seed(5)
    return HeadProfile(
        model="tiny",
        sketch=attached.sketch,
        heads=tuple(ProfiledHead(layer, head, 0.5) for layer, head in heads),
        means=0.1 * torch.randn(len(heads), dim, generator=generator),
        distance=16,
    )


def document(number):
    return tokens(70 + 9 * number, 20 + number)


def asked(number, start=20, length=8):
    """Return a prompt in the words of a document."""
    return torch.cat([tokens(3, 50 + number), document(number)[start : start + length]])


def routing(
    model,
    memory_type="manual",
    *,
    heads=HEADS,
    tokenizer=None,
    **settings,
):
    """Attach a memory of three documents to a model, in passage mode.

    No passage makes a question likelier for a random model, so all prompts are relevant.
    """
    profile = profile_of(model, heads)
    options = {
        "mode": "passage",
        "remove_special_ids": False,
        "passage_rows": ROWS,
        "max_passages": PASSAGES,
        "relevance": None,
        **BACKENDS[memory_type],
        **settings,
    }
    memory = attach(
        model, MemoryConfig.published(memory_type=memory_type, **options), tokenizer=tokenizer
    )
    for number, name in enumerate(NAMES):
        memory.write(document(number), document=name)
    memory.keep_profile(profile)
    return memory


def put(routed):
    """Return passages in the order they are recalled."""
    return [part.passage for part in reversed(routed.passages)]


__all__ = ["BACKENDS", "GREEDY", "NEW", "build", "chosen", "left_padded", "tokens"]
