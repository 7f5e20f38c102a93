"""OpenAI's own client against a server on a port: answers, streams, errors."""

import asyncio
import contextlib
import functools
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from emt.answer import answer
from emt.serving.app import create_app
from emt.serving.limits import Limits
from tests.emt.serving.tiny_server import make_memory, official_client, serving, user


@pytest.fixture(scope="module")
def remembering():
    return make_memory()


@pytest.fixture(scope="module")
def client(remembering):
    with official_client(*remembering, limits=Limits(max_new_tokens=2000)) as client:
        yield client


def by_library(client, text, **options):
    """Return what `emt.answer` says, in the thread that may use the model."""
    served = client.app.state.served
    options = {"max_new_tokens": 8, **options}
    return asyncio.run(
        served.engine.run(functools.partial(answer, served.model, served.memory, text, **options))
    )


def ask(client, text="w10 w11", **options):
    options = {"model": "tiny", "max_tokens": 8, **options}
    return client.chat.completions.create(messages=user(text), **options)


def complete(client, prompt="w10 w11", **options):
    options = {"model": "tiny", "max_tokens": 8, **options}
    return client.completions.create(prompt=prompt, **options)


def streamed(chunks, is_chat=True):
    """Return the text and the reason of each choice, and the chunks."""
    chunks = list(chunks)
    texts, reasons = {}, {}
    for chunk in chunks:
        for choice in chunk.choices:
            piece = choice.delta.content if is_chat else choice.text
            assert choice.index not in reasons  # nothing comes after the end
            texts[choice.index] = texts.get(choice.index, "") + (piece or "")
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    return texts, reasons, chunks


# -- answers ------------------------------------------------------------------------------------


def test_a_chat_is_answered_as_by_the_command_line(client):
    got = ask(client, extra_body={"memory": {"tokens": True}})
    expected = by_library(client, "w10 w11", chat=True)
    (choice,) = got.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == expected.text
    assert choice.finish_reason == "length"
    assert [each["quote"] for each in choice.citations] == [
        each.text for each in expected.citations
    ]
    assert [each["text"] for each in choice.passages] == [each.text for each in expected.passages]
    assert "".join(each["text"] for each in choice.tokens) == expected.text
    assert got.usage.prompt_tokens == 6
    assert got.usage.completion_tokens == 8
    assert got.usage.total_tokens == 14
    assert (got.object, got.model) == ("chat.completion", "tiny")
    assert got.id.startswith("chatcmpl-")


def test_the_whole_chat_is_asked(client):
    messages = [
        {"role": "developer", "content": "w3"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "w4 "}, {"type": "text", "text": "w5"}],
        },
        {"role": "assistant", "content": "w6"},
        {"role": "user", "content": "w7", "name": "ann"},
    ]
    got = client.chat.completions.create(model="tiny", messages=messages, max_completion_tokens=3)
    assert got.usage.prompt_tokens == 4 * 3 + 5 + 1
    assert got.usage.completion_tokens == 3


