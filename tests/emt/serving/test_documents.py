"""Documents over HTTP: written, listed, read in parts, removed; and what is refused."""

import json

import torch
import pytest

from emt.serving.limits import Limits
from memory_backends.store.verify import verify
from tests.emt.serving.site import LIMITS, open_site, url

TEXT = "w3 w4 w5 w6 w7 w8 w9"
PLAIN = {"content-type": "text/plain"}


def test_a_document_is_added_replaced_and_left_alone(site):
    expected = {
        "object": "document",
        "name": "a/b c.txt",
        "num_tokens": 8,  # with the <bos> that the tokenizer adds
        "num_characters": len(TEXT),
        "metadata": {"year": 1999, "draft": True},
    }

    def put(text, metadata):
        response = site("root", "PUT", url("a/b c.txt"), json={"text": text, "metadata": metadata})
        return response.status_code, response.json()

    metadata = expected["metadata"]
    assert put(TEXT, metadata) == (201, {**expected, "status": "added"})
    first_row = site.memory.backend.catalog.document("a/b c.txt").first_row
    assert put(TEXT, metadata) == (200, {**expected, "status": "skipped"})
    changed = {**expected, "metadata": {"year": 2000}}
    assert put(TEXT, {"year": 2000}) == (200, {**changed, "status": "replaced"})
    assert site.memory.backend.catalog.document("a/b c.txt").first_row == first_row
    assert put(TEXT, {"year": 1}) == (
        200,
        {**changed, "metadata": {"year": 1}, "status": "replaced"},
    )
    assert put(TEXT + " w9", {})[1]["status"] == "replaced"
    assert site("root", "GET", url("a/b c.txt")).json() == {
        **expected,
        "num_tokens": 9,
        "num_characters": len(TEXT) + 3,
        "metadata": {},
        "start": 0,
        "end": len(TEXT) + 3,
        "text": TEXT + " w9",
    }
    assert len(site.memory) == 8  # rows: none for <bos>


def test_what_is_written_is_what_a_memory_writes(site):
    """Rows, text and offsets are those of `Memory.write`."""
    text = " ".join(f"w{3 + 7 * number % 90}" for number in range(900))
    site.put("root", "long", text)
    site.memory.write(text, document="as one")
    catalog = site.memory.backend.catalog
    one, other = catalog.document("long"), catalog.document("as one")
    assert one.text == other.text
    for field in ("token_ids", "offsets", "row_tokens", "sink_rows"):
        assert getattr(one, field).tolist() == getattr(other, field).tolist()
    for layer in site.memory.backend.layout.layers:
        parts = []
        for document in (one, other):
            rows = range(document.first_row, document.first_row + len(document.row_tokens))
            heads = site.memory.backend.layout.layers[layer].num_key_value_heads
            ids = torch.tensor(list(rows)).expand(heads, -1)
            parts.append(site.memory.backend.fetch(layer, ids))
        assert torch.equal(parts[0][0], parts[1][0])
        assert torch.equal(parts[0][1], parts[1][1])


def test_plain_text_has_its_metadata_in_the_address(site):
    options = {"headers": PLAIN, "content": b"\xef\xbb\xbf" + TEXT.encode()}
    response = site("root", "PUT", url("plain"), params={"metadata": '{"a": "b"}'}, **options)
    assert (response.status_code, response.json()["metadata"]) == (201, {"a": "b"})
    assert site("root", "GET", url("plain")).json()["text"] == TEXT
    both = {"params": {"metadata": '{"a": "b", "c": 1}'}}
    body = {"text": TEXT, "metadata": {"a": "d"}}
    response = site("root", "PUT", url("plain"), json=body, **both)
    assert response.json()["metadata"] == {"a": "d", "c": 1}


@pytest.mark.parametrize(
    "name",
    [" a ", ".a", "..a", "...", "a/.b/..c", "a.", "a?b#c", "<script>", "x" * 512],
)
def test_names_with_odd_characters(kept, name):
    assert kept.put("root", name, TEXT)["name"] == name
    assert kept("root", "GET", url(name)).json()["name"] == name
    assert kept("root", "DELETE", url(name)).json()["name"] == name


def test_a_list_has_pages_by_name_and_filters(site):
    for number, name in enumerate(["b", "a", "Z", "c/2", "c/1", "ä"]):
        site.put("root", name, f"w{3 + number}", even=number % 2 == 0, number=number)
    names = sorted(["b", "a", "Z", "c/2", "c/1", "ä"])
    assert site.names("root") == names
    pages, after, has_more = [], "", True
    while has_more:
        page = site("root", "GET", "/v1/documents", params={"limit": 2, "after": after}).json()
        assert len(page["data"]) == 2
        pages += [document["name"] for document in page["data"]]
        after, has_more = pages[-1], page["has_more"]
    assert pages == names
    assert site.names("root", query="C/") == ["c/1", "c/2"]
    assert site.names("root", where='{"even": true}') == ["Z", "b", "c/1"]
    assert site.names("root", where='{"number": [1, 4], "even": [true]}') == ["c/1"]
    assert site.names("root", where='{"number": true}') == []
    (document,) = site("root", "GET", "/v1/documents", params={"query": "ä"}).json()["data"]
    assert document == {
        "object": "document",
        "name": "ä",
        "num_tokens": 2,
        "num_characters": 2,
        "metadata": {"even": False, "number": 5},
    }


