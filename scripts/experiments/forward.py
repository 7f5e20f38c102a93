"""Forwards that compute no more logits than are looked at, and greedy decoding with them."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import Cache, PreTrainedModel


@torch.no_grad()
def last_logits(model: PreTrainedModel, input_ids: Tensor, count: int, **options: Any) -> Tensor:
    """Run a model over tokens.

    Args:
        model: a causal language model.
        input_ids: (1, Q) int64, on any device.
        count: number of tokens, from the last, to return logits of.
        **options: further arguments of the model; a cache may hold what came before.

    Returns:
        (1, count, V) in the model's dtype. A long prompt's logits are larger than the model itself;
        most families can be told not to compute them.
    """
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = count
    output = cast(Any, model)(input_ids=input_ids.to(model.device), **options)
    return cast(Tensor, output.logits)[:, -count:]


def nats_of_last(model: PreTrainedModel, token_ids: Tensor, count: int) -> float:
    """Return the negative log-likelihood of a sequence's last tokens, summed, in nats.

    Args:
        model: a causal language model.
        token_ids: (T,) int64, T above `count`.
        count: number of tokens that are scored.
    """
    logits = last_logits(model, token_ids[None], count + 1, use_cache=False)[0, :-1]
    targets = token_ids[-count:].to(logits.device)
    return float(cross_entropy(logits.float(), targets, reduction="sum"))


def greedy(
    model: PreTrainedModel,
    logits: Tensor,
    cache: Cache,
    count: int,
    ends: Collection[int] = (),
) -> list[int]:
    """Return greedy tokens after a prompt.

    Args:
        model: a causal language model, attached or not.
        logits: (V,) of the prompt's last token.
        cache: of the prompt; it grows by all returned tokens but the last.
        count: number of tokens at most.
        ends: tokens after which to stop.
    """
    ids = [int(logits.argmax())]
    while len(ids) < count and ids[-1] not in ends:
        given = torch.tensor([ids[-1:]])
        logits = last_logits(model, given, 1, past_key_values=cache, use_cache=True)[0, -1]
        ids.append(int(logits.argmax()))
    return ids