def test_completions_go_on_from_texts_and_ids(client, remembering):
    prompts = ["w10 w11", "w33"]
    got = complete(client, prompts, n=2, temperature=0)
    assert [choice.index for choice in got.choices] == [0, 1, 2, 3]
    for number, choice in enumerate(got.choices):
        expected = by_library(client, prompts[number // 2], chat=False)
        assert choice.text == " " + expected.text  # as it goes on
    assert got.usage.prompt_tokens == 3 + 2
    assert got.usage.completion_tokens == 32
    ids = remembering[1].tokenizer(prompts)["input_ids"]
    assert [choice.text for choice in complete(client, ids, n=2, temperature=0).choices] == [
        choice.text for choice in got.choices
    ]
    (one,) = complete(client, ids[1]).choices
    assert one.text == got.choices[2].text
    assert complete(client, "w10", max_tokens=openai.omit).usage.completion_tokens == 16


def test_memory_options(client):
    def content(**memory):
        return ask(client, extra_body={"memory": memory}).choices[0]

    for settings in (
        {"enabled": False},
        {"mode": "token"},
        {"documents": ["b"]},
        {"documents": []},
        {"where": {"user": "c"}},
        {"where": {"user": ["a", "c"]}},
    ):
        expected = by_library(client, "w10 w11", chat=True, **settings)
        got = content(**settings)
        assert got.message.content == expected.text
        assert [each["document"] for each in got.citations] == [
            each.document for each in expected.citations
        ]
    assert content(documents=[]).passages == content(documents=[]).citations == []


def test_sampling(client):
    greedy = ask(client).choices[0].message.content
    assert ask(client, temperature=0, seed=4).choices[0].message.content == greedy
    one = [choice.message.content for choice in ask(client, n=3, seed=5, temperature=1.5).choices]
    assert one == [
        choice.message.content for choice in ask(client, n=3, seed=5, temperature=1.5).choices
    ]
    assert len(set(one)) == 3
    assert ask(client, seed=6, temperature=1.5).choices[0].message.content not in one
    assert ask(client, seed=5, temperature=1.5).choices[0].message.content == one[0]
    assert ask(client, temperature=1.5, top_p=1e-6).choices[0].message.content == greedy
    assert ask(client, seed=-3, top_p=0.9).choices[0].message.content


@pytest.mark.parametrize("is_list", [False, True])
def test_stop(client, is_list):
    words = ask(client).choices[0].message.content.split()
    stop = ["w9999", words[3], "w8888"] if is_list else words[3]
    got = ask(client, stop=stop).choices[0]
    assert got.message.content == " ".join(words[: words.index(words[3])])
    assert got.finish_reason == "stop"
    texts, reasons, _ = streamed(ask(client, stop=stop, stream=True))
    assert texts == {0: got.message.content}
    assert reasons == {0: "stop"}


# -- streams ------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_usage", [False, True])
@pytest.mark.parametrize("is_chat", [False, True])
def test_a_stream_is_the_answer(client, is_chat, with_usage):
    create = ask if is_chat else complete
    options = {"n": 2, "temperature": 1.5, "seed": 3, "extra_body": {"memory": {"tokens": True}}}
    whole = create(client, **options)
    if with_usage:
        options["stream_options"] = {"include_usage": True}
    texts, reasons, chunks = streamed(create(client, stream=True, **options), is_chat)
    for choice in whole.choices:
        assert texts[choice.index] == (choice.message.content if is_chat else choice.text)
        assert reasons[choice.index] == choice.finish_reason
    assert len({chunk.id for chunk in chunks}) == 1
    (told,) = [chunk for chunk in chunks if getattr(chunk, "memory", None)]
    for choice, sources in zip(whole.choices, told.memory, strict=True):
        assert sources["index"] == choice.index
        assert sources["passages"] == choice.passages
        assert sources["citations"] == choice.citations
        assert sources["tokens"] == choice.tokens
    assert told.choices  # many programs read the first of every chunk
    if with_usage:
        assert chunks[-1].choices == []
        assert chunks[-1].usage == whole.usage
        assert all(chunk.usage is None for chunk in chunks[:-1])
    else:
        assert chunks[-1] is told
    if is_chat:
        firsts = {}
        for chunk in chunks:
            for choice in chunk.choices:
                firsts.setdefault(choice.index, choice.delta.role)
        assert firsts == {0: "assistant", 1: "assistant"}


def test_text_comes_while_it_is_generated(client):
    sizes = []
    with client.chat.completions.with_streaming_response.create(
        model="tiny", messages=user("w10"), max_tokens=30, stream=True
    ) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        for line in response.iter_lines():
            sizes.append(line)
    events = [line for line in sizes if line]
    assert events[-1] == "data: [DONE]"
    assert len(events) > 30
    assert all(line.startswith("data: ") for line in events)


# -- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "param", "message"),
    [
        ({"temperature": 2.5}, "temperature", "less than or equal to 2"),
        ({"temperature": "hot"}, "temperature", "valid number"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 9}, "n", "at most 8; got 9"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 2001}, "max_tokens", "at most 2000"),
        ({"stop": ["a"] * 5}, "stop", "at most 4"),
        ({"stop": ""}, "stop", "at least 1"),
        ({"seed": 2**64}, "seed", ""),
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"logprobs": True}, "logprobs", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "not supported"),
        ({"extra_body": {"memory": {"document": ["a"]}}}, "memory.document", "Extra inputs"),
        ({"extra_body": {"memory": {"documents": ["z"]}}}, "memory", "no document 'z'"),
        ({"extra_body": {"memory": {"where": {"user": None}}}}, "memory", ""),
        ({"extra_body": {"memory": {"mode": "both"}}}, "memory.mode", ""),
        ({"extra_body": {"memory": 3}}, "memory", ""),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "tool", "content": "w3"}]}, "messages.0.role", ""),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", ""),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_wrong_fields_are_bad_requests(client, options, param, message, stream):
    options = {"model": "tiny", "messages": user("w10"), "max_tokens": 4, **options}
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(stream=stream, **options)
    error = refused.value
    assert error.type == "invalid_request_error"
    assert message in error.body["message"]
    if param is not None:
        assert error.param.startswith(param)


