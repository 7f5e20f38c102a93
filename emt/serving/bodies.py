"""Refuses bodies that are too large, before they are in memory."""

from __future__ import annotations

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from emt.serving.errors import ServingError
from emt.serving.limits import Limits


class LimitBodies:
    """Bounds the body of every request; documents may be larger than other requests."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self._app = app
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and stop reading it where it is too large."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_document = scope["method"] == "PUT"
        limits = self._limits
        most = limits.max_document_bytes if is_document else limits.max_body_bytes
        error = ServingError(413, f"A body may have {most} bytes. Send less.", code="too_large")
        length = dict(scope["headers"]).get(b"content-length", b"")
        if length.isdigit() and int(length) > most:
            await JSONResponse(error.body, error.status)(scope, receive, send)
            return
        num_bytes = 0

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > most:
                raise error
            return message

        await self._app(scope, counted, send)