def test_parts_of_a_text(site):
    text = "ä𝄞 w3 w4 \x00 w5"
    site.put("root", "x", text)
    for start, end in ((0, 2), (1, 5), (3, 3), (5, None), (4, 2), (len(text), None), (2, 2**53)):
        params = {"start": start} if end is None else {"start": start, "end": end}
        got = site("root", "GET", url("x"), params=params).json()
        assert (got["text"], got["start"]) == (text[start:end], start)
        assert (got["end"], got["num_characters"]) == (start + len(text[start:end]), len(text))
    site.put("root", "long", "w3 " * 1000)
    got = site("root", "GET", url("long"), params={"end": 1001}).json()
    assert (len(got["text"]), got["end"], got["num_characters"]) == (1000, 1000, 3000)


def test_a_document_of_token_ids_has_no_text(site):
    site.memory.write([3, 4, 5], document="ids")
    got = site("root", "GET", url("ids")).json()
    assert (got["text"], got["num_characters"], got["end"]) == (None, None, 0)
    assert site("root", "GET", "/v1/documents").json()["data"][0]["num_characters"] is None


def test_what_is_removed_is_gone(site):
    site.put("root", "x", TEXT)
    response = site("root", "DELETE", url("x"))
    assert (response.status_code, response.json()) == (
        200,
        {"object": "document", "name": "x", "deleted": True},
    )
    for method in ("GET", "DELETE"):
        response = site("root", method, url("x"))
        assert response.status_code == 404
        assert response.json()["error"]["message"] == "There is no document 'x'."
    assert site.names("root") == []


def put(name, text="w3", metadata=None, **more):
    return "PUT", url(name), {"json": {"text": text, "metadata": metadata or {}}, **more}


def raw(content, kind="application/json", **params):
    options = {"content": content, "params": params}
    return "PUT", url("x"), {**options, "headers": {"content-type": kind}}


REFUSED = [
    (put("x" * 513), 400, "name", "1 to 512 characters"),
    (put("a\tb"), 400, "name", "control"),
    (put("a\x00"), 400, "name", "control"),
    (put("a\u2028b"), 400, "name", "control"),
    (put("../store"), 400, "name", "'..'"),
    (put("a/./b"), 400, "name", "'.'"),
    (put("/a"), 400, "name", "empty"),
    (put("a//b"), 400, "name", "empty"),
    (put("a/"), 400, "name", "empty"),
    (("PUT", "/v1/documents/%E9", {"json": {"text": "w3"}}), 400, "name", "UTF-8"),
    (("PUT", "/v1/documents/", {"json": {"text": "w3"}}), 400, "name", "got ''"),
    (put("x", ""), 400, "text", "empty"),
    (put("x", " \n"), 400, "text", "empty"),
    (put("x", metadata={"a": [1]}), 400, "metadata", "metadata.a"),
    (put("x", metadata={"a": None}), 400, "metadata", "metadata.a"),
    (put("x", metadata={"": 1}), 400, "metadata", "at least 1"),
    (put("x", metadata={"a": "b" * 16_400}), 400, "metadata", "at most 16384 bytes"),
    (raw("{"), 400, None, "Invalid JSON"),
    (raw("[]"), 400, None, "object"),
    (raw("{}"), 400, "text", "required"),
    (raw('{"text": 3}'), 400, "text", "string"),
    (raw('{"text": "w3", "name": "y"}'), 400, "name", "not permitted"),
    (raw('{"text": "\\ud800"}'), 400, None, "Invalid JSON"),
    (raw('{"text": "w3", "metadata": {"a": NaN}}'), 400, "metadata", ""),
    (raw("[" * 5000), 400, None, ""),
    (raw(b"\xff"), 400, None, ""),
    (raw(b"w3 \xff", "text/plain"), 400, None, "UTF-8 at byte 3"),
    (raw(b"w3", "text/plain", metadata="[]"), 400, "metadata", "JSON object"),
    (raw(b"w3", "text/plain", metadata="{" * 5000), 400, "metadata", "JSON object"),
    (raw(b"w3", "text/plain; charset=latin-1"), 415, None, "UTF-8"),
    (raw(b"w3", "application/pdf"), 415, None, "text/plain or application/json"),
    (raw(b"w3", ""), 415, None, "text/plain or application/json"),
    (("GET", "/v1/documents", {"params": {"limit": 0}}), 400, "limit", "greater"),
    (("GET", "/v1/documents", {"params": {"limit": 1001}}), 400, "limit", "less"),
    (("GET", "/v1/documents", {"params": {"limit": 10**30}}), 400, "limit", "less"),
    (("GET", "/v1/documents", {"params": {"where": "x"}}), 400, "where", "JSON object"),
    (("GET", "/v1/documents", {"params": {"where": '{"a": {}}'}}), 400, "where", "must compare"),
    (("GET", url("there"), {"params": {"start": -1}}), 400, "start", "greater"),
    (("POST", url("there"), {}), 405, None, ""),
]


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    with open_site(tmp_path_factory.mktemp("kept")) as site:
        site.put("root", "there", TEXT)
        yield site


