"""`Writer`: documents are written while questions are answered.

A long document takes the model minutes to read. So it is read window by window, each a job of the
engine between others; its rows go to the store through a second backend, in a thread that waits
for the windows. They become part of the memory at once, while the engine pauses: an answer sees
the documents of before, or those of after.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, Literal, NamedTuple, TypeVar

from emt.ingest.changes import Changes
from emt.ingest.changes import Written as Counts
from emt.memory.memory import Memory
from emt.serving.access import Access
from emt.serving.engine import Engine
from emt.serving.errors import ServingError
from emt.serving.remembering import ConversationRequest, UnwrittenTurn, named, renamed
from memory_backends import Document, Rows
from memory_backends.layout import Metadata

Status = Literal["added", "replaced", "skipped"]
T = TypeVar("T")

_logger = logging.getLogger(__name__)
_REMEMBER_SECONDS = 5.0  # that an answer waits for its turn to be written
_MOST_TURNS = 32  # that wait, with their rows in memory
_BUSY_SECONDS = 0.05  # until the next try, while the engine's queue is full


class Written(NamedTuple):
    """What became of a document.

    Attributes:
        num_tokens: of its text.
        status: "skipped" if it was there with the same text and metadata.
    """

    num_tokens: int
    status: Status


class Writer:
    """Writes and removes documents, one after the other.

    Args:
        memory: only the engine's thread uses it.
        engine: the thread that owns the memory.
        max_waiting: writes that may wait for others.
    """

    def __init__(self, memory: Memory, engine: Engine[Any], max_waiting: int) -> None:
        self._memory = memory
        self._engine = engine
        self._max_waiting = max_waiting
        self._num_waiting = 0
        self._lock = asyncio.Lock()
        self._has_written = False
        self._turns: set[asyncio.Task[str | None]] = set()

    @contextlib.contextmanager
    def slot(self) -> Iterator[None]:
        """Be one of the writes that wait; what they have been sent is in memory.

        Raises:
            ServingError: 503, too many wait.
        """
        if self._num_waiting >= self._max_waiting:
            raise ServingError(
                503,
                "The server is busy: too many documents wait to be written. Try again later.",
                code="overloaded",
                headers={"Retry-After": "5"},
            )
        self._num_waiting += 1
        try:
            yield
        finally:
            self._num_waiting -= 1

    @contextlib.asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Let nobody else write to the store in an `async with` block; wait for those before.

        Raises:
            ServingError: as `slot`.
        """
        with self.slot():
            async with self._lock:
                yield

    async def write(
        self,
        name: str,
        text: str,
        metadata: Metadata,
        access: Access,
        *,
        cancelled: threading.Event,
    ) -> Written:
        """Write a document, in place of the one of its name, if that is another one.

        Args:
            name: as the request names it.
            text: of the document.
            metadata: all of it, that of the access included.
            access: of the request, which may write.
            cancelled: set when the document is not wanted any more; nothing is written then.

        Raises:
            DocumentError: the text is empty, or the name or metadata cannot be kept.
            ServingError: as `Access.new_name`; 499, it was cancelled.
            StoreError: the store cannot be written.
        """
        async with self._lock:
            document, before = await self._run(self._prepare, name, text, metadata, access)
            writing = _Writing(self._memory, self._run, document, cancelled)
            status = await writing.done()
            self._has_written = True
        if status == "skipped" and before != metadata:
            status = "replaced"
        return Written(len(document.token_ids), status)

    async def remember(
        self, turn: UnwrittenTurn, conversation: ConversationRequest, access: Access
    ) -> str | None:
        """Write a turn; return its name, or None if it is not written, or not yet.

        Its answer is there, and must not be lost nor wait until something long is written: the turn
        is written then, and what goes wrong is logged.
        """
        if len(self._turns) >= _MOST_TURNS:
            _logger.warning("a turn was not remembered: %d wait to be written", _MOST_TURNS)
            return None
        writing = asyncio.create_task(self._remember_alone(turn, conversation, access))
        self._turns.add(writing)  # a loop does not keep its tasks
        writing.add_done_callback(self._turns.discard)
        await asyncio.wait((writing,), timeout=_REMEMBER_SECONDS)
        return writing.result() if writing.done() else None

    async def _remember_alone(
        self, turn: UnwrittenTurn, conversation: ConversationRequest, access: Access
    ) -> str | None:
        try:
            async with self._lock:
                self._has_written = True
                return await self._run(self._remember, turn, conversation, access)
        except Exception:
            _logger.warning("a turn was not remembered", exc_info=True)
            return None

    def _remember(
        self, turn: UnwrittenTurn, conversation: ConversationRequest, access: Access
    ) -> str:
        self._memory.refresh()
        catalog = self._memory.backend.catalog
        name, metadata = named(catalog, access, conversation)
        stored = access.new_name(catalog, name)
        if turn.read is None:
            self._memory.write(turn.text, document=stored, replace=True, metadata=metadata)
        else:
            self._memory.add(*renamed(turn.read, stored, metadata), replace=True)
        return name

    async def remove(self, name: str, access: Access) -> bool:
        """Remove a document; return False if there is none that the access sees.

        Raises:
            ServingError: as `alone`.
            StoreError: the store cannot be written.
        """
        async with self.alone():
            return await self._run(self._remove, name, access)

    async def close(self) -> None:
        """Bring the store's index files up to date, for the next process that opens it.

        Without a head profile they stay as they are: to make one takes longer than a server may
        take to end.
        """
        async with self._lock:
            if self._has_written and self._memory.backend.path is not None:
                await self._run(self._save)
                self._has_written = False

    def _save(self) -> None:
        if self._memory.config.path is not None and not self._memory.lacks_profile:
            self._memory.save()

    def _remove(self, name: str, access: Access) -> bool:
        self._memory.refresh()  # what another process has written
        stored = access.stored_name(self._memory.backend.catalog, name)
        if stored is None:
            return False
        self._memory.remove(stored)
        return True

    def _prepare(
        self, name: str, text: str, metadata: Metadata, access: Access
    ) -> tuple[Document, Metadata | None]:
        """Return a document to be written, and the metadata of the one that it replaces."""
        self._memory.refresh()  # what another process has written
        catalog = self._memory.backend.catalog
        stored = access.new_name(catalog, name)
        document = self._memory.encoder.document(text, name, metadata=metadata)
        before = catalog.metadata(stored) if catalog.has_document(stored) else None
        return replace(document, name=stored), before

    async def _run(self, function: Callable[..., T], *args: Any) -> T:
        """Run a function in the engine's thread; wait while its queue is full."""
        while True:
            try:
                return await self._engine.run(function, *args)
            except ServingError as error:
                if error.code != "overloaded":
                    raise
                await asyncio.sleep(_BUSY_SECONDS)


