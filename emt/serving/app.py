"""`create_app`: one model with one memory as a web application."""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Depends, FastAPI
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from transformers import PreTrainedModel

from emt.errors import MemoryUseError
from emt.memory.memory import Memory
from emt.serving import completions, documents, models, search, store
from emt.serving.bodies import LimitBodies
from emt.serving.engine import Engine
from emt.serving.errors import add_handlers
from emt.serving.generation import Generator
from emt.serving.hosts import OnlyLocalHosts
from emt.serving.keys import Access, Keys, unscoped_access_of
from emt.serving.limits import Limits
from emt.serving.metrics import CountRequests, Metrics
from emt.serving.page import add_page
from emt.serving.prompt import PendingPrompt
from emt.serving.served import Served
from emt.serving.writer import Writer


def create_app(
    model: PreTrainedModel,
    memory: Memory,
    *,
    keys: Keys | None = None,
    limits: Limits | None = None,
    model_name: str = "emt",
    only_local_hosts: bool = False,
    can_write: bool = True,
) -> FastAPI:
    """Return an application that answers the OpenAI API.

    Args:
        model: the model that the memory is attached to.
        memory: with a tokenizer.
        keys: who may see and write what; None if everybody may everything.
        limits: of requests; None for the defaults.
        model_name: as clients know the model.
        only_local_hosts: refuse requests to other host names than this machine's.
        can_write: whether documents can be written, by keys that may; False for one of several
            servers of a store.

    Raises:
        MemoryUseError: the memory has no tokenizer.
    """
    if memory.tokenizer is None:
        raise MemoryUseError("a server needs a tokenizer. Pass one to attach().")
    limits = limits or Limits()
    metrics = Metrics()
    engine = Engine(Generator(model, memory, limits, metrics.count_batch), limits.max_waiting)
    metrics.watch_waiting(lambda: engine.num_waiting)
    writer = Writer(memory, engine, limits.max_waiting_documents)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await writer.close()
        await asyncio.to_thread(engine.stop)

    app = FastAPI(title="emt", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.served = Served(
        model=model,
        tokenizer=copy.deepcopy(memory.tokenizer),
        memory=memory,
        engine=engine,
        writer=writer,
        keys=keys,
        can_write=can_write,
        limits=limits,
        model_name=model_name,
        created=int(time.time()),
        metrics=metrics,
    )
    add_handlers(app)
    app.add_middleware(LimitBodies, limits=limits)
    app.add_middleware(CountRequests, metrics=metrics)
    if only_local_hosts:
        app.add_middleware(OnlyLocalHosts)
    for routes in (completions, models, documents, search, store):
        app.include_router(routes.router)
    _add_operations(app, engine, metrics)
    add_page(app)
    return app


def _add_operations(app: FastAPI, engine: Engine[PendingPrompt], metrics: Metrics) -> None:
    """Add the routes of those who run the server."""

    @app.get("/health", tags=["operations"])
    async def health() -> dict[str, str]:
        """Say that the process runs."""
        return {"status": "ok"}

    @app.get("/ready", tags=["operations"], responses={503: {"description": "Not now."}})
    async def ready() -> Response:
        """Say whether another prompt would be taken on."""
        is_ready = engine.is_ready
        return JSONResponse({"status": "ready" if is_ready else "busy"}, 200 if is_ready else 503)

    @app.get("/metrics", tags=["operations"], response_class=PlainTextResponse)
    async def figures(access: Annotated[Access, Depends(unscoped_access_of)]) -> Response:
        """Return figures for Prometheus."""
        return PlainTextResponse(metrics.text())
