"""A model behind an endpoint: what it is asked, what may go wrong, and what is never shown."""

from __future__ import annotations

import contextlib
import datetime
import email.utils
import logging
import socket
import sys
import traceback

import pytest
from experiments.retrieval.endpoint import KEY_VARIABLE, URL_VARIABLE, Endpoint
from experiments.retrieval.endpoint_reply import seconds_to_wait

from emt.errors import ConfigError, EndpointError
from tests.experiments.fake_endpoint import KEY, Reply, completion, fake_endpoint

BUSY = Reply({"error": {"message": "too many requests"}}, status=429)
BROKEN = Reply(b"<html>Bad Gateway</html>", status=502)
GOOD = Reply(completion(" Leeds.\n"))


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")


@contextlib.contextmanager
def made(url, *, key=KEY, **options):
    """Yield an endpoint and how long it has waited; close its connection."""
    waited = []
    environment = {URL_VARIABLE: url} | ({} if key is None else {KEY_VARIABLE: key})
    endpoint = Endpoint("small-1", environment=environment, sleep=waited.append, **options)
    with contextlib.closing(endpoint):
        yield endpoint, waited


def asking(*replies, **options):
    """Ask once; return the completion or the error, the waits, and what the server was asked."""
    with fake_endpoint(*replies) as (url, asked), made(url, **options) as (endpoint, waited):
        try:
            found = endpoint.complete("Where did the ship sail?")
        except (ConfigError, EndpointError) as error:
            found = error
    if isinstance(found, Exception):
        shown = "".join(traceback.format_exception(found))
        assert KEY not in shown
        assert url.removesuffix("/v1") not in shown
    return found, waited, asked


def test_a_message_is_sent_and_the_text_comes_back():
    found, waited, asked = asking(GOOD, max_new_tokens=12)
    assert (found.text, found.num_prompt_tokens) == ("Leeds.", 7)
    assert found.seconds > 0
    assert waited == []
    assert len(asked) == 1
    assert asked[0].path == "/v1/chat/completions"
    assert asked[0].headers["Authorization"] == f"Bearer {KEY}"
    assert asked[0].body == {
        "model": "small-1",
        "messages": [{"role": "user", "content": "Where did the ship sail?"}],
        "temperature": 0,
        "max_tokens": 12,
    }


def test_parameters_are_added_replaced_and_left_out():
    parameters = {"max_tokens": None, "max_completion_tokens": 40, "temperature": 1, "seed": 3}
    _, _, asked = asking(GOOD, parameters=parameters)
    sent = {name: value for name, value in asked[0].body.items() if name != "messages"}
    assert sent == {"model": "small-1", "max_completion_tokens": 40, "temperature": 1, "seed": 3}


def test_an_endpoint_without_a_key_gets_none():
    found, _, asked = asking(GOOD, key=None)
    assert found.text == "Leeds."
    assert "Authorization" not in asked[0].headers


def test_busy_and_broken_are_asked_again_after_longer_and_longer_waits():
    found, waited, asked = asking(BUSY, BROKEN, Reply(hangs_up=True), GOOD)
    assert found.text == "Leeds."
    assert waited == [1, 2, 4]
    assert len(asked) == 4
    assert all(one.body == asked[0].body for one in asked)


def test_the_server_says_how_long_to_wait():
    in_a_minute = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=60)
    date = email.utils.format_datetime(in_a_minute, usegmt=True)
    found, waited, _ = asking(
        Reply(status=429, headers={"Retry-After": "7"}),
        Reply(status=503, headers={"Retry-After": date}),
        Reply(status=503, headers={"Retry-After": "soon"}),
        GOOD,
    )
    assert found.text == "Leeds."
    assert waited[0] == 7
    assert 50 < waited[1] <= 60
    assert waited[2] == 4  # its own third


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("2.5", 2.5),
        ("-3", 0),
        ("inf", None),
        ("nan", None),
        ("", None),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0),
        ("Wed, 21 Oct 2015 07:28:00 -0000", 0),
    ],
)
def test_what_retry_after_may_be(header, seconds):
    assert seconds_to_wait(header) == seconds


def test_who_must_wait_for_an_hour_is_told():
    found, waited, asked = asking(Reply(b"", status=429, headers={"Retry-After": "3600"}), GOOD)
    assert isinstance(found, EndpointError)
    assert "wants 3,600 seconds of rest" in str(found)
    assert (waited, len(asked)) == ([], 1)