def test_an_empty_message_is_a_message(client):
    assert client.chat.completions.create(model="tiny", messages=user(""), max_tokens=2).choices


def test_neutral_values_of_unsupported_fields_are_accepted(client):
    ask(
        client,
        tools=[],
        tool_choice="none",
        response_format={"type": "text"},
        logprobs=False,
        frequency_penalty=0,
        presence_penalty=0.0,
        user="ann",
        metadata={"a": "b"},
        store=False,
        reasoning_effort="low",
        service_tier="auto",
        parallel_tool_calls=False,
    )
    complete(client, best_of=1, echo=False)
    with pytest.raises(openai.BadRequestError, match="logprobs is not supported"):
        complete(client, logprobs=0)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "prompt: String should have at least 1 character"),
        ([], ""),
        ([[]], ""),
        ([5, 97], "0 to 96; got 97"),
        ([[5], [-1]], ""),
        ([[True]], ""),
        (["w3"] * 9, "may ask for 8 answers"),
        ("w3 " * 4100, "must fit 4096 tokens"),
    ],
)
def test_wrong_prompts_are_bad_requests(client, prompt, message):
    with pytest.raises(openai.BadRequestError) as refused:
        complete(client, prompt)
    assert message in refused.value.body["message"]


def test_a_prompt_that_leaves_no_room_says_so_in_openais_code(client):
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, "w3 " * 4090, max_tokens=100)
    assert refused.value.code == "context_length_exceeded"
    assert refused.value.param == "messages"


def test_all_answers_of_a_request_fit_a_batch():
    limits = Limits(max_batch_tokens=100)
    with official_client(*make_memory(), limits=limits) as client:
        assert len(ask(client, n=4, max_tokens=19).choices) == 4
        with pytest.raises(openai.BadRequestError, match="must fit 25 tokens"):
            ask(client, n=4, max_tokens=20)
        assert ask(client, max_tokens=openai.omit).usage.completion_tokens <= 94


def test_models(client):
    (model,) = client.models.list().data
    assert model.id == "tiny"
    assert client.models.retrieve("tiny") == model
    for call in (lambda: client.models.retrieve("gpt/4"), lambda: ask(client, model="gpt-4")):
        with pytest.raises(openai.NotFoundError) as refused:
            call()
        assert refused.value.code == "model_not_found"


def test_half_a_surrogate_pair_is_refused(client):
    body = b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}'
    response = httpx.post(
        f"{client.base_url}chat/completions",
        content=body,
        headers={"content-type": "application/json"},
    )
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b'{"model": 3}', b'{"model": "tiny"}', b"\xff"]
)
@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_bodies_that_are_none(client, body, path):
    response = httpx.post(
        f"{client.base_url}{path}", content=body, headers={"content-type": "application/json"}
    )
    assert response.status_code == 400
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


# -- time, crowds and clients that go away --------------------------------------------------------


