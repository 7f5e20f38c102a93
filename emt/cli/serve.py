"""`emt serve`: answer the OpenAI API from a store, until it is told to end."""

from __future__ import annotations

import argparse
import socket
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emt.cli.model_options import add_model_options
from emt.cli.printing import count, one_line, say
from emt.cli.profile import profile_if_needed
from emt.cli.session import Session
from emt.errors import ConfigError
from memory_backends.errors import StoreLockedError

if TYPE_CHECKING:
    from fastapi import FastAPI

_DRAIN_SECONDS = 30  # for answers that are being given when the server is told to end


def add_to(commands: Any) -> None:
    """Add the subcommand to a parser's."""
    parser = commands.add_parser("serve", help="answer the OpenAI API from a store")
    parser.set_defaults(run=serve)
    parser.add_argument("--store", required=True, metavar="DIR", help="made if there is none")
    add_model_options(parser)
    parser.add_argument("--config", metavar="FILE", help="memory settings in YAML")
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="default: 8000; 0 for a free one")
    parser.add_argument("--keys", metavar="FILE", help="who may see and write what")
    parser.add_argument(
        "--served-model-name", metavar="NAME", help="as clients know it (default: the model's)"
    )
    parser.add_argument("--max-batch", type=int, metavar="N", help="answers generated together")
    parser.add_argument("--max-waiting", type=int, metavar="N", help="requests that may wait")
    parser.add_argument("--max-seconds", type=float, metavar="S", help="for one request")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="of one answer")


def serve(options: argparse.Namespace) -> None:
    """Answer the OpenAI API from a store."""
    _check_installed()
    import uvicorn

    from emt.serving.app import create_app
    from emt.serving.hosts import is_loopback
    from emt.serving.keys import Keys
    from emt.serving.limits import Limits

    names = ("max_batch", "max_waiting", "max_seconds", "max_new_tokens")
    given = {name: getattr(options, name) for name in names}
    limits = Limits(**{name: value for name, value in given.items() if value is not None})
    keys = None if options.keys is None else Keys.read(Path(options.keys))
    if keys is None and not is_loopback(options.host):
        raise ConfigError(
            f"without --keys everybody who reaches '{options.host}' could read and change the "
            "memory. Give a file of keys, or serve 127.0.0.1."
        )
    with _listening(options.host, options.port) as listener:  # a mistake is told at once
        session = Session(options, writing=True)
        if session.is_new:
            session.remember()
            session.memory.backend.save()  # makes the store, with these settings
        _profile(session)
        name = options.served_model_name or _name_of(session.source)
        app = create_app(
            session.model,
            session.memory,
            keys=keys,
            limits=limits,
            model_name=name,
            only_local_hosts=keys is None,
        )
        _say_where(app, listener, options)
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,  # paths name documents
            server_header=False,
            ws="none",
            timeout_graceful_shutdown=_DRAIN_SECONDS,
        )
        uvicorn.Server(config).run(sockets=[listener])


def _profile(session: Session) -> None:
    """Make the head profile that `emt index` would make: documents may only come over the API."""
    try:
        profile_if_needed(session.memory)
    except StoreLockedError:
        say("another process is writing to the store: the head profile is not kept in it")


def _check_installed() -> None:
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        if find_spec(package) is None:
            raise ConfigError(
                f"`emt serve` needs the package {package}. Install it with "
                "`pip install 'emt[serve]'`."
            )


def _listening(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises:
        ConfigError: the address is taken, or none.
    """
    if not 0 <= port < 2**16:  # the system would take what is left of it
        raise ConfigError(f"port must be 0 to {2**16 - 1}; got {port}.")
    try:
        family, _, _, _, address = socket.getaddrinfo(host.strip("[]"), port)[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        reason = str(error.strerror or error).partition(" (while")[0]
        raise ConfigError(f"cannot listen at {host}, port {port}: {reason}.") from error


def _name_of(source: str) -> str:
    """Return how clients call a model that was loaded from a folder, a file or the hub."""
    path = Path(source)
    return (path.name.removesuffix(".gguf") or source) if path.exists() else source


def _say_where(app: FastAPI, listener: socket.socket, options: argparse.Namespace) -> None:
    served = app.state.served
    host, port = listener.getsockname()[:2]
    documents = count(len(served.memory.documents), "document")
    say(
        f"serving '{one_line(served.model_name)}' with {documents} of '{options.store}' at "
        f"http://{f'[{host}]' if ':' in host else host}:{port}"
    )
    if served.keys is None:
        say("there are no keys: everybody on this machine may read and change the memory.")