def test_broken_for_good():
    found, waited, asked = asking(BROKEN, attempts=4)
    assert isinstance(found, EndpointError)
    assert isinstance(found, OSError)
    assert "asked 4 times and answered 502: <html>Bad Gateway</html>" in str(found)
    assert waited == [1, 2, 4]
    assert len(asked) == 4


def test_waits_have_an_upper_bound():
    _, waited, _ = asking(BUSY, attempts=9)
    assert waited == [1, 2, 4, 8, 16, 32, 60, 60]


def test_down():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with made(f"http://127.0.0.1:{port}/v1", attempts=2) as (endpoint, waited):
        with pytest.raises(EndpointError, match=r"asked 2 times and could not be reached: .*refus"):
            endpoint.complete("a")
        assert waited == [1]


@pytest.mark.parametrize("slow", [{"before": 0.6}, {"pause": 0.1}])
def test_slow(slow):
    found, _, asked = asking(Reply(completion("Leeds"), **slow), timeout=0.2, attempts=2)
    assert isinstance(found, EndpointError)
    assert "asked 2 times and did not answer within 0.2 seconds" in str(found)
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "the reply is empty"),
        (b"<html>Welcome</html>", "the reply is no JSON: <html>Welcome</html>"),
        (b"\xff\xfe\x00", "the reply is no JSON"),
        (b"[" * 100_000, "the reply is no JSON"),
        ([1, 2], r"the reply has no choices: \[1, 2\]"),
        ({"choices": []}, "the reply has no choices"),
        ({"choices": {"a": 1}}, "the reply has no choices"),
        ({"choices": ["Leeds"]}, "the answer is empty"),
        ({"choices": [{"message": {"content": 3}}]}, "no message with text"),
        (completion(None), r"the answer is empty \(finish_reason 'stop'\)"),
        (completion("", reason="content_filter"), "finish_reason 'content_filter'"),
        (completion(" ", reason="length"), "thinking may have used up max_new_tokens"),
    ],
)
def test_rubbish_is_no_answer_and_is_not_asked_for_again(body, said):
    found, waited, asked = asking(Reply(body))
    assert isinstance(found, EndpointError)
    with pytest.raises(EndpointError, match=f"sent no completion: .*{said}"):
        raise found
    assert (waited, len(asked)) == ([], 1)


def test_too_much_is_not_read_to_its_end():
    found, _, _ = asking(Reply(b" " * (17 * 2**20)))
    assert "sent more than 16,777,216 bytes" in str(found)


def test_what_cannot_be_decompressed_is_rubbish():
    found, _, asked = asking(Reply(b"no gzip", headers={"Content-Encoding": "gzip"}))
    assert "sent what cannot be decoded" in str(found)
    assert len(asked) == 1


def test_a_model_may_have_nothing_to_say():
    found, _, _ = asking(Reply(completion("")))
    assert found.text == ""


def test_a_text_can_be_written_as_utf8():
    found, _, _ = asking(Reply(completion("caf\u00e9 \ud800!")))
    assert found.text == "caf\u00e9 ?!"


@pytest.mark.parametrize("used", [None, -1, True, "9", 0])
def test_a_count_that_is_none_is_left_out(used):
    found, _, _ = asking(Reply(completion("Leeds", used=used)))
    assert found.num_prompt_tokens is None


@pytest.mark.parametrize("status", [401, 403])
def test_a_wrong_key_is_not_tried_again(status):
    refusal = Reply({"error": {"message": f"Incorrect API key: {KEY}"}}, status=status)
    found, waited, asked = asking(refusal, GOOD)
    assert isinstance(found, ConfigError)
    assert f"refuses the key in {KEY_VARIABLE} ({status}: Incorrect API key: ***)" in str(found)
    assert (waited, len(asked)) == ([], 1)


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (Reply({"error": "context of 9000 tokens"}, status=400), "400: context of 9000 tokens"),
        (Reply({"detail": "no model x"}, status=404), "404: no model x. Correct the model's name"),
        (Reply(b"", status=404), "404: no reason given. Correct the model's name"),
        (Reply(b"", status=307, headers={"Location": "/there"}), "307, a redirection. Set"),
    ],
)
def test_other_refusals_say_what_the_server_says(reply, said):
    found, waited, asked = asking(reply, GOOD)
    assert isinstance(found, EndpointError)
    assert f"answered {said}" in str(found)
    assert (waited, len(asked)) == ([], 1)


