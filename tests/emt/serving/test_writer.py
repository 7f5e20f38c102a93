"""Documents are written while questions are answered, whole or not at all."""

import concurrent.futures
import contextlib
import itertools
import json
import socket
import threading
import time

import pytest

from emt.errors import StoreError
from emt.ingest.rows import RowReader
from emt.serving import writer
from emt.serving.limits import Limits
from emt.serving.progress import Progress
from memory_backends.store.batch import Batch
from memory_backends.store.lock import write_lock
from memory_backends.store.verify import verify
from tests.emt.serving.site import open_site, url
from tests.emt.serving.tiny_server import serving

LONG = " ".join(f"w{3 + 7 * number % 90}" for number in range(300))
SMALL_WINDOWS = {"stride": 16, "max_length": 32, "relevance": None}


@pytest.fixture
def site(tmp_path):
    with open_site(tmp_path, Limits(), **SMALL_WINDOWS) as site:
        site.put("root", "before", "w3 w4 w5")
        yield site


class Gate:
    """Holds a writer before it asks for its fourth window, until it is opened."""

    def __init__(self, monkeypatch):
        self.is_reached, self.is_open = threading.Event(), threading.Event()
        own, count = writer._Writing._in_engine, itertools.count()

        def gated(writing, function, *args):
            if function is next and next(count) == 3:
                self.is_reached.set()
                assert self.is_open.wait(20)
            return own(writing, function, *args)

        monkeypatch.setattr(writer._Writing, "_in_engine", gated)


@pytest.fixture
def gate(monkeypatch):
    return Gate(monkeypatch)


