"""A model behind an endpoint in the retrieval experiment."""

from __future__ import annotations

import contextlib
import logging

import pytest
from experiments.results import read_results
from experiments.retrieval.answering import Responder
from experiments.retrieval.endpoint import KEY_VARIABLE, URL_VARIABLE, Endpoint
from experiments.retrieval.endpoint_model import EndpointModel
from experiments.retrieval.experiment import run_retrieval
from experiments.retrieval.report import summary
from experiments.retrieval.settings import RetrievalSettings

from emt.errors import ConfigError, EndpointError
from tests.experiments.fake_endpoint import KEY, Reply, completion, fake_endpoint
from tests.experiments.fakes import item, write_items


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")


@contextlib.contextmanager
def made(url, *, window=None, **options):
    environment = {URL_VARIABLE: url, KEY_VARIABLE: KEY}
    endpoint = Endpoint("small-1", environment=environment, sleep=lambda _: None, **options)
    with contextlib.closing(endpoint):
        yield EndpointModel(endpoint, window=window)


def test_text_and_the_server_s_count():
    replies = [Reply(completion("Leeds", used=50)), Reply(completion("York", used=None))]
    with fake_endpoint(*replies) as (url, asked), made(url) as model:
        responder: Responder = model
        first, second = responder.respond("Where?", ["Leeds", "York"]), responder.respond("When?")
    assert (first.text, first.log_probs, first.num_prompt_tokens) == ("Leeds", None, 50)
    assert (second.text, second.num_prompt_tokens) == ("York", 2 + 16)
    assert [one.body["messages"][0]["content"] for one in asked] == ["Where?", "When?"]


@pytest.mark.parametrize("num_tokens", [1, 3, 500])
@pytest.mark.parametrize("text", ["", "a", "one two three four five six", "x" * 50 + " y  z"])
def test_pieces_fit_and_lose_nothing(text, num_tokens):
    with made("http://a/v1") as model:
        pieces = model.split(text, num_tokens)
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= 4 * num_tokens for piece in pieces)


def test_words_stay_whole():
    with made("http://a/v1") as model:
        assert model.split("one two three four", 2) == ["one two ", "three ", "four"]


def test_a_window():
    with made("http://a/v1", window=100, max_new_tokens=30) as model:
        assert model.room == 70
    with made("http://a/v1") as model:
        assert model.room is None
    with (
        pytest.raises(ConfigError, match="room for a prompt and 30 new tokens; got 40"),
        made("http://a/v1", window=40),
    ):
        pass


def settings(folder, **changes):
    items = write_items(folder / "items.jsonl", [item("a"), item("b")])
    conditions = ["closed_book", "document", "rag"]
    return RetrievalSettings(items=str(items), model="small-1", conditions=conditions, **changes)


def test_a_run_is_scored_resumed_and_keeps_no_secret(tmp_path, caplog):
    """It stops where the endpoint breaks; the same call asks only what is left."""
    caplog.set_level(logging.DEBUG)
    good, broken = Reply(completion(f"Leeds, says {KEY}")), Reply(b"", status=500)
    asked_for = settings(tmp_path)
    with (
        fake_endpoint(good, good, broken) as (url, _),
        made(url, attempts=1) as model,
        pytest.raises(EndpointError, match="asked once and answered 500"),
    ):
        run_retrieval(asked_for, tmp_path / "out", loading=lambda _: model)
    with (
        fake_endpoint(Reply(completion("York"))) as (again, asked),
        made(again) as model,
    ):
        results = run_retrieval(asked_for, tmp_path / "out", loading=lambda _: model)
    assert len(results) == 6
    assert len(asked) == 4
    assert [record["text"] for record in results.items.values()][:3] == [
        "Leeds, says ***",
        "Leeds, says ***",
        "York",
    ]
    header, items = read_results(tmp_path / "out" / "results.jsonl")
    written = (tmp_path / "out" / "results.jsonl").read_text() + summary(header, items)
    logged = "".join(record.getMessage() for record in caplog.records)
    for secret in (KEY, url, again):
        assert secret not in written + logged


def test_a_document_is_cut_to_the_window(tmp_path):
    long = "The ship of a sailed to Leeds. " + "Snow fell. " * 100
    with fake_endpoint(Reply(completion("Leeds"))) as (url, asked), made(url, window=150) as model:
        items = write_items(tmp_path / "items.jsonl", [item("a", context=long)])
        asked_for = RetrievalSettings(
            items=str(items), model="small-1", conditions=["closed_book", "document"]
        )
        results = run_retrieval(asked_for, tmp_path / "out", loading=lambda _: model)
    record = results.items["2k/a/document"]
    assert (record["truncated"], record["has_answer"]) == (True, True)
    message = asked[1].body["messages"][0]["content"]
    assert model.count(message) <= model.room
    assert model.count(message) > model.room - 4