@contextlib.contextmanager
def held(engine):
    """Keep the engine from answering in a `with` block."""
    go, begun = threading.Event(), threading.Event()

    def hold():
        begun.set()
        assert go.wait(30)

    thread = threading.Thread(target=lambda: asyncio.run(engine.run(hold)))
    thread.start()
    assert begun.wait(30)
    try:
        yield
    finally:
        go.set()
        thread.join()


def wait_until(condition):
    stop = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < stop
        time.sleep(0.01)


def test_too_many_requests_are_told_to_come_back():
    with (
        official_client(*make_memory(), limits=Limits(max_waiting=2)) as client,
        ThreadPoolExecutor() as pool,
    ):
        engine = client.app.state.served.engine
        ready = f"{client.base_url}../ready"
        assert httpx.get(ready).status_code == 200
        with held(engine):
            waiting = [pool.submit(ask, client, f"w{number}") for number in (10, 33)]
            wait_until(lambda: engine.num_waiting == 2)
            for stream in (False, True):
                with pytest.raises(openai.InternalServerError, match="is busy") as refused:
                    ask(client, stream=stream)
                assert refused.value.status_code == 503
                assert int(refused.value.response.headers["Retry-After"]) >= 1
            assert httpx.get(ready).status_code == 503
            assert httpx.get(f"{client.base_url}../health").status_code == 200
        assert all(future.result().usage.completion_tokens == 8 for future in waiting)
        assert httpx.get(ready).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_what_nobody_waits_for_is_not_generated(stream):
    with official_client(*make_memory(), limits=Limits(max_new_tokens=4000)) as client:
        engine, memory = client.app.state.served.engine, client.app.state.served.memory
        ask(client)
        body = {"model": "tiny", "messages": user("w10"), "max_tokens": 4000, "stream": stream}
        url = f"{client.base_url}chat/completions"
        with held(engine):  # gone while it waits
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(url, json=body, timeout=0.3)
            wait_until(lambda: [pending.is_cancelled for _, pending in engine._prompts] == [True])
        if stream:
            with httpx.stream("POST", url, json=body, timeout=20) as response:
                next(response.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(url, json=body, timeout=0.3)
        wait_until(lambda: not memory.activity._generating)  # 4,000 tokens take longer
        assert ask(client).usage.completion_tokens == 8


def test_the_end_waits_for_answers():
    model, memory = make_memory()
    app = create_app(model, memory, model_name="tiny")
    body = {"model": "tiny", "messages": user("w10"), "max_tokens": 150, "stream": True}
    with contextlib.ExitStack() as server, httpx.Client(timeout=30) as client:
        url = server.enter_context(serving(app))
        with client.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            ending = threading.Thread(target=server.close)
            ending.start()
            *_, last = filter(None, lines)
        ending.join()
        assert last == "data: [DONE]"
        with pytest.raises(httpx.ConnectError):
            client.get(f"{url}/health")
    assert not app.state.served.engine.is_ready


def test_the_event_loop_is_free_while_the_model_works():
    with official_client(*make_memory()) as client, held(client.app.state.served.engine):
        started = time.monotonic()
        assert httpx.get(f"{client.base_url}../health").json() == {"status": "ok"}
        assert client.models.list().data
        assert time.monotonic() - started < 10  # it is held until the block ends


def test_an_answer_that_takes_too_long_is_an_error():
    limits = Limits(max_seconds=0.3, max_new_tokens=3000)
    with official_client(*make_memory(), limits=limits) as client:
        ask(client)  # what is loaded late is loaded
        started = time.monotonic()
        with pytest.raises(openai.InternalServerError, match="longer than") as late:
            ask(client, max_tokens=3000)
        assert time.monotonic() - started < 5
        assert late.value.status_code == 504
        assert late.value.response.headers["x-should-retry"] == "false"
        with pytest.raises(openai.APIError, match="longer than"):
            list(ask(client, max_tokens=3000, stream=True))
        ask(client, max_tokens=2)  # the rows have stopped: nobody waits for them
