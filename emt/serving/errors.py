"""Errors in the shape of OpenAI's API: `{"error": {message, type, param, code}}`."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from emt.errors import ConfigError, DocumentError, EMTError
from memory_backends.errors import StoreLockedError

_logger = logging.getLogger(__name__)
_OF_TYPE = re.compile(r"^(str|int|bool|float|dict|constrained-.*)$|\[")  # one of a field's types
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class ServingError(Exception):
    """What a request is refused with.

    Attributes:
        status: of HTTP.
        message: expected, got, what to do.
        param: the field of the request that is wrong, or None.
        code: a word for programs, or None.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The error as JSON."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {
            "message": self.message,
            "type": _TYPES.get(self.status, kind),
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ServingError:
    """Return the error for a wrong field of a request."""
    return ServingError(400, message, param=param, code=code)


def as_serving_error(error: BaseException) -> ServingError:
    """Return what a client is told about an error.

    What is no mistake of the client's is logged, and told without its details.
    """
    if isinstance(error, ServingError):
        return error
    if isinstance(error, DocumentError):
        return bad_request(str(error), param="memory")
    if isinstance(error, ConfigError):
        return bad_request(str(error))
    if isinstance(error, RequestValidationError):
        return _of_validation(error)
    if isinstance(error, HTTPException):
        return ServingError(error.status_code, str(error.detail), headers=error.headers)
    if isinstance(error, StoreLockedError):  # its own message has paths and processes
        return ServingError(
            503,
            "Another process is writing to the store. Try again when it has ended.",
            code="locked",
            headers={"Retry-After": "5"},
        )
    _logger.error("a request failed", exc_info=error)
    kind = type(error).__name__ if isinstance(error, EMTError) else "internal error"
    return ServingError(500, f"The server failed: {kind}. Its log says more.")


def add_handlers(app: FastAPI) -> None:
    """Answer every error of an application in OpenAI's shape."""

    async def respond(request: Request, error: Exception) -> JSONResponse:
        told = as_serving_error(error)
        return JSONResponse(told.body, told.status, told.headers)

    for kind in (ServingError, RequestValidationError, HTTPException, EMTError):
        app.add_exception_handler(kind, respond)
    app.add_middleware(_AnswerOthers)


class _AnswerOthers:
    """Answers errors that no handler expects.

    A handler of all exceptions would stand around the whole application: what it answers would have
    no headers of other middleware, and would not be counted.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on; what fails after its answer has begun cannot be told."""
        has_begun = False

        async def watched(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception as error:
            if has_begun or scope["type"] != "http":
                raise
            told = as_serving_error(error)
            await JSONResponse(told.body, told.status, told.headers)(scope, receive, send)


def _of_validation(error: RequestValidationError) -> ServingError:
    """Return the first of the mistakes that were found in a request's fields.

    Where a field may be of several types, one mistake is told for each: rather what is wrong with
    the type that was given than that it is not another one.
    """
    first = min(error.errors(), key=lambda each: str(each["type"]).endswith("_type"))
    place = [str(part) for part in first["loc"][1:]]  # after "body", "query" or "path"
    param = ".".join(part for part in place if not _OF_TYPE.search(part)) or None
    message = str(first["msg"])
    return bad_request(message if param is None else f"{param}: {message}", param=param)
