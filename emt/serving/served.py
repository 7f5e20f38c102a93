"""What is served: the model, its memory and the engine, as the routes find them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import cast

from fastapi import Request
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from emt.memory.memory import Memory
from emt.serving.engine import Engine
from emt.serving.keys import Keys
from emt.serving.limits import Limits
from emt.serving.metrics import Metrics
from emt.serving.prompt import PendingPrompt
from emt.serving.writer import Writer


@dataclass(frozen=True)
class Served:
    """One model with its memory, behind an engine.

    Only the engine's thread may use `model` and `memory`: `await engine.run(function, ...)`.

    Attributes:
        model: the causal language model.
        tokenizer: a copy of the memory's, to make tokens of prompts while the model works.
        memory: attached to the model, with a tokenizer.
        engine: the thread that owns both.
        writer: writes documents while questions are answered.
        keys: who may ask for what; None if everybody may everything.
        can_write: whether anybody may write documents.
        limits: of requests.
        model_name: as clients know the model.
        created: when the server began, in seconds since 1970.
        metrics: its figures.
        encoding: held while `tokenizer` is used: fast tokenizers are not for several threads.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    memory: Memory
    engine: Engine[PendingPrompt]
    writer: Writer
    keys: Keys | None
    can_write: bool
    limits: Limits
    model_name: str
    created: int
    metrics: Metrics
    encoding: asyncio.Lock = field(default_factory=asyncio.Lock)


def served_of(request: Request) -> Served:
    """Return what an application serves: a dependency of the routes."""
    return cast(Served, request.app.state.served)
