"""Does emt work with a family? Build it tiny, attach, ask the oracle, write a document."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

import emt
from emt.errors import ConfigError, EMTError, UnsupportedModelError
from emt.ingest.batch import encode_batch
from emt.ingest.carry import encode_carrying
from emt.ingest.encoder import encode
from emt.ingest.rows import RowReader
from emt.ingest.windows import Windows
from memory_backends import Rows
from tests.families import oracle_error
from tests.forgetting import Found, forget_and_remember
from tests.tiny_exceptions import NOT_BUILT
from tests.tiny_models import VOCAB_SIZE, build_tiny

TOLERANCE = 2e-5
LEAST_EFFECT = 1e-3
ROWS_TOLERANCE = 1e-5
# Their biases count from the first local token, not from where a memory stood; `oracle_error` tells
# them, where an adapter lets it, how far away memories are. Their effect is that of a document.
LINEAR_BIASES = {"bloom", "mpt"}


@dataclass(frozen=True)
class Verdict:
    """What became of one family.

    Attributes:
        family: the model type.
        outcome: "works", "refused", "not built", or "wrong": attached, and not as it should be.
        detail: the refusal's first line, or why it was not built or is wrong.
        layers: what its layers are, if it was attached.
        found: what the oracle found, if it was asked.
        carries: whether it can be read with carried context, if it works.
    """

    family: str
    outcome: str
    detail: str = ""
    layers: str = ""
    found: Found | None = None
    carries: bool | None = None


def verdict_on(family: str) -> Verdict:
    """Build a family, attach it, try it; whatever goes wrong is part of the verdict."""
    torch.set_num_threads(1)
    if family in NOT_BUILT:
        return Verdict(family, "not built", NOT_BUILT[family])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other people's code
        try:
            model = build_tiny(family)
        except Exception as error:
            return Verdict(family, "not built", _first_line(error))
        try:
            memory = attach_everywhere(model)
        except EMTError as error:
            return Verdict(family, "refused", str(error).splitlines()[0])
        except Exception as error:
            return Verdict(family, "wrong", f"attach: {_first_line(error)}")
        try:
            return _tried(family, model, memory)
        except Exception as error:
            return Verdict(family, "wrong", _first_line(error))


def attach_everywhere(model: PreTrainedModel) -> emt.Memory:
    """Attach; where all layers have a window, ask for them."""
    try:
        return emt.attach(model, emt.MemoryConfig.published(memory_type="manual"))
    except ConfigError:
        config = model.config.get_text_config()
        types = getattr(config, "layer_types", None) or [""] * config.num_hidden_layers
        layers = [idx for idx, kind in enumerate(types) if "linear" not in kind]
        return emt.attach(model, emt.MemoryConfig.published(memory_type="manual", layers=layers))


def _tried(family: str, model: PreTrainedModel, memory: emt.Memory) -> Verdict:
    if family in LINEAR_BIASES:
        error = oracle_error(model, memory, lengths=(12, 5, 9))
        memory.clear()
        written = _change_of_writing(model, memory)
        found = Found(error, written)
    else:
        found = forget_and_remember(model, memory, vocab_size=VOCAB_SIZE)
        memory.clear()
        written = _change_of_writing(model, memory)
    together, carried = reading_errors(memory)
    problems = {
        "the memory changes nothing": not found.effect >= LEAST_EFFECT,
        "the memory is not context": not found.error <= TOLERANCE,
        "a written document changes nothing": not written >= LEAST_EFFECT,
        "documents read together have other rows": not together <= ROWS_TOLERANCE,
        "carried context gives other rows": not (carried or 0.0) <= ROWS_TOLERANCE,
    }
    detail = "; ".join(problem for problem, is_there in problems.items() if is_there)
    outcome = "wrong" if detail else "works"
    return Verdict(family, outcome, detail, _layers(model, memory), found, carried is not None)


def reading_errors(memory: emt.Memory) -> tuple[float, float | None]:
    """Compare the rows of documents read otherwise than alone and whole, with those that are.

    Returns:
        The largest difference, relative to the layer's largest element, of documents read together,
        and of one read with carried context; None if the family refuses that.
    """
    attached = memory._attached("test")
    reader = RowReader(attached.decoder(), attached.unrotations)
    generator = torch.Generator().manual_seed(2)
    longest = torch.randint(3, VOCAB_SIZE, (60,), generator=generator)
    documents = [longest, longest[:33], longest[:50]]
    whole = [list(encode(reader, ids, Windows(len(ids), len(ids)))) for ids in documents]
    together = encode_batch(reader, documents)
    errors = [_difference(alone, [rows]) for alone, rows in zip(whole, together, strict=True)]
    try:
        runs = list(encode_carrying(reader, longest, Windows(20, 80), first_length=20))
    except UnsupportedModelError:
        return max(errors), None
    return max(errors), _difference(whole[0], runs)


def _difference(expected: list[Rows], found: list[Rows]) -> float:
    worst = 0.0
    for part in ("keys", "values"):
        for layer_idx in getattr(expected[0], part):
            one, other = (
                torch.cat([getattr(rows, part)[layer_idx] for rows in runs], dim=1)
                for runs in (expected, found)
            )
            worst = max(worst, float((one - other).abs().max() / one.abs().max()))
    return worst


@torch.no_grad()
def _change_of_writing(model: PreTrainedModel, memory: emt.Memory) -> float:
    """Return the largest change that a written document makes to the logits of a prompt."""
    prompt = torch.arange(5, 17)[None]
    before = model(input_ids=prompt).logits
    memory.write(list(range(20, 60)), document="d")
    return float((model(input_ids=prompt).logits - before).abs().max())


def _layers(model: PreTrainedModel, memory: emt.Memory) -> str:
    """Say what the layers are: "2 full, 1 window, 1 without attention; keys rotated"."""
    attached = memory._attached("test")
    num_attention = len(attached.layout.layers)
    num_full = len(attached.full_attention_layers)
    num_other = max(model.config.get_text_config().num_hidden_layers - num_attention, 0)
    counts = {"full": num_full, "window": num_attention - num_full, "no attention": num_other}
    rotated = sum(unrotation is not None for unrotation in attached.unrotations.values())
    keys = {0: "none rotated", num_attention: "all rotated"}.get(rotated, f"{rotated} rotated")
    return ", ".join(f"{count} {kind}" for kind, count in counts.items() if count) + f"; {keys}"


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
