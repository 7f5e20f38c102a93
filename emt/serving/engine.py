"""The one thread that owns the model and its memory: what it does waits in a bounded queue."""

from __future__ import annotations

import asyncio
import contextvars
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, ParamSpec, TypeVar

from emt.serving.errors import ServingError

P = ParamSpec("P")
T = TypeVar("T")


class Engine:
    """Runs functions one after the other, in a thread of its own.

    Args:
        max_waiting: jobs that may wait.
    """

    def __init__(self, max_waiting: int) -> None:
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue(max_waiting)
        self._thread = threading.Thread(target=self._work, name="emt-engine", daemon=True)
        self._thread.start()

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a function in the engine's thread, and return what it returns.

        It is not begun if the caller is cancelled before.

        Raises:
            ServingError: 503, too much waits.
        """
        future: Future[T] = Future()
        context = contextvars.copy_context()

        def job() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(context.run(function, *args, **kwargs))
            except BaseException as error:
                future.set_exception(error)

        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            raise ServingError(
                503,
                "The server is busy: too many requests wait. Try again later.",
                code="overloaded",
                headers={"Retry-After": "1"},
            ) from None
        return await asyncio.wrap_future(future)

    def stop(self) -> None:
        """Finish what waits, and end the thread."""
        self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()

    def __repr__(self) -> str:
        return f"Engine({self._jobs.qsize()} jobs wait)"


Job = Callable[[], Any]
