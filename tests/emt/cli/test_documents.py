"""`emt list` and `emt show`: documents, as JSON and in words, safe for a terminal."""

import contextlib
import json

from memory_backends.catalog import Catalog
from tests.emt.commands import TEXTS, emt, emt_json, refused


def record(documents, name, file, metadata=None):
    words = len(TEXTS[name].split())
    return {
        "name": name,
        "tokens": words + 1,
        "rows": words,
        "metadata": metadata or {},
        "file": file and str(documents / file),
    }


def test_list_has_every_document_with_its_file(tmp_path, store):
    with contextlib.closing(Catalog.open(store)) as catalog:
        catalog.set_metadata("b.md", {"year": 1999, "who": "L\u00e9a"})
    files, metadata = {"c": "c.jsonl"}, {"b.md": {"year": 1999, "who": "L\u00e9a"}}
    expected = [
        record(tmp_path / "documents", name, files.get(name, name), metadata.get(name))
        for name in sorted(TEXTS)
    ]
    assert emt_json("list", store) == {"store": str(store), "documents": expected}
    lines = emt("list", store).out.splitlines()
    folder = tmp_path / "documents"
    assert lines == [
        f"a.txt  31 tokens, 30 rows  from {folder / 'a.txt'}",
        f'b.md  21 tokens, 20 rows  {{"who": "L\u00e9a", "year": 1999}}  from {folder / "b.md"}',
        f"c  41 tokens, 40 rows  from {folder / 'c.jsonl'}",
    ]


def test_documents_of_no_file_have_none(store):
    with contextlib.closing(Catalog.open(store)) as catalog:
        catalog.set_setting("files", {})
    assert [each["file"] for each in emt_json("list", store)["documents"]] == [None] * 3
    assert emt("list", store).out.splitlines()[0] == "a.txt  31 tokens, 30 rows"


def test_an_empty_store_says_so(store):
    emt("remove", store, *TEXTS)
    assert emt("list", store).out == f"'{store}' has no documents.\n"
    assert emt_json("list", store)["documents"] == []


def test_show_prints_a_document(tmp_path, store):
    folder = tmp_path / "documents"
    assert emt("show", store, "a.txt").out == (
        f"a.txt  31 tokens, 30 rows  from {folder / 'a.txt'}\n\n{TEXTS['a.txt']}\n"
    )
    shown = emt_json("show", store, "c")
    assert shown.pop("text") == TEXTS["c"]
    assert len(shown.pop("token_ids")) == 41
    assert shown == record(folder, "c", "c.jsonl")


def test_what_is_not_there_is_refused(tmp_path, store):
    refused("show", store, "nothing", message="no document 'nothing' in '.*'. `emt list` lists")
    refused("list", tmp_path / "new", message="expected a store at '.*'; there is none")


def test_nothing_moves_the_cursor(tmp_path, model):
    lines, store = tmp_path / "d.jsonl", tmp_path / "new"
    name, text = "two\nlines\x1b[2J", "w5 \x1b[31mw6\x07 w7\nw8\tw9"
    lines.write_text(json.dumps({"id": name, "text": text, "metadata": {"k\n": "\x1b"}}))
    emt("index", lines, "--store", store, "--model", model)
    for arguments in (("list", store), ("info", store), ("show", store, name)):
        said = emt(*arguments).out
        assert not set("\x1b\x07") & set(said)
        assert "two\\nlines\\x1b[2J" in said
    assert said.endswith("\n\nw5 \\x1b[31mw6\\x07 w7\nw8\tw9\n")
    assert emt("list", store).out.count("\n") == 1
    assert emt_json("show", store, name)["text"] == text
    assert emt_json("list", store)["documents"][0]["metadata"] == {"k\n": "\x1b"}
