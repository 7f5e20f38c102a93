"""What those who run a server see of it: health, figures, its description, its errors."""

import pytest
from starlette.testclient import TestClient

from emt import MemoryConfig, attach
from emt.errors import ConfigError, MemoryUseError
from emt.serving.app import create_app
from emt.serving.hosts import OnlyLocalHosts, is_loopback
from emt.serving.limits import Limits
from tests.emt.serving.tiny_server import make_memory, user
from tests.families import build


@pytest.fixture(scope="module")
def client():
    app = create_app(*make_memory(), model_name="tiny", limits=Limits(max_body_bytes=2000))
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def test_a_server_needs_a_tokenizer():
    model = build("llama")
    with pytest.raises(MemoryUseError, match="needs a tokenizer"):
        create_app(model, attach(model, MemoryConfig()))


@pytest.mark.parametrize("name", ["max_batch", "max_seconds", "max_document_bytes"])
@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_limits_are_above_zero(name, value):
    with pytest.raises(ConfigError, match=f"{name} must be above 0"):
        Limits(**{name: value})


def test_health_and_readiness(client):
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").json() == {"status": "ready"}


def test_figures(client):
    body = {"model": "tiny", "messages": user("w10"), "max_tokens": 3, "n": 2}
    assert client.post("/v1/chat/completions", json=body).status_code == 200
    assert client.post("/v1/chat/completions", json={}).status_code == 400
    assert client.get("/secret/name").status_code == 404
    lines = client.get("/metrics").text.splitlines()
    route = 'method="POST",route="/v1/chat/completions"'
    for line in (
        f'emt_requests_total{{{route},status="200"}} 1.0',
        f'emt_requests_total{{{route},status="400"}} 1.0',
        'emt_requests_total{method="any",route="unknown",status="404"} 1.0',
        'emt_tokens_total{kind="prompt"} 5.0',
        'emt_tokens_total{kind="generated"} 6.0',
        "emt_batch_answers_sum 2.0",
        "emt_waiting_prompts 0.0",
    ):
        assert line in lines
    assert not any("secret" in line for line in lines)


def test_every_route_and_its_errors_are_described(client):
    described = client.get("/openapi.json").json()
    for path in ("/v1/chat/completions", "/v1/completions"):
        responses = described["paths"][path]["post"]["responses"]
        assert {"200", "400", "401", "404", "413", "503", "504"} <= set(responses)
        assert set(responses["200"]["content"]) == {"application/json", "text/event-stream"}
    error = described["components"]["schemas"]["ErrorResponse"]
    assert set(error["properties"]) == {"error"}


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("PUT", "/v1/chat/completions", 405),
        ("GET", "/v1/models/other", 404),
        ("POST", "/v1/chat/completions", 400),
    ],
)
def test_all_errors_have_openais_shape(client, method, path, status):
    response = client.request(method, path)
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_a_body_that_is_too_large_is_refused(client):
    body = {"model": "tiny", "messages": user("w3 " * 1000)}
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "too_large"


def test_what_fails_inside_is_not_told(client, monkeypatch, caplog):
    def broken(*_, **__):
        raise RuntimeError("a secret of the server")

    monkeypatch.setattr("emt.serving.completions.prompts_of_chat", broken)
    body = {"model": "tiny", "messages": user("w3")}
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    assert "secret" not in response.text
    assert "a secret of the server" in caplog.text
    assert 'completions",status="500"} 1.0' in client.get("/metrics").text


def test_every_answer_has_the_headers_that_keep_scripts_out(monkeypatch):
    """Refused hosts, refused bodies, and what fails inside, too."""
    limits = Limits(max_body_bytes=2000)
    app = create_app(*make_memory(), model_name="tiny", limits=limits, only_local_hosts=True)
    monkeypatch.setattr("emt.serving.completions.prompts_of_chat", None)
    body = {"model": "tiny", "messages": user("w3")}
    with TestClient(app, base_url="http://localhost") as client:
        for status, response in (
            (200, client.get("/health")),
            (200, client.get("/")),
            (403, client.get("/health", headers={"host": "evil.example"})),
            (404, client.get("/nothing")),
            (413, client.post("/v1/chat/completions", content=b" " * 3000)),
            (500, client.post("/v1/chat/completions", json=body)),
        ):
            assert response.status_code == status
            assert "default-src 'self'" in response.headers["content-security-policy"]
            assert response.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    ("host", "is_local"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9:80", True),
        ("localhost:8000", True),
        ("[::1]:8000", True),
        ("LocalHost", True),
        ("evil.example", False),
        ("localhost.evil.example", False),
        ("192.168.1.3:8000", False),
        ("0.0.0.0", False),
        ("", False),
    ],
)
def test_without_keys_only_names_of_this_machine_are_answered(host, is_local):
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    response = TestClient(OnlyLocalHosts(app)).get("/", headers={"host": host})
    assert response.status_code == (200 if is_local else 403)


def test_loopback_addresses():
    assert all(map(is_loopback, ("127.0.0.1", "::1", "[::1]", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "", "example.com", "10.0.0.1")))


@pytest.mark.parametrize("headers", [{"content-type": "text/plain"}, {}])
def test_text_that_is_not_declared_as_json_is_refused(client, headers):
    """A page of another site may send text without asking the server first."""
    body = b'{"model": "tiny", "messages": [{"role": "user", "content": "w3"}]}'
    response = client.post("/v1/chat/completions", content=body, headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"
