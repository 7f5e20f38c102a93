"""`create_app`: one model with one memory as a web application."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from transformers import PreTrainedModel

from emt.errors import MemoryUseError
from emt.memory.memory import Memory
from emt.serving import documents, search, store
from emt.serving.engine import Engine
from emt.serving.errors import add_handlers
from emt.serving.keys import Keys
from emt.serving.limits import Limits
from emt.serving.page import add_page
from emt.serving.served import Served


def create_app(
    model: PreTrainedModel,
    memory: Memory,
    *,
    keys: Keys | None = None,
    limits: Limits | None = None,
    model_name: str = "emt",
) -> FastAPI:
    """Return an application that answers the OpenAI API.

    Args:
        model: the model that the memory is attached to.
        memory: with a tokenizer.
        keys: who may see and write what; None if everybody may everything.
        limits: of requests; None for the defaults.
        model_name: as clients know the model.

    Raises:
        MemoryUseError: the memory has no tokenizer.
    """
    if memory.tokenizer is None:
        raise MemoryUseError("a server needs a tokenizer. Pass one to attach().")
    limits = limits or Limits()
    engine = Engine(limits.max_waiting)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        engine.stop()

    app = FastAPI(title="emt", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.served = Served(
        model, memory.tokenizer, memory, engine, keys, limits, model_name, int(time.time())
    )
    add_handlers(app)
    for routes in (documents, search, store):
        app.include_router(routes.router)
    add_page(app)

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Say that the process runs."""
        return {"status": "ok"}

    return app
