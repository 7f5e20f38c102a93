"""Where a server without keys may be reached: from this machine alone."""

from __future__ import annotations

import ipaddress

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from emt.serving.errors import ServingError


def is_loopback(host: str) -> bool:
    """Tell whether a host, a name or an address, is this machine seen from itself."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class OnlyLocalHosts:
    """Refuses requests to other host names than this machine's.

    A page in the browser can let its own name point to this machine, and would be answered then as
    if it was served from here.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on if it names this machine."""
        if scope["type"] == "http":
            given = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
            name = given[: given.rfind("]") + 1] or given.partition(":")[0]
            if not is_loopback(name):
                error = ServingError(
                    403, f"This server answers to localhost only; got the host '{given:.200}'."
                )
                await JSONResponse(error.body, error.status)(scope, receive, send)
                return
        await self._app(scope, receive, send)
