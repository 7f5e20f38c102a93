"""`emt serve`: what it refuses before it loads a model, and a process from its start to its end."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys

import httpx
import openai
import pytest

from emt.cli import serve
from emt.profiles.choice import PROFILE
from memory_backends.catalog import Catalog
from tests.emt.commands import ROOT, emt


def refusal(*options):
    """Return the error of a command that must not begin to serve."""
    return emt("serve", *options, code=2).err


def test_without_keys_only_this_machine_is_served(tmp_path):
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.com"):
        error = refusal("--store", tmp_path / "store", "--host", host)
        assert f"everybody who reaches '{host}' could read and change the memory" in error
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-batch", "0"], "max_batch must be above 0; got 0"),
        (["--max-seconds", "-1"], "max_seconds must be above 0"),
        (["--keys", "nothing.yaml"], "'nothing.yaml' cannot be read"),
        (["--port", "70000"], "port must be 0 to 65535; got 70000"),
        (["--port", "-3"], "port must be 0 to 65535; got -3"),
        (["--port", "http"], "invalid int value"),
    ],
)
def test_mistakes_are_told_before_a_model_is_loaded(tmp_path, options, message):
    assert message in refusal("--store", tmp_path / "store", "--model", "nowhere", *options)
    assert not (tmp_path / "store").exists()


def test_a_port_that_is_taken_is_told(tmp_path):
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        error = refusal("--store", tmp_path / "store", "--port", port)
    assert f"cannot listen at 127.0.0.1, port {port}: Address already in use." in error


def test_what_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(serve, "find_spec", lambda name: None if name == "uvicorn" else name)
    error = refusal("--store", tmp_path / "store")
    assert "`emt serve` needs the package uvicorn" in error
    assert "pip install 'emt[serve]'" in error


@contextlib.contextmanager
def process(*options):
    """Run `emt serve` in a process; yields it, its address, and what it says on stderr."""
    command = [sys.executable, "-m", "emt", "serve", "--port", "0", *map(str, options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as server:
        try:
            said = []
            for line in server.stderr:
                said.append(line)
                if "there are no keys" in line or "--keys" in options:
                    break
            address = re.search(r"http://\S+", "".join(said))
            assert address, said
            yield server, address[0], said
        finally:
            server.kill()


def test_a_store_is_served_until_sigterm_and_answers_are_finished(tmp_path, model, monkeypatch):
    monkeypatch.setenv("EMT_CACHE", str(tmp_path / "cache"))  # which has no head profile
    store = tmp_path / "new"
    with process("--store", store, "--model", model) as (server, url, said):
        assert "no head profile of this model: one is made" in said[0]
        assert any(f"serving '{model.name}' with 0 documents of '{store}'" in line for line in said)
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        assert [each.id for each in client.models.list()] == [model.name]
        written = httpx.put(f"{url}/v1/documents/d", json={"text": "w20 w30 w40 w50"}, timeout=60)
        assert written.status_code == 201
        assert httpx.get(f"{url}/health", headers={"host": "evil.example"}).status_code == 403
        chunks = client.completions.create(
            model=model.name, prompt="w20 w30", max_tokens=200, stream=True
        )
        next(chunks)
        server.send_signal(signal.SIGTERM)
        *_, last = chunks
        assert last.choices[0].finish_reason in ("stop", "length")
        server.wait(60)
        assert server.returncode == -signal.SIGTERM
    with contextlib.closing(Catalog.open(store)) as catalog:  # as `emt index` leaves it
        assert catalog.setting(PROFILE)["heads"]
        assert catalog.setting("index")["num_rows"] == 4
    assert "d" in emt("list", store).out
    assert emt("verify", store).code == 0