def ask(site, text="w3 w4"):
    body = {"model": "emt", "messages": [{"role": "user", "content": text}], "max_tokens": 2}
    response = site("root", "POST", "/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return {passage["document"] for passage in response.json()["choices"][0]["passages"]}


def found(site, text):
    response = site("root", "POST", "/v1/search", json={"query": text})
    assert response.status_code == 200, response.text
    return response.json()["data"]


def test_questions_are_answered_while_a_document_is_read(site, gate):
    with concurrent.futures.ThreadPoolExecutor() as pool:
        written = pool.submit(site.put, "root", "long", LONG)
        assert gate.is_reached.wait(20)
        assert ask(site) == {"before"}
        assert site.names("root") == ["before"]
        assert [passage["document"] for passage in found(site, "w3 w10 w17")] == ["before"]
        assert site("root", "GET", "/v1/store").json()["num_documents"] == 1
        waits = pool.submit(site, "root", "DELETE", url("before"))
        time.sleep(0.05)
        assert not waits.done()  # one after the other
        gate.is_open.set()
        assert written.result()["status"] == "added"
        assert waits.result().status_code == 200
    assert site.names("root") == ["long"]
    assert ask(site) == {"long"}


def ask_to_remember(site, who="root", content="w3 w4"):
    memory = {"remember": True, "conversation": "talk"}
    messages = [{"role": "user", "content": content}]
    body = {"model": "emt", "messages": messages, "max_tokens": 2, "memory": memory}
    response = site(who, "POST", "/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    return choice["remembered"]


def test_an_answer_does_not_wait_until_a_long_document_is_read(site, gate, monkeypatch):
    """Its turn is written after the document."""
    monkeypatch.setattr(writer, "_REMEMBER_SECONDS", 0.1)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        written = pool.submit(site.put, "root", "long", LONG)
        assert gate.is_reached.wait(20)
        assert ask_to_remember(site) is None
        gate.is_open.set()
        written.result()
    site.put("root", "last", "w9")
    assert site.names("root") == ["before", "last", "long", "talk/0001"]
    assert ask_to_remember(site, content="w5") == "talk/0002"


def test_turns_that_end_together_are_all_remembered(tmp_path):
    limits = Limits(max_waiting_documents=1)
    with open_site(tmp_path, limits, **SMALL_WINDOWS) as site:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            names = pool.map(lambda word: ask_to_remember(site, content=word), ["w3", "w4"] * 6)
        assert sorted(names) == [f"talk/{number:04d}" for number in range(1, 13)]


def test_an_answer_is_given_though_its_turn_cannot_be_written(site, caplog):
    with write_lock(site.folder / "store"):
        assert ask_to_remember(site) is None
    assert "a turn was not remembered" in caplog.text
    assert ask_to_remember(site) == "talk/0001"


def test_a_client_that_goes_away_leaves_nothing(site, gate):
    num_rows = site.memory.backend.catalog.num_rows
    head = "PUT /v1/documents/long HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/plain\r\n"
    head += f"Authorization: Bearer {site.keys['root']}\r\nContent-Length: {len(LONG)}\r\n\r\n"
    with serving(site.app) as address:
        place = ("127.0.0.1", int(address.rpartition(":")[2]))
        for sent in (len(LONG) // 2, len(LONG)):  # in the upload, and while the model reads
            with socket.create_connection(place) as connection:
                connection.sendall((head + LONG[:sent]).encode())
                if sent == len(LONG):
                    assert gate.is_reached.wait(20)
        time.sleep(0.2)
        gate.is_open.set()
        assert site.names("root") == ["before"]
        status = site.put("root", "after", "w6 w7")["status"]  # waits for the one before
    assert status == "added"
    assert site.names("root") == ["after", "before"]
    assert site.memory.backend.catalog.num_rows == num_rows + 2
    assert verify(site.folder / "store") == []


@pytest.mark.parametrize("what", ["the model", "the disk", "the last step"])
def test_what_fails_leaves_nothing_and_the_server_goes_on(site, monkeypatch, what):
    with monkeypatch.context() as broken:
        if what == "the model":
            own, count = RowReader.forward, itertools.count()

            def forward(*args, **options):
                if next(count) == 4:
                    raise RuntimeError("out of memory")
                return own(*args, **options)

            broken.setattr(RowReader, "forward", forward)
        elif what == "the disk":

            def commit(batch):
                raise StoreError("the disk is full")

            broken.setattr(Batch, "commit", commit)
        else:
            own, count = site.memory.refresh, itertools.count()

            def refresh():
                if next(count) == 1:  # the first is before the document is read
                    raise StoreError("the disk is gone")
                own()

            broken.setattr(site.memory, "refresh", refresh)
        response = site("root", "PUT", url("long"), json={"text": LONG})
        assert response.status_code == 500
        assert response.json()["error"]["type"] == "server_error"
        assert "disk" not in response.text
    if what != "the last step":
        assert site.names("root") == ["before"]
    assert ask(site) == set(site.names("root"))
    assert site.put("root", "long", LONG)["status"] in ("added", "skipped")
    assert {passage["document"] for passage in found(site, "w4 w10 w17")} == {"before", "long"}
    assert verify(site.folder / "store") == []


@contextlib.contextmanager
def other_process(site):
    """Yield a backend on the store's files that is not the memory's."""
    with contextlib.closing(site.memory.second_backend()) as other:
        yield other


def write_theirs(site, other, name="theirs"):
    (rows,) = site.memory.read([3, 4, 5])
    other.add(site.memory.encoder.document([3, 4, 5], name), [rows])


def test_what_another_process_writes_is_seen_at_once(site):
    with other_process(site) as other:
        write_theirs(site, other)
        assert ask(site) == {"before", "theirs"}
        write_theirs(site, other, "more")
        assert {passage["document"] for passage in found(site, "w3 w4")} == set(site.names("root"))
        other.remove_document("before")
        assert ask(site) == {"theirs", "more"}
    assert site("root", "DELETE", url("theirs")).status_code == 200
    assert site.names("root") == ["more"]


@pytest.mark.parametrize("mode", ["passage", "token"])
def test_what_another_process_removes_while_an_answer_is_given_is_still_cited(
    site, monkeypatch, mode
):
    own, count = Progress.__call__, itertools.count()

    def removing(*args, **options):
        if next(count) == 1:
            with other_process(site) as other:
                other.remove_document("before")
        return own(*args, **options)

    monkeypatch.setattr(Progress, "__call__", removing)
    body = {
        "model": "emt",
        "messages": [{"role": "user", "content": "w3 w4"}],
        "max_tokens": 4,
        "memory": {"mode": mode, "tokens": True},
    }
    response = site("root", "POST", "/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    assert ask(site) == set()


@pytest.mark.parametrize("method", ["PUT", "DELETE"])
def test_another_process_holds_the_lock(site, method):
    """It is waited for by the client: the server is not broken, and tells no path."""
    options = {"json": {"text": "w7"}} if method == "PUT" else {}
    with write_lock(site.folder / "store"):
        response = site("root", method, url("before"), **options)
        assert response.status_code == 503, response.text
        assert int(response.headers["retry-after"]) > 0
        assert str(site.folder) not in response.text
        assert ask(site) == {"before"}
    assert site("root", method, url("before"), **options).status_code == 200


def test_a_crowd_that_writes_removes_and_asks(site):
    """Nothing fails, and what is found of a document is one of the texts that it has had."""
    texts = [" ".join(f"w{3 + (17 * n + k) % 90}" for k in range(40)) for n in range(4)]
    wrong = []

    def write(name):
        for text in texts * 2:
            site.put("root", name, text)
            if text is texts[2]:
                response = site("root", "DELETE", url(name))
                assert response.status_code == 200, response.text

    def read(number):
        for k in range(8):
            for passage in found(site, f"w{3 + (5 * number + k) % 90}"):
                wrong.extend([passage] * (passage["text"] not in (*texts, "w3 w4 w5")))
            ask(site, f"w{10 + number}")
            for name in site.names("root"):
                response = site("root", "GET", url(name))
                assert response.status_code in (200, 404)
                if response.status_code == 200:
                    wrong.extend([name] * (response.json()["text"] not in (*texts, "w3 w4 w5")))

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        jobs = [pool.submit(write, name) for name in ("one", "two", "three")]
        jobs += [pool.submit(read, number) for number in range(3)]
        for job in jobs:
            job.result()
    assert wrong == []
    assert site.names("root") == ["before", "one", "three", "two"]
    assert verify(site.folder / "store") == []


def test_the_index_is_brought_up_to_date_at_the_end(tmp_path):
    with open_site(tmp_path, Limits(), routing="words", **SMALL_WINDOWS) as site:
        site.put("root", "long", LONG)
        assert not (tmp_path / "store" / "index").exists()
    facts = site.memory.backend.catalog.setting("index")
    assert facts["num_rows"] == 300
    assert json.dumps(facts)
