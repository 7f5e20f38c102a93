"""A responder that counts words and repeats itself, items, and a tiny real model."""

import json
import re

from experiments.items import Item
from experiments.retrieval.answering import LocalModel, Response

from tests.emt.bytes import BYTES_VOCAB_SIZE, byte_tokenizer
from tests.families import build


class Parrot:
    """Says the last words of a message; a token is a word, and a template adds two."""

    def __init__(self, room=None, log_probs=None, words=5):
        self.room = room
        self.log_probs = log_probs
        self.words = words
        self.heard = []

    def count(self, message):
        return len(message.split()) + 2

    def split(self, text, num_tokens):
        words = re.findall(r"\s*\S+\s*", text)
        return ["".join(words[at : at + num_tokens]) for at in range(0, len(words), num_tokens)]

    def respond(self, message, candidates=()):
        self.heard.append((message, list(candidates)))
        log_probs = None if self.log_probs is None else self.log_probs[: len(candidates)]
        said = " ".join(message.split()[-self.words :])
        return Response(said, log_probs, self.count(message), 0.5)


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


def write_items(path, items):
    path.write_text("".join(json.dumps(one.to_row()) + "\n" for one in items), encoding="utf-8")
    return path


def tiny(model_type="llama", **options):
    """Return a local model of bytes."""
    model = build(model_type, vocab_size=BYTES_VOCAB_SIZE)
    return LocalModel(model, byte_tokenizer(), **options)
