"""Texts of random words, and a tiny model that reads them."""

import json

import torch

from emt.model.loading import LoadedModel
from tests.emt.words import word_tokenizer
from tests.families import VOCAB_SIZE, build


def tiny(model_type="llama", **options):
    """Return a tiny random model and the tokenizer of words, which puts <bos> before a text."""
    return LoadedModel(build(model_type, **options), word_tokenizer(), "tiny")


def random_ids(length, seed):
    """Return token ids of random words."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE, (length,), generator=generator)


def write_texts(path, *lengths):
    """Write one text of so many words a line; return the path as text."""
    lines = [
        json.dumps(
            {"idx": number, "text": " ".join(f"w{idx}" for idx in random_ids(length, number))}
        )
        for number, length in enumerate(lengths)
    ]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@torch.no_grad()
def nats_one_by_one(model, token_ids, scored):
    """Predict the last tokens, each with a forward of its own, in float64; return their sum."""
    total = 0.0
    for at in range(len(token_ids) - scored, len(token_ids)):
        logits = model(token_ids[None, :at]).logits[0, -1].double()
        total -= float(logits[token_ids[at]] - logits.logsumexp(-1))
    return total
