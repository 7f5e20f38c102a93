"""Find the heads of a model that know which passage is meant, by asking questions.

A few texts are read, and each head is asked alone: a question's tokens search its keys, and it is
right if most of what they find is around the answer. The best few heads make the profile, each of
another part of the model: heads of neighbouring layers find much the same.

Source: Wu et al., Retrieval Head (arXiv 2404.15574); choosing them by questions and answers, as in
Zhang et al., QRHead (arXiv 2506.09944).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import numpy as np
from torch import Tensor

from emt.errors import ConfigError, MemoryUseError
from emt.model.chat import prompt_ids
from emt.profiles.examples import Example, made_from
from emt.profiles.stored_text import stored_texts
from emt.routing.evidence import Hits, windows_of
from emt.routing.head_profile import HeadProfile, ProfiledHead
from emt.routing.queries import unit_queries
from emt.routing.question import question_of
from emt.routing.router import TOPK

if TYPE_CHECKING:
    from emt.memory.memory import AttachedModel, Memory

DISTANCE = 64  # tokens between a memory and who asks
_NEAR = 48  # rows between the evidence and the answer, at most
_MAX_HEADS = 5
_COMPARED = 8
_LEAST = 0.25  # of the best head's hit rate
_APART = 16  # two heads are a sixteenth of all layers apart: closer ones find much the same
# Prompts say more than a question does, and what they say is found nowhere or everywhere.
_ENDINGS = ("", "\nAnswer in a few words.", "", "\nPlease answer briefly and say why.")
_LONGEST_TEXT = 8000  # characters


@dataclass(frozen=True)
class Ranked:
    """How well each head does.

    Attributes:
        profile: of the best heads.
        hit_rates: (layer, head) -> share of the questions.
        agreement: share of the best 8 heads on one half of the questions that are among the best 8
            on the other half, too.
        hit_rate: of the chosen heads together.
        num_questions: asked.
        num_rows: searched.
    """

    profile: HeadProfile
    hit_rates: dict[tuple[int, int], float]
    agreement: float
    hit_rate: float
    num_questions: int
    num_rows: int


@dataclass(frozen=True)
class _Question:
    """A question that was read: its queries, and where its answer is."""

    queries: dict[int, Tensor]  # layer -> (H, T, D)
    first: int  # rows of its text
    stop: int
    middle: float  # row of the answer


def profile_heads(
    memory: Memory,
    examples: Sequence[Example],
    *,
    name: str,
    source: str = "",
    num_questions: int = 128,
    num_texts: int = 16,
    seed: int = 0,
    on_step: Callable[[str], object] | None = None,
) -> Ranked:
    """Rank a model's heads by what they find, and choose the best.

    Args:
        memory: of the model, with a tokenizer; nothing is written to it.
        examples: questions about texts; of each text, the first 8,000 characters.
        name: of the model, for people.
        source: of the questions, for people.
        num_questions: asked at most.
        num_texts: read at most.
        seed: of the choice among them.
        on_step: told what is being done.

    Raises:
        ConfigError: there are too few questions, no head finds anything, no layer sees the whole
            context, or the tokenizer is not a fast one.
        MemoryUseError: the memory has no tokenizer, or no model any more.
    """
    say = on_step or (lambda what: None)
    if not _attached(memory).full_attention_layers:
        raise ConfigError(
            "a head profile needs layers that see the whole context; this model has none."
        )
    chosen = _chosen(examples, num_questions, num_texts, random.Random(seed))
    if len(chosen) < 4 or len({example.document for example in chosen}) < 2:
        raise ConfigError(
            "a profile needs at least 4 questions about 2 texts, with answers in the first "
            f"{_LONGEST_TEXT} characters; got {len(chosen)}. Name more data."
        )
    keys, is_sink, questions = _read(memory, chosen, say)
    means = {
        layer: torch.cat([question.queries[layer] for question in questions], 1).mean(1)
        for layer in keys
    }
    hits: dict[tuple[int, int], list[bool]] = {}
    for layer in keys:
        say(f"layer {layer}")
        for head in range(means[layer].shape[0]):
            found = _search(keys[layer], is_sink, questions, layer, head, means[layer][head])
            hits[layer, head] = [
                _is_right(_hits([of_head]), question)
                for of_head, question in zip(found, questions, strict=True)
            ]
    rates = {head: float(np.mean(right)) for head, right in hits.items()}
    best = _apart(_best(rates), max(_attached(memory).layout.layers) + 1)
    if not best:
        raise ConfigError(
            f"no head found the passage of any of {len(questions)} questions. Name other data."
        )
    halves = [
        _best({head: float(np.mean(right[half::2])) for head, right in hits.items()})[:_COMPARED]
        for half in (0, 1)
    ]
    shared = len(set(halves[0]) & set(halves[1])) / max(min(map(len, halves)), 1)
    hit_rate = _together(keys, is_sink, questions, best, means)
    profile = HeadProfile(
        model=name,
        weights=str(_attached(memory).identity.get("weights")),
        heads=tuple(ProfiledHead(*head, rates[head]) for head in best),
        means=torch.stack([means[layer][head] for layer, head in best]),
        distance=DISTANCE,
        source=source,
    )
    return Ranked(
        profile,
        dict(sorted(rates.items(), key=lambda item: -item[1])),
        shared,
        hit_rate,
        len(questions),
        len(is_sink),
    )


def profile_from_text(
    memory: Memory, *, name: str, on_step: Callable[[str], object] | None = None
) -> Ranked:
    """Rank a model's heads by questions made from the text that its memory has.

    Args:
        memory: with documents, and with a tokenizer; nothing is written to it.
        name: of the model, for people.
        on_step: told what is being done.

    Raises:
        ConfigError: too few questions can be made, or no head finds anything.
        MemoryUseError: as `profile_heads`.
    """
    examples = made_from(stored_texts(memory.backend, memory.tokenizer))
    return profile_heads(memory, examples, name=name, source="stored text", on_step=on_step)


def _attached(memory: Memory) -> AttachedModel:
    if memory.tokenizer is None:
        raise MemoryUseError("a head profile needs a tokenizer. Give attach() one.")
    if not memory.tokenizer.is_fast:
        raise ConfigError(
            "a head profile needs a fast tokenizer, which tells where tokens stand in a text; got "
            f"{type(memory.tokenizer).__name__}. Give attach() a fast one."
        )
    return memory.attached_model("profile")


def _chosen(
    examples: Sequence[Example], num_questions: int, num_texts: int, rng: random.Random
) -> list[Example]:
    """Choose questions, as many of each text as of any other."""
    by_text: dict[str, list[Example]] = {}
    for example in examples:
        if example.end <= _LONGEST_TEXT:
            by_text.setdefault(example.document, []).append(example)
    texts = rng.sample(sorted(by_text), min(num_texts, len(by_text)))
    each = -(-num_questions // max(len(texts), 1))
    found = [
        example
        for text in texts
        for example in rng.sample(by_text[text], min(each, len(by_text[text])))
    ]
    return found[:num_questions]


def _read(
    memory: Memory, examples: Sequence[Example], say: Callable[[str], object]
) -> tuple[dict[int, Tensor], Tensor, list[_Question]]:
    """Read texts and questions.

    Returns:
        Layer -> unit keys (Hkv, N, D) of all texts, which of the N rows are attention sinks, and
        the questions.
    """
    model = _attached(memory)
    tokenizer = cast(Any, memory.tokenizer)
    layers = model.full_attention_layers
    parts: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    sinks: list[np.ndarray] = []
    spans: dict[str, tuple[int, int, np.ndarray]] = {}
    num_rows = 0
    for text in dict.fromkeys(example.document for example in examples):
        say(f"reading text {len(spans) + 1}")
        short = text[:_LONGEST_TEXT]
        encoded = tokenizer(
            short, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        first = num_rows
        for rows in memory.read(encoded["input_ids"]):
            for layer in layers:
                parts[layer].append(rows.keys[layer].float().cpu())
            sinks.append(rows.sinks)
            num_rows += len(rows)
        spans[text] = first, num_rows, np.array(encoded["offset_mapping"])
    keys = {layer: torch.cat(of_layer, 1) for layer, of_layer in parts.items()}
    for layer, key in keys.items():
        keys[layer] = key / key.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    decoder = memory.decoder_or_none()
    if decoder is None:
        raise MemoryUseError("cannot profile: the model is gone. Keep a reference to it.")
    questions = []
    for number, example in enumerate(examples):
        say(f"question {number + 1}")
        ids = prompt_ids(tokenizer, example.question + _ENDINGS[number % len(_ENDINGS)])
        question = question_of(ids, tokenizer)
        queries = unit_queries(
            decoder,
            ids[: question.stop],
            layers,
            unrotations=model.unrotations,
            angles=memory.angles,
            distance=DISTANCE,
        )
        first, stop, offsets = spans[example.document]
        at = np.flatnonzero((offsets[:, 1] > example.start) & (offsets[:, 0] < example.end))
        cut = {layer: query[:, question.first :] for layer, query in queries.items()}
        questions.append(_Question(cut, first, stop, first + float(at.mean())))
    return keys, torch.from_numpy(np.concatenate(sinks)), questions


def _search(
    keys: Tensor,
    is_sink: Tensor,
    questions: Sequence[_Question],
    layer: int,
    head: int,
    mean: Tensor,
) -> list[tuple[Tensor, Tensor]]:
    """Search one head's keys for each token of each question: scores and ids, each (T, k)."""
    asked = torch.cat([question.queries[layer][head] for question in questions]) - mean
    group = questions[0].queries[layer].shape[0] // keys.shape[0]
    of_head = keys[head // group]
    found = []
    for part in torch.split(asked, 256):
        scores = part @ of_head.T
        scores[:, is_sink] = -torch.inf
        found.append(scores.topk(min(TOPK, scores.shape[1]), dim=1))
    scores = torch.cat([part.values for part in found])
    ids = torch.cat([part.indices for part in found])
    ids[scores == -torch.inf] = -1
    lengths = [question.queries[layer].shape[1] for question in questions]
    return list(zip(torch.split(scores, lengths), torch.split(ids, lengths), strict=True))


def _hits(found: Sequence[tuple[Tensor, Tensor]]) -> Hits:
    scores = torch.cat([part[0] for part in found]).numpy()
    return Hits.of(torch.cat([part[1] for part in found]).numpy(), scores)


def _is_right(hits: Hits, question: _Question) -> bool:
    windows = windows_of(hits, 1, apart=1)
    return bool(windows) and abs(windows[0].peak - question.middle) <= _NEAR


def _best(rates: dict[tuple[int, int], float]) -> list[tuple[int, int]]:
    """Return the heads that do well, best first."""
    least = _LEAST * max(rates.values())
    order = sorted(rates, key=lambda head: (-rates[head], head))
    return [head for head in order if rates[head] > 0 and rates[head] >= least]


def _apart(heads: Sequence[tuple[int, int]], num_layers: int) -> list[tuple[int, int]]:
    """Return a few heads, best first: of the same layer or close ones only if there are no others.

    Args:
        heads: best first.
        num_layers: of the model.
    """
    apart = math.ceil(num_layers / _APART)
    chosen: list[tuple[int, int]] = []
    for head in heads:
        if all(abs(head[0] - other[0]) >= apart for other in chosen):
            chosen.append(head)
    chosen += [head for head in heads if head not in chosen]
    return sorted(chosen[:_MAX_HEADS], key=heads.index)


def _together(
    keys: dict[int, Tensor],
    is_sink: Tensor,
    questions: Sequence[_Question],
    heads: Sequence[tuple[int, int]],
    means: dict[int, Tensor],
) -> float:
    """Ask some heads together; return their hit rate."""
    found = [
        _search(keys[layer], is_sink, questions, layer, head, means[layer][head])
        for layer, head in heads
    ]
    right = [
        _is_right(_hits([of_head[number] for of_head in found]), question)
        for number, question in enumerate(questions)
    ]
    return float(np.mean(right))
