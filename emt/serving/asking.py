"""One request's prompts, from the event loop to the engine and back as events."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from functools import partial
from typing import TypeVar

from fastapi import Request

from emt.serving.errors import ServingError
from emt.serving.prompt import Answered, Event, Failed, PendingPrompt, Piece, Prompt
from emt.serving.served import Served

T = TypeVar("T")
_NO_RETRY = {"x-should-retry": "false"}  # official clients would ask again, and wait as long


class ClientGoneError(Exception):
    """Whoever asked does not wait for the answer any more."""


class Asking:
    """Prompts that were given to the engine, and what becomes of them.

    Args:
        served: by which engine.
        prompts: of one request.

    Raises:
        ServingError: 503, too much waits.
    """

    def __init__(self, served: Served, prompts: Sequence[Prompt]) -> None:
        self._seconds = served.limits.max_seconds
        self._deadline = time.monotonic() + self._seconds
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._pending = [
            PendingPrompt(prompt, partial(self._tell, number))
            for number, prompt in enumerate(prompts)
        ]
        self._num_unsettled = len(prompts)
        served.engine.submit(self._pending)

    async def events(self) -> AsyncIterator[tuple[int, Piece | Answered]]:
        """Yield what becomes of the prompts, each event with its prompt's number.

        Raises:
            ServingError: a prompt cannot be answered, or not in time.
        """
        while self._num_unsettled:
            try:
                left = self._deadline - time.monotonic()
                number, event = await asyncio.wait_for(self._events.get(), left)
            except TimeoutError:
                raise ServingError(
                    504,
                    f"The answer took longer than {self._seconds:g} seconds. Ask for fewer tokens, "
                    "or try again when the server is less busy.",
                    code="timeout",
                    headers=_NO_RETRY,
                ) from None
            if isinstance(event, Failed):
                raise event.error
            self._num_unsettled -= isinstance(event, Answered)
            yield number, event

    async def answered(self) -> list[Answered]:
        """Return the answers to each prompt.

        Raises:
            ServingError: as `events`.
        """
        settled = {
            number: event async for number, event in self.events() if isinstance(event, Answered)
        }
        return [settled[number] for number in range(len(self._pending))]

    def cancel(self) -> None:
        """Stop what is still being answered."""
        for pending in self._pending:
            pending.cancel()

    def _tell(self, number: int, event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
            self._loop.call_soon_threadsafe(self._events.put_nowait, (number, event))


async def unless_gone(request: Request, awaited: Awaitable[T]) -> T:
    """Wait for something while whoever asked for it does.

    Raises:
        ClientGoneError: whoever asked has gone; what was awaited is cancelled.
    """
    waiting = asyncio.ensure_future(awaited)
    gone = asyncio.ensure_future(_client_gone(request))
    try:
        await asyncio.wait((waiting, gone), return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            raise ClientGoneError
        return waiting.result()
    finally:
        waiting.cancel()
        gone.cancel()


async def _client_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