class _Writing:
    """A document on its way into the store, in a thread that takes its rows from the engine.

    Args:
        memory: only the engine's thread uses it.
        run: runs a function in the engine's thread.
        document: to be written.
        cancelled: set when it is not wanted any more.
    """

    def __init__(
        self,
        memory: Memory,
        run: Callable[..., Coroutine[Any, Any, Any]],
        document: Document,
        cancelled: threading.Event,
    ) -> None:
        self._memory = memory
        self._run = run
        self._document = document
        self._cancelled = cancelled
        self._loop = asyncio.get_running_loop()
        self._pause: Future[None] | None = None
        self._paused = threading.Event()
        self._committed = threading.Event()

    async def done(self) -> Status:
        """Write the document in a thread; when this is cancelled, wait for the thread's end."""
        thread = asyncio.ensure_future(asyncio.to_thread(self._write))
        try:
            counts = await asyncio.shield(thread)
        except asyncio.CancelledError:
            self._cancelled.set()
            await asyncio.wait([thread])
            raise
        return "added" if counts.added else "replaced" if counts.replaced else "skipped"

    def _write(self) -> Counts:
        memory, document = self._memory, self._document
        if memory.backend.path is None:  # in RAM, which is small: there is no second backend
            source = (document.name, document.text or "", document.metadata)
            return self._in_engine(memory.write_all, [source])
        with contextlib.closing(self._in_engine(memory.second_backend)) as backend:
            self._in_engine(memory.before_first_write, backend)
            changes = Changes(backend, [document])
            try:
                rows = ((each, self._rows(each)) for each in changes)
                for name, _ in backend.add_many(rows, replace=True):
                    changes.committed(name)
            finally:
                self._committed.set()
                if self._pause is not None:
                    self._pause.result()
        return changes.counts

    def _rows(self, document: Document) -> Iterator[Rows]:
        """Yield the rows of a document; after the last the engine pauses until the commit."""
        windows = self._in_engine(self._memory.encoder.encode, document)
        while (rows := self._in_engine(next, windows, None)) is not None:
            yield rows
        self._pause = self._submit(self._until_committed)
        self._pause.add_done_callback(lambda _: self._paused.set())  # also if it cannot begin
        self._paused.wait()
        if self._cancelled.is_set():
            raise _cancelled()

    def _until_committed(self) -> None:
        """Keep the engine from all else until the document is part of the store; show it then."""
        self._paused.set()
        self._committed.wait()
        self._memory.refresh()

    def _in_engine(self, function: Callable[..., T], *args: Any) -> T:
        """Run a function in the engine's thread, and wait for it in this one.

        Raises:
            ServingError: 499, the document is not wanted any more.
        """
        if self._cancelled.is_set():
            raise _cancelled()
        result: T = self._submit(function, *args).result()
        return result

    def _submit(self, function: Callable[..., T], *args: Any) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(self._run(function, *args), self._loop)


def _cancelled() -> ServingError:
    return ServingError(499, "The client closed the request; nothing was written.")
