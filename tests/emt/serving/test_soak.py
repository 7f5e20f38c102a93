"""Requests while documents are written and removed: none fails, and each sees what it may."""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.emt.serving.tiny_server import TEXTS, make_memory, official_client, user

USERS = ("ann", "bob")
NUM_CLIENTS = 4


def texts_of(name, version):
    """Return the words of a document in one of its versions."""
    first = 3 + (sum(map(ord, name)) + 7 * version) % 60
    return " ".join(f"w{number}" for number in range(first, first + 30))


def keep_writing(url, stop, failures, seen):
    """Write, replace and remove documents of two users until it is told to stop."""
    names = itertools.cycle([(user_, f"{user_}-{i}") for i in range(3) for user_ in USERS])
    with httpx.Client(base_url=url, timeout=60) as client:
        for step, (owner, name) in enumerate(names):
            if stop.is_set():
                return
            if step % 5 == 4:
                response = client.delete(f"/v1/documents/{name}")
                right = response.status_code in (200, 404)
            else:
                text = texts_of(name, step % 4)
                seen.add(text)  # before anybody can see it
                body = {"text": text, "metadata": {"user": owner}}
                response = client.put(f"/v1/documents/{name}", json=body)
                right = response.status_code in (200, 201)
            if not right:
                failures.append(response.text)


def ask_many(client, numbers, failures, seen):
    """Ask as two users, in streams and without; check what each answer is from."""
    for number in numbers:
        owner = USERS[number % 2]
        options = {
            "max_tokens": 1 + number % 7,
            "extra_body": {"memory": {"where": {"user": owner}}},
        }
        messages = user(f"w{3 + number % 90} w{3 + 7 * number % 90}")
        try:
            if number % 3:
                answer = client.chat.completions.create(
                    model="tiny", messages=messages, n=1 + number % 2, **options
                )
                sources = [(each.citations, each.passages) for each in answer.choices]
            else:
                *_, last = client.chat.completions.create(
                    model="tiny", messages=messages, stream=True, **options
                )
                sources = [(each["citations"], each["passages"]) for each in last.memory]
            for citations, passages in sources:
                for each in (*citations, *passages):
                    assert each["document"].startswith(owner)
                    quote = each["quote"] if "quote" in each else each["text"]
                    assert any(text[each["start"] : each["end"]] == quote for text in seen)
        except Exception as error:
            failures.append(repr(error))


@pytest.mark.parametrize(
    "num_requests", [60, pytest.param(1000, marks=pytest.mark.slow)], ids=["60", "1000"]
)
@pytest.mark.parametrize("mode", ["passage", "token"])
def test_requests_while_documents_change(tmp_path, num_requests, mode):
    model, memory = make_memory(
        texts=TEXTS, path=str(tmp_path / "store"), memory_type="vector_db", mode=mode
    )
    failures, seen, stop = [], {TEXTS["a"]}, threading.Event()
    with official_client(model, memory) as client, ThreadPoolExecutor() as pool:
        url = str(client.base_url).removesuffix("/v1/")
        writer = pool.submit(keep_writing, url, stop, failures, seen)
        askers = [
            pool.submit(ask_many, client, range(i, num_requests, NUM_CLIENTS), failures, seen)
            for i in range(NUM_CLIENTS)
        ]
        for future in askers:
            future.result()
        stop.set()
        writer.result()
        figures = httpx.get(f"{url}/metrics").text
    assert failures == []
    assert len(seen) > 2  # documents did change meanwhile
    assert 'route="/v1/chat/completions",status="200"} ' + f"{float(num_requests)}" in figures
