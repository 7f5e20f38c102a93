"""The page at `/`, and headers that keep what documents say from running in it.

The page is plain files of this package, made of nothing from elsewhere and with no script inside
its HTML, so the policy below forbids both: even markup that slipped into it would not run.
"""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_FOLDER = Path(__file__).with_suffix("")
_MEDIA_TYPES = {  # not the machine's own, which may call a script plain text
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'self'; "
        "frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class SecurityHeaders:
    """Middleware that puts the headers on every answer: JSON may be opened in a tab, too."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        await self._app(scope, receive, send_with_headers)


def add_page(app: FastAPI) -> None:
    """Serve the page at `/`, its files below `/page/`, and every answer with the headers."""
    files = {path.name: path for path in _FOLDER.iterdir()}
    app.add_middleware(SecurityHeaders)

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    def index() -> FileResponse:
        return _file_response(files["index.html"])

    @app.api_route("/page/{name}", methods=["GET", "HEAD"], include_in_schema=False)
    def file(name: str) -> FileResponse:
        if name not in files:
            raise HTTPException(404, f"the page has no file '{name}'.")
        return _file_response(files[name])


def _file_response(path: Path) -> FileResponse:
    """Return a file that browsers ask for again, so that a new version is seen at once."""
    return FileResponse(
        path, media_type=_MEDIA_TYPES[path.suffix], headers={"Cache-Control": "no-cache"}
    )
