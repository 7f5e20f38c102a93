"""`/metrics`: what Prometheus reads of a server."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The figures of one application."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "emt_requests", "Requests.", ("method", "route", "status"), registry=registry
        )
        self._seconds = Histogram(
            "emt_request_seconds",
            "From a request to the end of its response.",
            ("route",),
            buckets=_SECONDS,
            registry=registry,
        )
        self._tokens = Counter("emt_tokens", "Tokens.", ("kind",), registry=registry)
        self._batches = Histogram(
            "emt_batch_answers",
            "Answers that were generated together.",
            buckets=(1, 2, 4, 8, 16, 32),
            registry=registry,
        )
        self._waiting = Gauge("emt_waiting_prompts", "Prompts that wait.", registry=registry)

    def count_tokens(self, num_prompt: int, num_new: int) -> None:
        """Count the tokens of answered prompts."""
        self._tokens.labels("prompt").inc(num_prompt)
        self._tokens.labels("generated").inc(num_new)

    def count_batch(self, num_answers: int) -> None:
        """Count a batch."""
        self._batches.observe(num_answers)

    def watch_waiting(self, num_waiting: Callable[[], int]) -> None:
        """Ask how many prompts wait whenever the figures are read."""
        self._waiting.set_function(num_waiting)

    def text(self) -> bytes:
        """Return the figures in Prometheus's format."""
        return generate_latest(self._registry)

    def count_request(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count a request."""
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)


class CountRequests:
    """Counts what an application answers, by route: paths have names that nobody else may see."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, started = 500, time.perf_counter()

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            route: Any = scope.get("route")
            path = getattr(route, "path", None) or "unknown"
            method = scope["method"] if path != "unknown" else "any"
            seconds = time.perf_counter() - started
            self._metrics.count_request(method, path, status, seconds)
