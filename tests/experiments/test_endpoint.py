"""A model behind an endpoint, asked by the real client over a server on this machine."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from experiments.endpoint import EndpointError, EndpointModel

from emt.errors import ConfigError
from tests.experiments.fakes import item, write_items
from tests.experiments.scripts import run_script

KEY = "sk-a-key-that-nobody-may-see-0123456789"


def completion(text, *, reason="stop", used=7):
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": reason}
    return {"id": "1", "choices": [choice], "usage": {"prompt_tokens": used}}


@pytest.fixture
def serve(monkeypatch):
    """Return a function that serves (status, body) replies in turn, the last again and again."""
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr("openai._base_client.BaseClient._calculate_retry_timeout", lambda *_: 0)

    @contextlib.contextmanager
    def serving(*replies):
        requests = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                status, reply = replies[min(len(requests), len(replies) - 1)]
                requests.append((self.path, self.headers, json.loads(body)))
                content = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setenv("EMT_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}/v1")
        monkeypatch.setenv("EMT_ENDPOINT_KEY", KEY)
        try:
            yield requests
        finally:
            server.shutdown()
            thread.join()
            server.server_close()

    return serving


def test_a_message_is_sent_and_its_answer_returned(serve):
    with serve((200, completion(" Leeds\n"))) as requests:
        model = EndpointModel(
            "small", max_new_tokens=9, parameters={"seed": 3, "temperature": None}
        )
        response = model.respond("Where to?", ["Leeds"])
    assert (response.text, response.log_probs, response.num_prompt_tokens) == ("Leeds", None, 7)
    assert response.seconds > 0
    ((path, headers, body),) = requests
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}"
    messages = [{"role": "user", "content": "Where to?"}]
    assert body == {"model": "small", "messages": messages, "max_tokens": 9, "seed": 3}


def test_a_server_that_is_busy_is_asked_again(serve):
    with serve((429, {}), (503, b""), (200, completion("yes"))) as requests:
        assert EndpointModel("small", attempts=3).respond("?").text == "yes"
    assert len(requests) == 3
    with serve((503, {"error": {"message": "too busy"}})) as requests:
        with pytest.raises(EndpointError, match="too busy"):
            EndpointModel("small", attempts=2).respond("?")
        assert len(requests) == 2


def test_an_empty_answer_is_an_answer_if_the_model_is_done(serve):
    with serve((200, completion("", used=None))):
        response = EndpointModel("small").respond("?")
    assert (response.text, response.num_prompt_tokens) == ("", 1 + 16)


@pytest.mark.parametrize(
    ("reply", "error", "said"),
    [
        ((401, {"error": {"message": f"wrong key {KEY}"}}), ConfigError, "refuses the key"),
        ((403, {}), ConfigError, "refuses the key in EMT_ENDPOINT_KEY"),
        ((404, {"error": {"message": "no such model"}}), EndpointError, "no such model"),
        ((400, {"error": {"message": f"{KEY} at http://127.0.0.1"}}), EndpointError, r"\*\*\* at"),
        ((200, {}), EndpointError, "without a text"),
        ((200, {"choices": []}), EndpointError, "without a text"),
        ((200, {"choices": [1]}), EndpointError, "without a text"),
        ((200, completion(None, reason="length")), EndpointError, "max_new_tokens"),
        ((200, b"<html>"), EndpointError, "no answer|without a text"),
    ],
)
def test_what_is_no_answer_is_an_error_without_secrets(serve, reply, error, said):
    with serve(reply), pytest.raises(error, match=said) as caught:
        EndpointModel("small", attempts=1).respond("?")
    assert KEY not in str(caught.value)
    assert "127.0.0.1" not in str(caught.value)


def test_an_endpoint_that_is_away(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("EMT_ENDPOINT_URL", "http://127.0.0.1:9/v1")
    model = EndpointModel("small", attempts=1, timeout=2)
    assert KEY not in repr(vars(model._client))
    with pytest.raises(EndpointError, match="gave no answer: Connection error"):
        model.respond("?")


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://host/v1", "http://"])
def test_a_url_that_is_none_is_refused(monkeypatch, url):
    monkeypatch.setenv("EMT_ENDPOINT_URL", url)
    with pytest.raises(ConfigError, match="EMT_ENDPOINT_URL must be the endpoint's base URL"):
        EndpointModel("small")


def test_tokens_are_estimated_and_no_text_is_lost(monkeypatch):
    monkeypatch.setenv("EMT_ENDPOINT_URL", "http://host/v1")
    model = EndpointModel("small", max_new_tokens=30, window=100)
    assert model.room == 70
    assert model.count("x" * 9) == 3 + 16
    assert EndpointModel("small").room is None
    text = "Snow fell on " + "x" * 50 + " and Leeds.\n"
    pieces = model.split(text, 3)
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 12
    assert pieces[0] == "Snow fell "
    with pytest.raises(ConfigError, match="window must have room"):
        EndpointModel("small", max_new_tokens=30, window=46)


def test_the_retrieval_experiment_asks_an_endpoint(serve, tmp_path, monkeypatch):
    items = write_items(tmp_path / "items.jsonl", [item("a")])
    out = tmp_path / "out"
    command = ["run_experiment", "retrieval", "--model", "endpoint:small", "--output", out]
    command += ["--set", f"items={items}", "--set", "endpoint={attempts: 1, parameters: {seed: 3}}"]
    refused = run_script(*command)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "Set conditions to [closed_book, document, rag]." in refused.stderr
    command += ["--set", "conditions=[closed_book, document, rag]"]
    with serve((200, completion("Leeds"))) as requests:
        done = run_script(*command)
    assert done.returncode == 0, done.stderr
    assert [(body["model"], body["seed"]) for _, _, body in requests] == [("small", 3)] * 3
    written = [(out / name).read_text() for name in ("summary.md", "results.jsonl")]
    for text in (*written, done.stdout, done.stderr):
        assert KEY not in text
        assert "127.0.0.1" not in text
