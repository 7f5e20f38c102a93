"""The one thread that owns the model and its memory, and what waits for it.

A memory is not written while it generates, and a model runs one forward at a time; so all that
touches either of them happens here, one after the other: batches of prompts, and between them other
functions. The event loop never waits for the model.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Generic, ParamSpec, Protocol, TypeVar

from emt.serving.errors import ServingError

P = ParamSpec("P")
T = TypeVar("T")
_logger = logging.getLogger(__name__)


class Waiting(Protocol):
    """What waits for a batch."""

    @property
    def is_cancelled(self) -> bool:
        """Whether nobody wants it any more."""


W = TypeVar("W", bound=Waiting)


class Batches(Protocol[W]):
    """What the engine does with prompts that wait."""

    def together(self, waiting: Sequence[W]) -> list[W]:
        """Return which of those that wait are answered in the next batch; the first is."""

    def answer(self, batch: Sequence[W]) -> None:
        """Answer a batch; each is told of its answer or its error, and nothing is raised."""


class Engine(Generic[W]):
    """Runs batches and functions in a thread of its own, in the order in which they came.

    Args:
        batches: what is done with prompts.
        max_waiting: how many prompts may wait, and how many functions.
    """

    def __init__(self, batches: Batches[W], max_waiting: int) -> None:
        self._batches = batches
        self._max_waiting = max_waiting
        self._prompts: deque[tuple[int, W]] = deque()
        self._functions: deque[tuple[int, Callable[[], None]]] = deque()
        self._num_taken_on = 0
        self._is_stopping = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="emt-engine", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """Prompts that wait."""
        return len(self._prompts)

    @property
    def is_ready(self) -> bool:
        """Whether another prompt would be taken on."""
        is_running = self._thread.is_alive() and not self._is_stopping
        return is_running and len(self._prompts) < self._max_waiting

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a function in the engine's thread, and return what it returns.

        Answers wait meanwhile. What takes long is better done in several calls of about a second
        each: other work that waits gets its turn between them. A function whose caller is cancelled
        is not begun.

        Raises:
            ServingError: 503, too much waits, or the server stops.
        """
        future: Future[T] = Future()

        def job() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function(*args, **kwargs))
            except BaseException as error:
                future.set_exception(error)

        self._take_on([job], self._functions)
        return await asyncio.wrap_future(future)

    def submit(self, prompts: Sequence[W]) -> None:
        """Let prompts wait for a batch, all of them or none.

        Raises:
            ServingError: 503, too many wait, or the server stops.
        """
        with self._changed:
            if len(self._prompts) + len(prompts) > self._max_waiting:
                kept = [entry for entry in self._prompts if not entry[1].is_cancelled]
                self._prompts.clear()
                self._prompts.extend(kept)
        self._take_on(prompts, self._prompts)

    def stop(self) -> None:
        """Finish what waits, take on nothing more, and end the thread."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify()
        self._thread.join()

    def _take_on(self, new: Sequence[T], queue: deque[tuple[int, T]]) -> None:
        with self._changed:
            if self._is_stopping:
                raise _busy("The server is shutting down.", code="shutting_down")
            if len(queue) + len(new) > self._max_waiting:
                raise _busy(f"The server is busy: {len(queue)} are waiting. Try again later.")
            for item in new:
                self._num_taken_on += 1
                queue.append((self._num_taken_on, item))
            self._changed.notify()

    def _work(self) -> None:
        while (work := self._next()) is not None:
            try:
                work()
            except Exception:
                _logger.exception("the engine's work failed")

    def _next(self) -> Callable[[], None] | None:
        """Wait for work, and return the oldest; None when the engine stops and all is done."""
        with self._changed:
            while not (self._prompts or self._functions):
                if self._is_stopping:
                    return None
                self._changed.wait()
            if not self._prompts or (
                self._functions and self._functions[0][0] < self._prompts[0][0]
            ):
                return self._functions.popleft()[1]
            batch = self._batches.together([prompt for _, prompt in self._prompts])
            taken = {id(prompt) for prompt in batch}
            left = [entry for entry in self._prompts if id(entry[1]) not in taken]
            self._prompts.clear()
            self._prompts.extend(left)
        return lambda: self._batches.answer(batch)


def _busy(message: str, code: str = "overloaded") -> ServingError:
    return ServingError(503, message, code=code, headers={"Retry-After": "1"})
