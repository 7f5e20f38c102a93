"""Memories of tiny models, and recordings made by hand of what their queries attended to."""

import torch

from emt import MemoryConfig, attach
from emt.citations.generated import ChosenTokens, GeneratedText
from emt.passage import Retrieved
from tests.emt.bytes import BYTES_VOCAB_SIZE
from tests.emt.marked_sinks import first_rows_are_sinks
from tests.emt.words import word_tokenizer
from tests.families import build

ALL_LAYERS = range(3)


def remembering(documents, model_type="llama", tokenizer=None, **settings):
    """Attach a fresh model of three layers and write documents.

    A <bos> has no row; the first three rows of a document are attention sinks.
    """
    tokenizer = tokenizer or word_tokenizer()
    vocab_size = BYTES_VOCAB_SIZE if tokenizer.vocab_size == BYTES_VOCAB_SIZE else 97
    model = build(model_type, vocab_size=vocab_size, attn_implementation="eager")
    memory = attach(model, MemoryConfig.published(**settings), tokenizer=tokenizer)
    with first_rows_are_sinks(3):
        for name, source in documents.items():
            memory.write(source, document=name)
    return model, memory


def recorded(memory, *steps, recalled=None, said=None):
    """Make a recording of steps {layer: (ids, weights)}, each (B, H, k) nested lists.

    They chose the tokens `said`, (B, T), of a `generate` call; None for forwards by hand.
    """
    text = GeneratedText()
    if said is not None:
        text.returned(torch.tensor(said), None)
        text.num_chosen = len(steps)
    recording = memory.new_recording()
    if recalled is not None:
        recording.recall(recalled)
    for number, step in enumerate(steps):
        tokens = None if said is None else ChosenTokens(text, number)
        for layer_idx, (ids, weights) in step.items():
            ids, weights = torch.tensor(ids)[:, :, None], torch.tensor(weights)[:, :, None]
            recording.add(Retrieved(layer_idx, ids, torch.ones(ids.shape), weights.float()), tokens)
    return recording


def one_step(memory, weights):
    """Make a recording of one token, layer and head from {row: weight}."""
    return recorded(memory, {2: ([[list(weights)]], [[list(weights.values())]])})


def document_and_text(citations):
    return [(each.document, each.start, each.end, each.text) for each in citations]
