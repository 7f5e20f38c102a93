"""Two keys with scopes, at every endpoint: nothing of one's documents reaches the other.

The strongest of these tests compares two servers. One has the documents of ann alone; the other has
bob's as well, written before, between and after hers, under the same and other names. Whatever ann
asks, both must answer alike.
"""

import concurrent.futures
import itertools
import json
import re

import pytest

pytest.importorskip("fastapi")

from emt.serving.limits import Limits
from tests.emt.serving.site import open_site, url

# Some words are ann's, some are bob's, some of both.
HERS = {"notes": range(5, 25), "plan w50": range(20, 40), "folder/notes": range(10, 12)}
HIS = {
    "notes": range(41, 61),
    "secret w20": range(15, 96),
    "more": [*range(20, 30), *range(70, 90)],
}
SETTINGS = {"relevance": None}  # a random model finds nothing relevant


def text_of(words):
    return " ".join(f"w{number}" for number in words)


def write(site, *, with_bob):
    hers, his = list(HERS.items()), list(HIS.items())
    for number in range(3):
        if with_bob:
            site.put("bob", his[number][0], text_of(his[number][1]), kind="his", num=number)
        site.put("ann", hers[number][0], text_of(hers[number][1]), kind="hers", num=number)
    site.put("root", "given", text_of(range(30, 36)), user="ann")
    if with_bob:
        site.put("root", "kept", text_of(range(60, 70)), user="bob")
        site.put("root", "everybody's", text_of(range(6, 10)))


@pytest.fixture(scope="module")
def sites(tmp_path_factory):
    """Servers of ann's documents, and of hers and others'."""
    limits = Limits(max_new_tokens=8)
    with (
        open_site(tmp_path_factory.mktemp("hers"), limits, **SETTINGS) as alone,
        open_site(tmp_path_factory.mktemp("all"), limits, **SETTINGS) as shared,
    ):
        write(alone, with_bob=False)
        write(shared, with_bob=True)
        yield alone, shared


def chat(memory, **fields):
    messages = [{"role": "user", "content": "w20 w21 w45"}]
    body = {"model": "emt", "messages": messages, "max_tokens": 4, "memory": memory, **fields}
    return "POST", "/v1/chat/completions", {"json": body}


def completion(memory, **fields):
    body = {"model": "emt", "prompt": "w20 w21 w22", "max_tokens": 4, "memory": memory, **fields}
    return "POST", "/v1/completions", {"json": body}


def search(query="w20 w21 w45 w50", **fields):
    return "POST", "/v1/search", {"json": {"query": query, **fields}}


SCOPES = [
    {},
    {"documents": ["notes"]},
    {"documents": ["given", "folder/notes"]},
    {"documents": []},
    {"documents": ["more"]},
    {"documents": ["notes", "secret w20"]},
    {"documents": ["kept"]},
    {"documents": ["everybody's"]},
    {"documents": ["user=bob/notes"]},
    {"documents": ["user=ann/notes"]},
    {"documents": ["nobody's"]},
    {"where": {"user": "bob"}},
    {"where": {"user": ["bob", "ann"]}},
    {"where": {"kind": "his"}},
    {"where": {"num": [0, 1]}},
    {"where": {"num": True}},
    {"where": {}},
    {"where": {"user": {"not": "ann"}}},
    {"documents": ["notes"], "where": {"kind": "his"}},
]
NAMES = [
    "notes",
    "given",
    "more",
    "secret w20",
    "kept",
    "everybody's",
    "nobody's",
    "user=bob/notes",
]
NAMES += ["user=ann/notes", "folder/notes", "folder", "notes/", "user=bob/", "%75ser=bob/notes"]
READS = [
    *(search(**scope) for scope in SCOPES),
    *(search(query, max_passages=3) for query in ("w60", "w41 w42", "w50", "w20", "w11 w75 w76")),
    *(chat({"tokens": True, **scope}) for scope in SCOPES),
    *(chat({"tokens": True, "mode": "token", **scope}) for scope in SCOPES),
    *(completion({"tokens": True, **scope}) for scope in SCOPES[:4]),
    chat({"tokens": True}, n=2, temperature=1, seed=1),
    ("GET", "/v1/documents", {}),
    *(("GET", "/v1/documents", {"params": {"query": text}}) for text in ("o", "secret", "user=")),
    *(("GET", "/v1/documents", {"params": {"where": json.dumps(s.get("where"))}}) for s in SCOPES),
    *(("GET", "/v1/documents", {"params": {"limit": 1, "after": name}}) for name in ["", *NAMES]),
    *(("GET", url(name), {}) for name in NAMES),
    *(("GET", url(name), {"params": {"start": 3, "end": 9}}) for name in NAMES),
    ("GET", "/v1/store", {}),
    ("GET", "/v1/models", {}),
    ("GET", "/metrics", {}),
    ("GET", "/v1/documents/", {}),
]  # fmt: skip