def test_the_key_is_nowhere(caplog, capfd):
    caplog.set_level(logging.DEBUG)
    half = KEY[: len(KEY) // 2]
    with fake_endpoint(
        Reply(completion(f"The key is {KEY}.")),
        Reply({"error": {"message": "x " * 140 + KEY}}, status=400),  # where it would be cut
        Reply(f"{KEY} is no JSON".encode()),
        Reply(b" " * 4080 + KEY.encode()),
        Reply(b"", status=401),
    ) as (url, _):
        port = url.rpartition(":")[2].removesuffix("/v1")
        with made(url, attempts=1) as (endpoint, _):
            shown = [repr(endpoint), str(vars(endpoint)), endpoint.complete("a").text]
            for _ in range(4):
                with pytest.raises((ConfigError, EndpointError)) as caught:
                    endpoint.complete("a")
                shown += traceback.format_exception(caught.value)
    assert shown[2] == "The key is ***."
    shown += [record.getMessage() for record in caplog.records]
    shown += capfd.readouterr()
    assert half not in "".join(shown)
    assert not [record for record in caplog.records if record.name == "httpx2"]
    requests = [text for text in shown if port in text and "http://" in text]
    assert requests == []


def test_a_key_that_is_a_word_stays_in_answers():
    found, _, _ = asking(Reply(completion("The box is EMPTY.")), key="EMPTY")
    assert found.text == "The box is EMPTY."


def test_what_a_server_says_of_itself():
    refusal = Reply({"error": "127.0.0.1 at 127.0.0.1:80 but not 1127.0.0.1"}, status=400)
    found, _, _ = asking(refusal)
    assert "400: *** at ***:80 but not 1127.0.0.1." in str(found)


def test_logs_of_others_are_as_before():
    asking(GOOD)
    assert logging.getLogger("httpx2").filters == []


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("", f"{URL_VARIABLE} is not set"),
        ("localhost:8000/v1", "must begin with http"),
        ("ftp://a/v1", "must begin with http"),
        ("http:///v1", "must begin with http"),
        ("http://a:b:c/v1", "is no URL"),
        ("http://user:word@a/v1", "must have no user"),
        ("http://a/v1?key=word", "must have no user, query"),
    ],
)
def test_a_wrong_url_is_refused_and_not_shown(url, said):
    with pytest.raises(ConfigError, match=said) as caught:
        Endpoint("small-1", environment={URL_VARIABLE: url})
    text = "".join(traceback.format_exception(caught.value))
    assert "word" not in text
    assert not url or url not in text


@pytest.mark.parametrize("key", ["two\nlines", "schlüssel"])
def test_a_key_that_is_none_is_refused_and_not_shown(key):
    with pytest.raises(ConfigError, match=KEY_VARIABLE) as caught:
        Endpoint("small-1", environment={URL_VARIABLE: "http://a/v1", KEY_VARIABLE: key})
    assert key not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"timeout": 0}, "timeout"),
        ({"timeout": "2 s"}, "timeout"),
        ({"timeout": float("inf")}, "timeout"),
        ({"attempts": 0}, "attempts"),
        ({"attempts": 1.5}, "attempts"),
        ({"max_new_tokens": True}, "max_new_tokens"),
        ({"parameters": ["seed"]}, "parameters"),
        ({"parameters": {"day": datetime.date(2024, 1, 1)}}, "parameters"),
    ],
)
def test_arguments_that_cannot_be(options, said):
    with pytest.raises(ConfigError, match=f"{said} must be"):
        Endpoint("small-1", environment={URL_VARIABLE: "http://a/v1"}, **options)


@pytest.mark.parametrize("name", ["", None, 4])
def test_a_model_needs_a_name(name):
    with pytest.raises(ConfigError, match="must have a name"):
        Endpoint(name, environment={URL_VARIABLE: "http://a/v1"})


def test_the_environment_is_this_process_s(monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    with fake_endpoint(GOOD) as (url, asked):
        monkeypatch.setenv(URL_VARIABLE, f" {url}/ ")
        with contextlib.closing(Endpoint("small-1")) as endpoint:
            assert endpoint.complete("a").text == "Leeds."
    assert asked[0].path == "/v1/chat/completions"
    assert asked[0].headers["Authorization"] == f"Bearer {KEY}"


def test_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "httpx2", None)
    with pytest.raises(ConfigError, match=r"emt\[experiments\]"):
        Endpoint("small-1", environment={URL_VARIABLE: "http://a/v1"})
