"""Files of keys, and what is asked with a key."""

import hashlib
import hmac
import json
import logging
import traceback

import pytest
import yaml

pytest.importorskip("fastapi")

from emt.errors import ConfigError
from emt.serving.keys import Keys

SECRET = "emt-0123456789abcdef"
OTHER = "emt-fedcba9876543210"
DIGEST = hashlib.sha256(OTHER.encode()).hexdigest()
YAML = f"""
keys:
- name: ann
  key: {SECRET}
  where: {{user: ann, team: [a, b]}}
  write: true
- {{name: root, sha256: {DIGEST}}}
"""


def read(folder, text, name="keys.yaml"):
    (folder / name).write_text(text, encoding="utf-8")
    return Keys.read(folder / name)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (YAML, "keys.yaml"),
        (json.dumps({"keys": json.loads(json.dumps(yaml.safe_load(YAML)))["keys"]}), "k"),
        (json.dumps(yaml.safe_load(YAML)["keys"], indent="\t"), "keys.json"),
    ],
    ids=["YAML", "JSON", "JSON, a list"],
)
def test_a_file_says_what_each_key_sees_and_whether_it_writes(tmp_path, text, name):
    keys = read(tmp_path, text, name)
    ann, root = keys.access(SECRET), keys.access(OTHER)
    assert (ann.name, ann.where, ann.can_write) == (
        "ann",
        {"user": ["ann"], "team": ["a", "b"]},
        True,
    )
    assert (root.name, root.where, root.can_write) == ("root", {}, False)
    for wrong in ("", SECRET[:-1], SECRET + " ", SECRET.upper(), DIGEST, "\udc80"):
        assert keys.access(wrong) is None
    assert SECRET not in repr(keys)


def test_every_key_is_compared(tmp_path, monkeypatch):
    compared = []
    monkeypatch.setattr(
        hmac, "compare_digest", lambda *pair: bool(compared.append(pair)) or pair[0] == pair[1]
    )
    keys = read(tmp_path, YAML)
    assert keys.access(SECRET).name == "ann"
    assert len(compared) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be a list under `keys`"),
        ("keys: []", "has no keys"),
        ("{}", "must be a list under `keys`"),
        (f"{SECRET}: {{where: {{user: ann}}}}", "must be a list under `keys`"),
        (f"keys:\n- {{name: a, key: {SECRET}\n", r"neither YAML nor JSON \(line 3\)"),
        (f"keys:\n- name: a\n  key: *{SECRET}\n", "neither YAML nor JSON"),
        (f"keys:\n- name: a\n  key: !{SECRET} x\n", "neither YAML nor JSON"),
        (f"keys:\n- {{{SECRET}: 1, {SECRET}: 2}}\n", "neither YAML nor JSON"),
        (f"keys: [{SECRET}]", "expected a mapping"),
        (f"keys: [{{name: a, key: {SECRET}, wher: {{user: ann}}}}]", "Did you mean 'where'"),
        (f"keys: [{{name: a, {SECRET}: x}}]", "unknown field. There are key, sha256"),
        (f"keys: [{{key: {SECRET}}}]", "`name` must be text"),
        (f'keys: [{{name: "a\\nb", key: {SECRET}}}]', "`name` must be text"),
        ("keys: [{name: a}]", "one of `key` and `sha256`"),
        (f"keys: [{{name: a, key: {SECRET}, sha256: {DIGEST}}}]", "one of `key` and `sha256`"),
        ("keys: [{name: a, key: fifteen-letters}]", "at least 16 .*; got 15"),
        ("keys: [{name: a, key: 'sixteen letters, and spaces'}]", "without spaces"),
        ("keys: [{name: a, key: 'sixteen-letters-ä'}]", "printable ASCII"),
        ("keys: [{name: a, key: 1234567890123456789}]", "must be text; got a int"),
        (f"keys: [{{name: a, sha256: {SECRET}}}]", "64 hex digits"),
        (f"keys: [{{name: a, key: {SECRET}, write: 1}}]", "`write` must be true or false"),
        (f"keys: [{{name: a, key: {SECRET}, where: }}]", "where must be a mapping"),
        (f"keys: [{{name: a, key: {SECRET}, where: {{}}}}]", "`where` must have a key"),
        (f"keys: [{{name: a, key: {SECRET}, where: {{user: []}}}}]", "at least one value"),
        (f"keys: [{{name: a, key: {SECRET}, where: {{user: 2026-01-01}}}}]", "where must compare"),
        (f"keys: [{{name: a, key: {SECRET}}}, {{name: b, key: {SECRET}}}]", "key 2 .* same"),
        (f"keys: [{{name: a, key: {SECRET}}}, {{name: a, key: {OTHER}}}]", "key 2 .* name"),
        (f"keys: [{{name: a, key: {SECRET}}}]\nmore: 1", "nothing beside it"),
    ],
)  # fmt: skip
def test_mistakes_are_told_without_a_key(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        read(tmp_path, text)
    told = "".join(traceback.format_exception(caught.value))
    assert "keys.yaml" in str(caught.value)
    assert SECRET not in told
    assert "fifteen" not in told


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        Keys.read(tmp_path / "none")


def test_a_request_without_the_right_key_is_refused(site, caplog):
    for authorization in (None, "", "Bearer", "Bearer " + SECRET, f"Basic {site.keys['ann']}"):
        headers = {} if authorization is None else {"Authorization": authorization}
        for method, path in (
            ("GET", "/v1/store"),
            ("POST", "/v1/search"),
            ("DELETE", "/v1/documents/x"),
        ):
            told = site.client.request(method, path, headers=headers)
            error = told.json()["error"]
            assert (told.status_code, error["type"], error["code"]) == (
                *(401, "authentication_error"),
                "invalid_api_key",
            )
            assert told.headers["WWW-Authenticate"] == "Bearer"
            assert SECRET not in told.text
    with caplog.at_level(logging.DEBUG):
        assert site("ann", "GET", "/v1/store").status_code == 200
        assert site.client.get("/v1/store", headers={"Authorization": SECRET}).status_code == 401
    assert SECRET not in caplog.text
    assert site.keys["ann"] not in caplog.text


def test_a_key_that_may_not_write_reads(site):
    site.put("root", "seen", "w3 w4 w5", user="ann")
    for method in ("PUT", "DELETE"):
        told = site("reader", method, "/v1/documents/seen", json={"text": "w3"})
        assert (told.status_code, told.json()["error"]["code"]) == (403, "read_only")
    assert site("reader", "GET", "/v1/documents/seen").json()["text"] == "w3 w4 w5"
