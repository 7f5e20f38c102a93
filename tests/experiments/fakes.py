"""A responder that counts words and repeats itself, items, texts, and tiny real models."""

import dataclasses
import json
import re

import torch
from experiments.items import Item
from experiments.responder import LocalModel, Response

from emt.model.loading import LoadedModel
from tests.emt.bytes import BYTES_VOCAB_SIZE, byte_tokenizer
from tests.emt.words import word_tokenizer
from tests.families import VOCAB_SIZE, build


class Parrot:
    """Says the last words of a message; a token is a word, and a template adds two."""

    def __init__(self, room=None, log_probs=None, words=5, stop_after=None):
        self.room = room
        self.log_probs = log_probs
        self.words = words
        self.stop_after = stop_after
        self.heard = []

    def count(self, message):
        return len(message.split()) + 2

    def split(self, text, num_tokens):
        words = re.findall(r"\s*\S+\s*", text)
        return ["".join(words[at : at + num_tokens]) for at in range(0, len(words), num_tokens)]

    def respond(self, message, candidates=()):
        if len(self.heard) == self.stop_after:
            raise KeyboardInterrupt
        self.heard.append((message, list(candidates)))
        log_probs = None if self.log_probs is None else self.log_probs[: len(candidates)]
        text = " ".join(message.split()[-self.words :])
        return Response(text, log_probs, self.count(message), 0.5)


def item(name="a", **changes):
    values = {
        "id": name,
        "title": f"title {name}",
        "split": "2k",
        "context": f"Snow fell. The ship of {name} sailed to Leeds. Rain fell.",
        "question": "Where did the ship sail?",
        "answer": "Leeds",
        "original_answer": "York",
    }
    return Item(**{**values, **changes})


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_items(path, items):
    return write_rows(path, map(dataclasses.asdict, items))


def tiny(model_type="llama", **options):
    """Return a local model of bytes."""
    model = build(model_type, vocab_size=BYTES_VOCAB_SIZE)
    return LocalModel(model, byte_tokenizer(), **options)


def tiny_of_words(model_type="llama", **options):
    """Return a tiny random model and the tokenizer of words, which puts <bos> before a text."""
    return LoadedModel(build(model_type, **options), word_tokenizer(), "tiny")


def random_ids(length, seed):
    """Return token ids of random words."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE, (length,), generator=generator)


def write_texts(path, *lengths):
    """Write one text of so many words a line; return the path as text."""
    texts = [" ".join(f"w{idx}" for idx in random_ids(n, seed)) for seed, n in enumerate(lengths)]
    return str(write_rows(path, ({"idx": at, "text": text} for at, text in enumerate(texts))))


@torch.no_grad()
def nats_one_by_one(model, token_ids, scored):
    """Predict the last tokens, each with a forward of its own, in float64; return their sum."""
    total = 0.0
    for at in range(len(token_ids) - scored, len(token_ids)):
        logits = model(token_ids[None, :at]).logits[0, -1].double()
        total -= float(logits[token_ids[at]] - logits.logsumexp(-1))
    return total
