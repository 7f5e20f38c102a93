"""What a memory does to text that it knows nothing about: nats a token, against the plain model.

    python scripts/damage.py --store DIR [--data FILE] [--pieces 24]

Pieces of a text are given to the model as prompts, and the tokens after them are predicted, without
the memory and with it in passage mode. The text should be about something else than the store.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from experiments.about import about
from experiments.command import one_line_errors, remembering
from experiments.statistics import mean_interval, paired_difference
from experiments.texts import read_texts

from emt.errors import ConfigError
from emt.model.loading import DEFAULT_MODEL

_DATA = Path("scripts/data/the_prince.txt")


def main() -> None:
    """Measure, and print one line."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--store", required=True, type=Path)
    parser.add_argument("--data", type=Path, default=_DATA, help="a text, or .jsonl with texts")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--pieces", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=128, help="of a prompt, and of what follows")
    with one_line_errors():
        _measure(parser.parse_args())


def _measure(options: argparse.Namespace) -> None:
    found, memory = remembering(options.model, options.store)
    texts = read_texts(str(options.data), found.tokenizer)
    tokens = torch.cat([torch.as_tensor(text.token_ids) for text in texts]).long()
    length = options.tokens
    step = (len(tokens) - 2 * length) // options.pieces
    if step < 1:
        raise ConfigError(f"'{options.data}' is too short for {options.pieces} pieces.")
    plain, remembered, given = [], [], 0
    for piece in range(options.pieces):
        ids = tokens[piece * step : piece * step + 2 * length][None]
        with memory.using(enabled=False):
            plain.append(_nats(found.model, ids, length))
        with memory.recording() as recording:
            remembered.append(_nats(found.model, ids, length))
        given += bool(recording.routed[0].passages)
    difference = paired_difference(remembered, plain)
    print(
        f"{len(memory):,} rows; {options.pieces} pieces of '{options.data}': "
        f"{mean_interval(plain).mean:.3f} nats a token without memory, {difference.mean:+.3f} "
        f"({difference.low:+.3f} to {difference.high:+.3f}) with it; {given} prompts were given "
        f"passages. {about()['machine']}"
    )


@torch.no_grad()
def _nats(model: Any, ids: torch.Tensor, length: int) -> float:
    """Return the mean negative log-likelihood of what follows a prompt of `length` tokens."""
    prompt = model(input_ids=ids[:, :length], use_cache=True)
    rest = model(input_ids=ids[:, length:-1], past_key_values=prompt.past_key_values)
    logits = torch.cat([prompt.logits[:, -1:], rest.logits], dim=1)[0].float()
    return float(torch.nn.functional.cross_entropy(logits, ids[0, length:]))


if __name__ == "__main__":
    main()
