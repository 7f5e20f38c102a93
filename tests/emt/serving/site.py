"""A server with keys, asked in this process."""

import contextlib
import json
from urllib.parse import quote

from starlette.testclient import TestClient

from emt import MemoryConfig, attach
from emt.serving.app import create_app
from emt.serving.keys import Keys
from emt.serving.limits import Limits
from tests.emt.words import word_tokenizer
from tests.families import build

KEYS = [
    {"name": "ann", "where": {"user": "ann"}, "write": True},
    {"name": "bob", "where": {"user": "bob"}, "write": True},
    {"name": "reader", "where": {"user": "ann"}},
    {"name": "root", "write": True},
]
LIMITS = Limits(max_body_bytes=4000, max_document_bytes=20_000, max_text_characters=1000)


class Site:
    """A tiny model with a memory in a store, and clients with keys.

    Attributes:
        app: the application.
        memory: that it serves.
        client: without a key.
        keys: by name: those of ann and bob see the documents of their user.
    """

    def __init__(self, folder, client, app, memory, keys):
        self.folder, self.client, self.app, self.memory, self.keys = (
            folder,
            client,
            app,
            memory,
            keys,
        )

    def __call__(self, who, method, path, **options):
        """Send a request with a key."""
        headers = {"Authorization": f"Bearer {self.keys[who]}"} | options.pop("headers", {})
        return self.client.request(method, path, headers=headers, **options)

    def put(self, who, name, text, **metadata):
        """Write a document; return the response's JSON."""
        response = self(who, "PUT", url(name), json={"text": text, "metadata": metadata})
        assert response.status_code in (200, 201), response.text
        return response.json()

    def names(self, who, **parameters):
        """Return the names that a key sees."""
        response = self(who, "GET", "/v1/documents", params=parameters)
        assert response.status_code == 200, response.text
        return [document["name"] for document in response.json()["data"]]


def url(name):
    """Return the path of a document."""
    return f"/v1/documents/{quote(name, safe='')}"


@contextlib.contextmanager
def open_site(folder, limits=LIMITS, **settings):
    """Serve a store in a folder; it is made by the first document."""
    keys = {each["name"]: f"emt-{each['name']}-0123456789" for each in KEYS}
    file = folder / "keys.json"
    file.write_text(json.dumps([{**each, "key": keys[each["name"]]} for each in KEYS]))
    model = build("llama")
    settings = {"path": str(folder / "store"), "memory_type": "vector_db", **settings}
    memory = attach(model, MemoryConfig(**settings), tokenizer=word_tokenizer())
    app = create_app(model, memory, keys=Keys.read(file), limits=limits)
    with TestClient(app, raise_server_exceptions=False) as client:
        yield Site(folder, client, app, memory, keys)
