"""A tiny model of words with a memory of a few documents, served in this process."""

import contextlib
import socket
import threading
import time

import pytest

openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")

from emt import MemoryConfig, attach  # noqa: E402
from emt.serving.app import create_app  # noqa: E402
from tests.emt.serving.site import open_site  # noqa: E402
from tests.emt.words import word_tokenizer  # noqa: E402
from tests.families import build  # noqa: E402

TEMPLATE = (
    "{% for m in messages %}<bos> w90 {{ m.content }} w91 {% endfor %}"
    "{% if add_generation_prompt %}w92{% endif %}"
)
TEXTS = {
    name: " ".join(f"w{number}" for number in range(first, first + 20))
    for name, first in (("a", 5), ("b", 30), ("c", 60))
}


def make_memory(**settings):
    """Return a tiny llama and its memory of documents "a", "b" and "c"."""
    model = build("llama")
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    memory = attach(model, MemoryConfig(**settings), tokenizer=tokenizer)
    for name, text in TEXTS.items():
        memory.write(text, document=name, metadata={"user": name})
    return model, memory


@contextlib.contextmanager
def serving(app):
    """Serve an application on a free port of this machine; yields its address."""
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning", ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


@contextlib.contextmanager
def client_of(app):
    """Yield the official client of an application."""
    with serving(app) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        yield client


@pytest.fixture
def remembering():
    return make_memory()


@pytest.fixture
def app(remembering):
    return create_app(*remembering, model_name="tiny")


@pytest.fixture
def client(app):
    with client_of(app) as client:
        yield client


@pytest.fixture
def site(tmp_path):
    """A server with keys of several scopes, and a store without documents."""
    with open_site(tmp_path) as site:
        yield site
