"""Bodies of requests are bounded: a larger one is refused before it is in memory."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from emt.serving.errors import ServingError
from emt.serving.limits import Limits


class LimitBodies:
    """Refuses a body that says that it is too large, and one that turns out to be, with 413.

    Args:
        app: the application.
        limits: of a document's body, and of all others.
    """

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self._app = app
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and count what is read of its body."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_document = scope["method"] == "PUT" and scope["path"].startswith("/v1/documents/")
        limits = self._limits
        limit = limits.max_document_bytes if is_document else limits.max_body_bytes
        declared = next(
            (value for name, value in scope["headers"] if name == b"content-length"), b""
        )
        if declared.isdigit() and int(declared[:20]) > limit:
            error = _too_large(limit)
            await JSONResponse(error.body, error.status, error.headers)(scope, receive, send)
            return
        num_bytes = 0

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > limit:
                # FastAPI passes only this kind on from where it reads a body.
                raise HTTPException(413, _too_large(limit).message, {"Connection": "close"})
            return message

        await self._app(scope, counted, send)


def _too_large(limit: int) -> ServingError:
    return ServingError(
        413,
        f"The body of the request must be at most {limit} bytes. Send less, or in parts.",
        code="too_large",
        headers={"Connection": "close"},
    )
