"""`emt chat`: a conversation in the terminal, whose turns can become memories as they are said."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from emt.answer import Answer, sampling_options
from emt.cli.documents import document_line, records_of
from emt.cli.generate import add_sampling_options, positive, print_sources, show
from emt.cli.model_options import add_model_options
from emt.cli.printing import count, one_line, say
from emt.cli.scope_options import add_scope_options, metadata_of, using_settings
from emt.cli.search import print_passages
from emt.cli.session import Session
from emt.conversation.conversation import Conversation
from emt.errors import ConfigError, EMTError
from emt.memory.memory import Memory

_HELP = """\
/sources        what the last answer is from
/search TEXT    the passages that a text is about
/documents      the documents of the store
/forget         remove what was remembered of this conversation, and begin anew
/quit           the end; Ctrl-D as well. Ctrl-C stops an answer"""
_SAMPLING = ("temperature", "top_p", "seed")


def add_to(commands: Any) -> None:
    """Add the subcommand to a parser's."""
    parser = commands.add_parser(
        "chat",
        help="talk with a model that has a store",
        description="Talk with a model that has a store: each line is a message, or a command such "
        "as /help. With --remember, each turn becomes part of the store when it is answered, "
        "without being read again, and later conversations recall it. A message that only asks "
        "what the store answers says nothing new, and is not kept.",
    )
    parser.set_defaults(run=chat)
    parser.add_argument("--store", required=True, metavar="DIR")
    parser.add_argument(
        "--remember",
        action="store_true",
        help="keep the turns in the store, which is made if there is none",
    )
    parser.add_argument(
        "--conversation",
        metavar="NAME",
        help="what its turns are named by; one that the store has goes on (default: the time)",
    )
    add_model_options(parser)
    parser.add_argument("--config", metavar="FILE", help="memory settings in YAML")
    parser.add_argument("--max-new-tokens", type=positive, default=256, metavar="N")
    add_sampling_options(parser)
    add_scope_options(parser)


def chat(options: argparse.Namespace) -> None:
    """Answer what stands on standard input, line by line, until its end."""
    given = {name: getattr(options, name) for name in _SAMPLING}
    sampling = sampling_options(**given)  # a mistake is told before the model is loaded
    metadata = metadata_of(options) if options.remember else None
    name = options.conversation or time.strftime("chat-%Y%m%d-%H%M%S")
    session = Session(options, writing=options.remember)
    if session.is_new:
        session.remember()
    conversation = Conversation(
        session.model, session.memory, name=name, remembers=options.remember, metadata=metadata
    )
    asked_with = {
        "max_new_tokens": options.max_new_tokens,
        "sampling": sampling,
        "seed": options.seed,
    }
    with session.memory.using(**using_settings(options)):
        pass  # a document that is not there is told now
    _Chat(session.memory, conversation, asked_with, options).run()
    if options.remember and session.memory.documents:
        session.memory.save()  # indexes of what is new


class _Chat:
    """The loop of a terminal: a message, its answer, the next."""

    def __init__(
        self,
        memory: Memory,
        conversation: Conversation,
        asked_with: dict[str, Any],
        options: argparse.Namespace,
    ) -> None:
        self._memory = memory
        self._conversation = conversation
        self._asked_with = asked_with
        self._scope = using_settings(options)
        self._place = one_line(options.store)
        self._last: Answer | None = None
        self._commands: dict[str, Callable[[str], object]] = {
            "/help": lambda _: print(_HELP),
            "/sources": lambda _: self._sources(),
            "/search": self._search,
            "/documents": lambda _: self._documents(),
            "/forget": lambda _: self._forget(),
        }

    def run(self) -> None:
        """Read and answer until /quit or the end of the input."""
        say(f"{count(len(self._memory.documents), 'document')} in '{self._place}'; /help helps.")
        for line in _lines():
            command, _, rest = line.partition(" ")
            if command == "/quit":
                return
            try:
                if not line.startswith("/"):
                    self._answer(line)
                elif command in self._commands:
                    self._commands[command](rest.strip())
                else:
                    raise ConfigError(f"there is no command '{command}'; /help lists them.")
            except EMTError as error:  # the conversation goes on
                say(str(error))
            except KeyboardInterrupt:  # of a command, or a second one in an answer
                print(flush=True)

    def _answer(self, message: str) -> None:
        with _interruptible() as is_interrupted:
            self._last = self._conversation.ask(
                message, on_text=show, should_stop=is_interrupted, **self._asked_with, **self._scope
            )
        print(flush=True)

    def _sources(self) -> None:
        if self._last is None:
            raise ConfigError("there is no answer yet.")
        print_sources(self._last)

    def _search(self, text: str) -> None:
        with self._memory.using(**self._scope):
            print_passages(self._memory, text, self._place)

    def _documents(self) -> None:
        for record in records_of(self._memory.backend.catalog):
            print(document_line(record))

    def _forget(self) -> None:
        self._last = None
        number = count(self._conversation.forget(), "turn")
        print(f"{number} of '{one_line(self._conversation.name)}' forgotten.")


def _lines() -> Iterator[str]:
    """Yield the messages that are typed, or that stand on standard input; empty ones left out."""
    is_typed = sys.stdin.isatty()
    if is_typed:
        with contextlib.suppress(ImportError):  # on Windows
            import readline  # noqa: F401  # input() has a history then
    while True:
        try:
            line = input("> ") if is_typed else sys.stdin.readline()
        except KeyboardInterrupt:
            print(flush=True)
            continue
        except EOFError:
            print(flush=True)
            return
        if not line and not is_typed:
            return
        if line.strip():
            yield line.strip()


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Let the first Ctrl-C in a `with` block be a wish, which the function that is given tells."""
    interrupts: list[int] = []

    def note(number: int, frame: Any) -> None:
        if interrupts:
            raise KeyboardInterrupt
        interrupts.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(interrupts)
    finally:
        signal.signal(signal.SIGINT, before)