@pytest.mark.parametrize(
    ("request_of", "status", "param", "message"),
    REFUSED,
    ids=[f"{method} {path[:40]} {str(more)[:60]}" for (method, path, more), *_ in REFUSED],
)
def test_what_is_wrong_is_refused_and_leaves_nothing(kept, request_of, status, param, message):
    method, path, options = request_of
    response = kept("root", method, path, **options)
    error = response.json()["error"]
    assert (response.status_code, error["type"]) == (status, "invalid_request_error")
    assert message in error["message"]
    assert error["param"] == param
    assert set(error) == {"message", "type", "param", "code"}
    assert kept.names("root") == ["there"]


def test_a_body_that_is_too_large_is_not_read(site):
    sent = []

    def endless(size=1000):
        for _ in range(100):
            sent.append(size)
            yield b"w3 " * (size // 3)

    limit = LIMITS.max_document_bytes
    for options in ({"content": b"w" * (limit + 1)}, {"content": endless()}):
        response = site("root", "PUT", url("x"), headers=PLAIN, **options)
        assert response.status_code == 413
        assert f"at most {limit} bytes" in response.json()["error"]["message"]
    response = site("root", "POST", "/v1/search", json={"query": "w" * LIMITS.max_body_bytes})
    assert response.status_code == 413
    response = site("root", "POST", "/v1/search", content=endless())
    assert response.status_code == 413
    assert site.names("root") == []
    text = "w3 " * ((limit - 100) // 3)
    assert site("root", "PUT", url("x"), headers=PLAIN, content=text).status_code == 201


def test_a_memory_in_ram_has_documents_too(tmp_path):
    with open_site(tmp_path, path=None, memory_type="manual") as site:
        assert site.put("ann", "x", TEXT)["status"] == "added"
        assert site.put("ann", "x", TEXT)["status"] == "skipped"
        assert site.put("ann", "x", TEXT, a=1)["status"] == "replaced"
        assert site.put("ann", "x", "w3")["status"] == "replaced"
        assert site("ann", "GET", url("x")).json()["metadata"] == {"user": "ann"}
        assert site("ann", "DELETE", url("x")).status_code == 200
        assert site("ann", "GET", "/v1/store").json()["num_documents"] == 0


def test_a_store_with_documents_is_served_again(tmp_path):
    for number in range(2):
        with open_site(tmp_path) as site:
            site.put("ann", f"x{number}", TEXT)
            assert site.names("ann") == [f"x{each}" for each in range(number + 1)]
            assert len(site.memory) == 7 * (number + 1)
    assert verify(tmp_path / "store") == []


def test_figures_are_of_the_documents_that_a_key_sees(site):
    site.put("ann", "a", TEXT)
    site.put("bob", "b", TEXT + " w10")
    hers, read, all_ = (site(who, "GET", "/v1/store").json() for who in ("ann", "reader", "root"))
    assert read == {**hers, "can_write": False}
    assert hers["can_write"]
    assert all_["can_write"]
    assert (hers["num_documents"], hers["num_tokens"], hers["num_rows"]) == (1, 8, 7)
    assert (all_["num_documents"], all_["num_tokens"], all_["num_rows"]) == (2, 17, 15)
    assert (hers["bytes"], hers["index"]) == (None, None)
    assert all_["bytes"] > 15 * all_["bytes_per_row"]
    assert (all_["model"], all_["model_type"], all_["num_layers"]) == ("emt", "llama", 3)
    assert str(site.folder) not in json.dumps(all_)


def test_too_many_writes_are_told_to_wait(tmp_path):
    with open_site(tmp_path, Limits(max_waiting_documents=1)) as site:
        with site.app.state.served.writer.slot():
            response = site("root", "PUT", url("x"), json={"text": "w3"})
        assert (response.status_code, response.headers["Retry-After"]) == (503, "5")
        assert site.put("root", "x", "w3")["status"] == "added"
