"""A server of the page with invented answers: what the page shows can be told to the letter."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from emt.serving.page import add_page


@dataclass
class Document:
    text: str
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass
class FakeServer:
    """What the routes answer, which a test writes; and what they were asked, which it reads.

    Attributes:
        documents: by name, in the order of the list.
        answers: question -> {tokens, passages, citations}; the streamed text is that of the tokens.
        key: what requests must show; empty for none.
        can_write: whether documents may be written and removed.
        refusal: (status, message) for every question, or None.
        gate: an answer waits for it after its first token.
        asked: bodies of the questions.
        ranges: (name, start, end) of the texts that were read.
    """

    documents: dict[str, Document] = field(default_factory=dict)
    answers: dict[str, dict[str, Any]] = field(default_factory=dict)
    key: str = ""
    can_write: bool = True
    refusal: tuple[int, str] | None = None
    gate: threading.Event = field(default_factory=threading.Event)
    asked: list[dict[str, Any]] = field(default_factory=list)
    ranges: list[tuple[str, int, int]] = field(default_factory=list)
    num_stopped: int = 0

    def described(self, name: str) -> dict[str, Any]:
        document = self.documents[name]
        return {
            "object": "document",
            "name": name,
            "num_tokens": len(document.text.split()),
            "num_characters": len(document.text),
            "metadata": document.metadata,
        }

    def passage(self, name: str, quote: str, **numbers: Any) -> dict[str, Any]:
        """Return where a quote stands in a document, with further numbers."""
        start = self.documents[name].text.index(quote)
        return {"document": name, "start": start, "end": start + len(quote), **numbers}


def _error(status: int, message: str, **headers: str) -> JSONResponse:
    body = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    return JSONResponse({"error": body}, status, headers)


def make_app(fake: FakeServer) -> FastAPI:
    app = FastAPI()
    add_page(app)

    @app.middleware("http")
    async def check_key(request: Request, call_next: Any) -> Any:
        is_right = request.headers.get("Authorization") == f"Bearer {fake.key}"
        if fake.key and request.url.path.startswith("/v1/") and not is_right:
            return _error(401, "wrong key")
        return await call_next(request)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": "tiny", "object": "model"}]}

    @app.get("/v1/store")
    async def store() -> dict[str, Any]:
        documents = map(fake.described, fake.documents)
        return {
            "object": "store",
            "can_write": fake.can_write,
            "model": "tiny",
            "num_documents": len(fake.documents),
            "num_tokens": sum(document["num_tokens"] for document in documents),
            "bytes": {"rows": 2_500_000, "total": 3_000_000},
        }

    @app.get("/v1/documents")
    async def documents(
        query: str = "", where: str = "{}", limit: int = 100, after: str = ""
    ) -> dict[str, Any]:
        wanted = json.loads(where).items()
        names = [
            name
            for name, document in fake.documents.items()
            if query in name and all(document.metadata.get(key) in values for key, values in wanted)
        ]
        names = names[names.index(after) + 1 :] if after else names
        data = [fake.described(name) for name in names[:limit]]
        return {"object": "list", "data": data, "has_more": len(names) > limit}

    @app.get("/v1/documents/{name:path}")
    async def read(name: str, start: int, end: int) -> Any:
        if name not in fake.documents:
            return _error(404, f"no document '{name}'")
        fake.ranges.append((name, start, end))
        text = fake.documents[name].text[start:end]
        return {**fake.described(name), "start": start, "end": start + len(text), "text": text}

    @app.put("/v1/documents/{name:path}")
    async def write(name: str, request: Request, metadata: str = "{}") -> Any:
        try:
            text = (await request.body()).decode()
        except UnicodeDecodeError:
            return _error(400, f"'{name}' is not UTF-8.")
        status = "replaced" if name in fake.documents else "added"
        fake.documents[name] = Document(text, json.loads(metadata))
        return JSONResponse({**fake.described(name), "status": status}, 201)

    @app.delete("/v1/documents/{name:path}")
    async def remove(name: str) -> Any:
        if fake.documents.pop(name, None) is None:
            return _error(404, f"no document '{name}'")
        return {"name": name, "deleted": True}

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        asked = await request.json()
        fake.asked.append(asked)
        if fake.refusal:
            return _error(*fake.refusal, **{"Retry-After": "2"})
        answer = fake.answers[asked["messages"][-1]["content"]]
        return StreamingResponse(_chunks(fake, answer), media_type="text/event-stream")

    return app


async def _chunks(fake: FakeServer, answer: dict[str, Any]) -> AsyncIterator[str]:
    """Yield an answer as events; an `error` in it ends it."""
    try:
        for token in answer["tokens"]:
            delta = {"choices": [{"index": 0, "delta": {"content": token["text"]}}]}
            yield f"data: {json.dumps(delta, ensure_ascii=False)}\n\n"
            while not fake.gate.is_set():
                await asyncio.sleep(0.01)
    except asyncio.CancelledError:
        fake.num_stopped += 1
        raise
    if "error" in answer:
        yield f"data: {json.dumps({'error': {'message': answer['error']}})}\n\n"
        return
    memory = {"index": 0, **{key: answer[key] for key in ("tokens", "passages", "citations")}}
    usage = {"prompt_tokens": 9, "completion_tokens": len(answer["tokens"]), "total_tokens": 9}
    yield f"data: {json.dumps({'choices': [], 'memory': [memory], 'usage': usage})}\n\n"
    yield "data: [DONE]\n\n"