def told(response):
    """Return what a response says, without what is new in each."""
    text = re.sub(r'"id": ?"[^"]*"|"created": ?\d+', "", response.text)
    headers = {
        name: value
        for name, value in response.headers.items()
        if name not in ("date", "content-length")
    }
    return response.status_code, text, headers


@pytest.mark.parametrize(
    "request_of", READS, ids=[f"{method} {path} {more}" for method, path, more in READS]
)
def test_who_asks_cannot_tell_whether_others_have_documents(sites, request_of):
    method, path, options = request_of
    alone, shared = (told(site("ann", method, path, **options)) for site in sites)
    assert shared == alone


def test_streams_are_alike(sites):
    for scope in SCOPES:
        method, path, options = chat({"tokens": True, **scope}, stream=True)
        alone, shared = (told(site("ann", method, path, **options)) for site in sites)
        assert shared == alone


def test_these_requests_would_tell(sites):
    """With a key that sees everything, most of them are answered differently."""
    differs = 0
    for method, path, options in READS:
        alone, shared = (told(site("root", method, path, **options)) for site in sites)
        differs += alone != shared
    assert differs > len(READS) // 3


def test_batches_of_several_keys_keep_apart(sites):
    """Prompts of different keys are generated together."""
    _, shared = sites
    requests = [
        (who, *chat({"tokens": True, "mode": mode, **scope}))
        for who, mode, scope in itertools.product(
            ("ann", "bob", "root"), ("passage", "token"), (SCOPES[0], SCOPES[1], SCOPES[14])
        )
    ]  # fmt: skip
    alone = [told(shared(who, method, path, **more)) for who, method, path, more in requests]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        together = pool.map(lambda each: told(shared(*each[:3], **each[3])), requests * 3)
        for expected, got, (who, *_) in zip(alone * 3, together, requests * 3, strict=True):
            assert (got[0], documents_in(got)) == (expected[0], documents_in(expected))
            if who == "bob":
                assert documents_in(got) <= {*HIS, "kept"}
            if who == "ann":
                assert documents_in(got) <= {*HERS, "given"}


def test_what_one_writes_changes_nothing_of_the_other(tmp_path):
    """The same names, names in the other's name space, metadata of the other."""
    writes = [
        *(("DELETE", name, None) for name in NAMES if name not in (*HERS, "given", "notes/")),
        *(("PUT", name, {"text": "w8 w9"}) for name in NAMES),
        ("PUT", "moved", {"text": "w8", "metadata": {"user": "bob"}}),
        ("PUT", "moved", {"text": "w8", "metadata": {"user": ["ann", "bob"]}}),
        ("PUT", "notes", {"text": "w9", "metadata": {"user": "bob"}}),
        ("PUT", "more", {"text": "w9", "metadata": {"user": "ann", "kind": "his"}}),
        *(("DELETE", name, None) for name in NAMES),
    ]
    answers = []
    for with_bob in (False, True):
        folder = tmp_path / str(with_bob)
        folder.mkdir()
        with open_site(folder, **SETTINGS) as site:
            write(site, with_bob=with_bob)
            before = everything(site)
            answers.append([
                told(site("ann", method, url(name), json=body)) for method, name, body in writes
            ])  # fmt: skip
            his = {name for name, text in before.items() if text["metadata"].get("user") != "ann"}
            after = everything(site)
            assert {name: after.get(name) for name in his} == {name: before[name] for name in his}
            assert len(his) == 5 * with_bob
            assert all(after[name]["metadata"]["user"] == "ann" for name in set(after) - his)
    alone, shared = answers
    assert shared == alone
    assert {status for status, *_ in alone} == {200, 201, 400, 403, 404}


def everything(site):
    """Return all documents, by their names in the store."""
    return {name: site("root", "GET", url(name)).json() for name in site.names("root")}


def documents_in(response):
    return set(re.findall(r'"document":"([^"]*)"', response[1]))
