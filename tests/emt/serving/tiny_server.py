"""A tiny model of words with a memory of a few documents, served on a port of this machine."""

import contextlib
import socket
import threading
import time

import openai
import uvicorn

from emt import MemoryConfig, attach
from emt.serving.app import create_app
from tests.emt.words import word_tokenizer
from tests.families import build

TEMPLATE = (
    "{% for m in messages %}<bos> w90 {{ m.content }} w91 {% endfor %}"
    "{% if add_generation_prompt %}w92{% endif %}"
)
TEXTS = {
    name: " ".join(f"w{number}" for number in range(first, first + 20))
    for name, first in (("a", 5), ("b", 30), ("c", 60))
}


def make_memory(*, texts=TEXTS, chat=True, **settings):
    """Return a tiny llama and its memory, which recalls passages for every prompt."""
    model = build("llama")
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE if chat else None
    config = MemoryConfig(**{"relevance": None, **settings})
    memory = attach(model, config, tokenizer=tokenizer)
    for name, text in texts.items():
        memory.write(text, document=name, metadata={"user": name})
    return model, memory


@contextlib.contextmanager
def serving(app):
    """Serve an application; yields its address. Its end waits for what is being answered."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_level="warning", ws="none", timeout_graceful_shutdown=20)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


@contextlib.contextmanager
def official_client(model, memory, **options):
    """Yield OpenAI's own client of a server."""
    app = create_app(model, memory, **{"model_name": "tiny", **options})
    with (
        serving(app) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        client.app = app
        yield client


def user(text):
    """Return a chat of one message."""
    return [{"role": "user", "content": text}]
