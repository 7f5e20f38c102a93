"""`emt index`: documents into a store, again and after what went wrong, and what it refuses."""

import contextlib
import errno
import json
import re

import numpy as np
import pytest

from emt import MemoryConfig
from emt.cli import session
from emt.cli.printing import bytes_used
from memory_backends.catalog import Catalog
from memory_backends.faiss import index as faiss_index
from memory_backends.rows.files import RowFiles
from tests.emt.cli.test_generate import METADATA, PROMPT, generated, of_library
from tests.emt.commands import TEXTS, contents, emt, emt_json, make_documents, make_model, refused
from tests.emt.words import word_tokenizer
from tests.families import REFUSED


def names_of(store):
    return [document["name"] for document in emt_json("info", store)["documents"]]


def test_it_says_what_it_will_do_and_what_it_did(tmp_path, model, documents, monkeypatch):
    monkeypatch.setenv("EMT_CACHE", str(tmp_path / "cache"))  # which has no head profile
    store = tmp_path / "new"
    done = emt("index", documents, "--store", store, "--model", model)
    tokens = sum(len(text.split()) + 1 for text in TEXTS.values())
    rows = tokens - len(TEXTS)
    assert re.fullmatch(
        rf"3 documents, {tokens} tokens: about [\d.]+ kB and 0:00:0\d\n"
        "emt: no head profile of this model: one is made, and kept for all its stores\n"
        r"emt: head profile: \d heads\n",
        done.err,
    )
    said = re.fullmatch(
        rf"3 documents added; {tokens} tokens, {rows} rows in ([\d.]+) s \([\d,]+ tokens/s\); "
        rf"'{store}' has ([\d.]+) kB\n",
        done.out,
    )
    assert float(said[2]) == pytest.approx(bytes_used(store) / 1000, abs=0.05)


def test_a_progress_bar_on_a_terminal_only(tmp_path, model, documents):
    done = emt("index", documents, "--store", tmp_path / "pipe", "--model", model)
    assert "%" not in done.err
    done = emt("index", documents, "--store", tmp_path / "screen", "--model", model, terminal=True)
    assert "100%" in done.err
    assert "tok/s" in done.err
    assert done.out.count("\n") == 1


def test_it_adds_to_a_store_and_needs_no_model(store, more):
    done = emt("index", more, "--store", store)
    assert done.out.startswith("1 document added; 4 tokens, 3 rows in ")
    described = emt_json("info", store)
    assert names_of(store) == [*sorted(TEXTS), "d.txt"]
    assert described["index"]["num_rows"] == described["rows"]


def test_the_same_command_again_has_nothing_to_do(store, documents):
    before = emt_json("info", store)
    done = emt("index", documents, "--store", store)
    assert re.fullmatch(
        rf"0 documents added, 3 were there already; '{store}' has [\d.]+ kB\n", done.out
    )
    after = emt_json("info", store)
    assert (after["documents"], after["rows"]) == (before["documents"], before["rows"])


def test_what_is_new_is_added_and_what_has_changed_is_replaced(tmp_path, model, store, documents):
    (documents / "b.md").write_text("w70 w71 w72")
    (documents / "d.txt").write_text("w80 w81")
    done = emt("index", documents, "--store", store)
    assert done.out.startswith(
        "1 document added, 1 replaced, 2 were there already; 7 tokens, 5 rows in "
    )
    whole = tmp_path / "whole"
    emt("index", documents, "--store", whole, "--model", model)
    parts = (sorted(map(str, emt_json("info", path)["documents"])) for path in (store, whole))
    assert len(set(map(tuple, parts))) == 1
    assert generated(store)["token_ids"] == generated(whole)["token_ids"]


def test_the_settings_of_a_store_are_kept_until_changed(tmp_path, model, documents, more):
    store, yaml = tmp_path / "new", tmp_path / "c.yaml"
    settings = {"memory_type": "vector_db", "mode": "token", "topk": 3, "sinks": "all"}
    yaml.write_text(json.dumps({**settings, "path": "other"}))
    emt("index", documents, "--store", store, "--model", model, "--config", yaml)
    assert not (tmp_path / "other").exists()
    config = MemoryConfig(**settings)
    kept = emt_json("info", store)["config"]
    assert kept == {key: value for key, value in config.to_dict().items() if key != "path"}
    assert generated(store)["token_ids"] == of_library(model, tmp_path, **settings)[0]
    emt("index", more, "--store", store)
    assert emt_json("info", store)["config"] == kept
    (more / "d.txt").rename(more / "again.txt")
    yaml.write_text("topk: 5\n")
    emt("index", more, "--store", store, "--config", yaml)
    assert emt_json("info", store)["config"] == {**kept, "topk": 5}


def test_it_goes_on_in_what_a_killed_process_left(tmp_path, model, documents):
    store = tmp_path / "new"
    store.mkdir()
    (store / "write.lock").touch()
    (store / "catalog.sqlite.partial").write_bytes(b"half")
    emt("index", documents, "--store", store, "--model", model)
    assert names_of(store) == sorted(TEXTS)


def test_metadata_is_indexed_and_brought_up_to_date(tmp_path, model):
    store, lines = tmp_path / "new", tmp_path / "lines.jsonl"

    def index(metadata, said):
        documents = [{"id": name, "text": text} for name, text in TEXTS.items()]
        for document in documents:
            if metadata[document["id"]] is not None:
                document["metadata"] = metadata[document["id"]]
        lines.write_text("\n".join(map(json.dumps, documents)))
        assert emt("index", lines, "--store", store, "--model", model).out.startswith(said)
        with contextlib.closing(Catalog.open(store)) as catalog:
            return {name: catalog.metadata(name) for name in catalog.document_names()}

    expected = {name: metadata or {} for name, metadata in METADATA.items()}
    assert index(METADATA, "3 documents added;") == expected
    assert index(METADATA, "0 documents added, 3 were there already;") == expected
    changed = {"a.txt": {"year": 2000}, "b.md": None, "c": {"year": 7}}
    expected = {**changed, "b.md": METADATA["b.md"]}
    assert index(changed, "0 documents added, 3 were there already;") == expected


# -- files and folders ----------------------------------------------------------------------------


def files_of(store):
    return {each["name"]: each["file"] for each in emt_json("list", store)["documents"]}


def test_folders_with_equal_names_are_kept_apart(tmp_path, model, store, more):
    other = tmp_path / "other"
    other.mkdir()
    (other / "d.txt").write_text("w50 w60")
    emt("index", more, "--store", store)
    done = emt("index", other, "--store", store)
    assert done.out.startswith("1 document added; 3 tokens, 2 rows in ")
    assert done.err.startswith(
        "emt: 1 document of another file had the name already, so a part of the path comes before "
        "it: 'other/d.txt'. --replace replaces the others instead.\n"
    )
    (more / "d.txt").write_text("w21 w31")
    done = emt("index", more, other, "--store", store)
    assert done.out.startswith("0 documents added, 1 replaced, 1 was there already; ")
    assert "other/d.txt" not in done.err
    files = files_of(store)
    assert files["d.txt"] == str(more / "d.txt")
    assert files["other/d.txt"] == str(other / "d.txt")


def test_replace_takes_equal_names_for_the_same_document(tmp_path, store, more):
    emt("index", more, "--store", store)
    other = tmp_path / "other"
    other.mkdir()
    (other / "d.txt").write_text("w50 w60")
    done = emt("index", other, "--store", store, "--replace")
    assert done.out.startswith("0 documents added, 1 replaced; ")
    assert files_of(store)["d.txt"] == str(other / "d.txt")


def test_what_a_stopped_run_wrote_has_its_files(tmp_path, model, more, monkeypatch):
    (more / "e.txt").write_text("w50 w60")
    store = tmp_path / "new"
    with monkeypatch.context() as patch:
        full_after(3, patch)
        refused("index", more, "--store", store, "--model", model, message=FULL)
    assert files_of(store) == {"d.txt": str(more / "d.txt")}
    (more / "d.txt").write_text("w21 w31")
    done = emt("index", more, "--store", store)
    assert done.out.startswith("1 document added, 1 replaced; ")


def test_a_document_that_was_not_replaced_keeps_its_file(tmp_path, store, documents):
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.txt").write_text("<eos>")
    (other / "d.txt").write_text("w20 w30")
    done = emt("index", other, "--store", store, "--replace", "--skip-errors")
    assert "left out: document 'a.txt' has nothing but special tokens" in done.err
    (other / "a.txt").unlink()
    emt("index", other, "--store", store, "--prune")
    files = {each["name"]: each["file"] for each in emt_json("list", store)["documents"]}
    assert files["a.txt"] == str(documents / "a.txt")


def overtaken_by(monkeypatch, *command):
    """Let another command run while the next one loads its model, after it has chosen names."""
    load = session.load_model

    def overtaken(*arguments):
        monkeypatch.setattr(session, "load_model", load)
        emt(*command)
        return load(*arguments)

    monkeypatch.setattr(session, "load_model", overtaken)


def test_a_name_that_another_process_took_meanwhile(tmp_path, store, more, monkeypatch):
    other = tmp_path / "other"
    other.mkdir()
    (other / "d.txt").write_text("w60 w61")
    (other / "e.txt").write_text("w70 w71")
    overtaken_by(monkeypatch, "index", other, "--store", store)
    refused("index", more, "--store", store, message="another process has written .* 'd.txt'")
    emt("index", more, "--store", store)
    documents = emt_json("list", store)["documents"]
    assert {each["name"]: each["file"] for each in documents[-3:]} == {
        "d.txt": str(other / "d.txt"),
        "e.txt": str(other / "e.txt"),
        "more/d.txt": str(more / "d.txt"),
    }


def test_files_of_another_process_are_kept(tmp_path, store, more, monkeypatch):
    other = tmp_path / "other"
    other.mkdir()
    (other / "e.txt").write_text("w70 w71")
    overtaken_by(monkeypatch, "index", other, "--store", store)
    emt("index", more, "--store", store)
    files = [each["file"] for each in emt_json("list", store)["documents"][-2:]]
    assert files == [str(other / "e.txt"), str(more / "d.txt")]


def test_prune_removes_what_is_gone_from_the_folders_given(store, documents, more):
    emt("index", more, "--store", store)
    emt("index", documents, "--store", store)
    (documents / "a.txt").unlink()
    (documents / "b.md").rename(documents / "renamed.md")
    (documents / "c.jsonl").write_text('{"id": "new", "text": "w7 w8"}')
    (more / "d.txt").unlink()
    done = emt("index", documents, "--store", store)
    assert len(names_of(store)) == 6
    done = emt("index", documents, "--store", store, "--prune")
    assert done.out.startswith("0 documents added, 2 were there already, 3 removed; '")
    assert sorted(names_of(store)) == ["d.txt", "new", "renamed.md"]
    assert emt_json("info", store)["index"]["num_rows"] == emt_json("info", store)["rows"]
    assert emt("index", more, "--store", store, "--prune").out.startswith(
        "0 documents added, 1 removed; '"
    )
    refused("index", more / "d.txt", "--store", store, "--prune", message=".* does not exist")


def test_every_bad_file_is_named_and_skipped_if_it_may_be(tmp_path, store, more, model):
    bad = {"bad.txt": b"ab\0c", "e.txt": b"no words of the model", "f.jsonl": b"[1]"}
    for name, data in bad.items():
        (more / name).write_bytes(data)
    before = contents(store)
    done = emt("index", more, "--store", store, code=2)
    assert [line.partition("'")[2].partition("'")[0] for line in done.err.splitlines()[:-1]] == [
        str(more / "bad.txt"),
        str(more / "f.jsonl"),
    ]  # what only the model can tell comes when these are right
    assert done.err.splitlines()[-1] == (
        "emt: 2 files or lines cannot be read, so nothing was written. Correct what is named "
        "above, or leave it out with --skip-errors."
    )
    assert contents(store) == before
    new = tmp_path / "new"
    emt("profile", "--model", model)  # so that `index` says nothing of making one
    done = emt("index", more, "--store", new, "--model", model, "--skip-errors")
    assert names_of(new) == ["d.txt"]
    *said, expected = done.err.splitlines()
    assert expected.startswith("1 document, 4 tokens: ")
    assert len(said) == 3
    for name, line in zip(("bad.txt", "f.jsonl", "e.txt"), said, strict=True):
        assert line.startswith("emt: left out: ")
        assert name in line
    (more / "d.txt").unlink()
    (more / "e.txt").unlink()
    done = emt("index", more, "--store", new, "--skip-errors", code=2)
    assert done.err.splitlines()[-1] == "emt: no document is left: all files and lines have errors."
    assert len(done.err.splitlines()) == 3


def test_places_that_cannot_be_read_are_named(store, more):
    (more / "gone.txt").symlink_to("nothing")
    done = emt("index", more, "--store", store)
    named = f"emt: left out: '{more / 'gone.txt'}' cannot be read: No such file or directory.\n"
    assert done.err.startswith(named)
    assert names_of(store)[-1] == "d.txt"


def test_names_with_control_characters_do_not_reach_the_terminal(store, more):
    (more / "new\nline\x1b.txt").write_bytes(b"\0")
    done = emt("index", more, "--store", store, "--skip-errors")
    assert "new line\\x1b.txt' is binary" in done.err
    assert "\x1b" not in done.err


# -- refused: no store is made, and none is changed -----------------------------------------------


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("bad.txt", b"ab\0c", "'.*bad.txt' is binary"),
        ("bad.jsonl", b'{"id": "x", "text": "w5"}\n[1]', "'.*bad.jsonl' line 2"),
        (
            "bad.jsonl",
            b'{"id": "x", "text": "w5"}\n' * 2,
            "'x' is in '.*bad.jsonl' line 1 and in line 2",
        ),
        ("bad.txt", b"no words of the model", "'bad.txt' has nothing but special tokens"),
    ],
)
def test_bad_documents(tmp_path, store, more, model, name, data, message):
    (more / name).write_bytes(data)
    refused("index", more, "--store", tmp_path / "new", "--model", model, message=message)
    assert not (tmp_path / "new").exists()
    before = contents(store)
    refused("index", more, "--store", store, message=message)
    assert contents(store) == before


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("topk: 0", "'.*c.yaml': topk .* got 0"),
        ("top_k: 3", "'.*c.yaml': .*'top_k'.*'topk'"),
        ("a: [1", "'.*c.yaml' cannot be read as YAML: "),
        (None, "'.*c.yaml' cannot be read as YAML: .*No such file"),
        ("layers: [0, 3]", "layers .* 0 to 2; got 3"),
        ("memory_type: vector_db\nindex: Flatt", "index .* got 'Flatt'. FAISS says: "),
    ],
)
def test_wrong_settings(tmp_path, store, more, model, yaml, message):
    config = tmp_path / "c.yaml"
    if yaml is not None:
        config.write_text(yaml)
    new, before = tmp_path / "new", contents(store)
    refused("index", more, "--store", new, "--model", model, "--config", config, message=message)
    assert not new.exists()
    refused("index", more, "--store", store, "--config", config, message=message)
    refused("generate", "--store", store, PROMPT, "--config", config, message=message)
    assert contents(store) == before


def test_paths_without_documents_or_room_for_a_store(tmp_path, more, model):
    (tmp_path / "file").write_text("text")
    for source, store, message in (
        (tmp_path / "nothing", "new", "'.*nothing' does not exist"),
        (model / "config.json", "new", "expected a .txt, .md, .jsonl,"),
        (more, "file", "'.*file'; it is a file"),
        (more, "file/store", "'.*store' cannot be written: Not a directory"),
        (more, "more", "'.*more' has no catalog.sqlite"),
    ):
        refused("index", source, "--store", tmp_path / store, "--model", model, message=message)
    assert not (tmp_path / "new").exists()
    assert list(contents(more)) == ["d.txt"]


def test_documents_longer_than_the_models_positions(tmp_path):
    short = make_model(tmp_path / "model", max_position_embeddings=32)
    documents, config = make_documents(tmp_path / "documents"), tmp_path / "c.yaml"
    index = ("index", documents, "--store", tmp_path / "s", "--model", short)
    config.write_text("max_length: 3072\n")
    refused(*index, "--config", config, message=r"max_length \(41\) .* 32 positions")
    assert not (tmp_path / "s").exists()
    assert emt(*index).out.startswith("3 documents added; 93 tokens, 90 rows in ")


def test_models_that_cannot_be_reached(tmp_path, more):
    family = REFUSED[0]
    folder = tmp_path / "model"
    family.build().save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    message = f"{family.model_type}: .*AttentionInterface"
    refused("index", more, "--store", tmp_path / "new", "--model", folder, message=message)
    assert not (tmp_path / "new").exists()


def test_a_store_of_another_model(tmp_path, store, more):
    other = make_model(tmp_path / "other", num_hidden_layers=2)
    before = contents(store)
    message = (
        "'.*store' was written by another model; num_hidden_layers: the memory has 3, this model "
        "2; weights: the memory has '.*', this model '.*'"
    )
    refused("index", more, "--store", store, "--model", other, message=message)
    refused("generate", "--store", store, "--model", other, PROMPT, message=message)
    assert contents(store) == before


# -- a disk that fills up -------------------------------------------------------------------------

FULL = "'.*' cannot be written: No space left on device"


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def full_after(rows, monkeypatch):
    """Let the disk fill up once this many rows were appended."""
    append, written = RowFiles.append, []

    def limited(self, run):
        written.append(len(run))
        if sum(written) > rows:
            full_disk()
        append(self, run)

    monkeypatch.setattr(RowFiles, "append", limited)


def test_a_full_disk_at_the_first_document(tmp_path, store, more, model, monkeypatch):
    new, before = tmp_path / "new", contents(store)
    full_after(0, monkeypatch)
    refused("index", more, "--store", new, "--model", model, message=FULL)
    assert not new.exists()
    (tmp_path / "c.yaml").write_text("topk: 3\n")
    refused("index", more, "--store", store, "--config", tmp_path / "c.yaml", message=FULL)
    assert contents(store) == before


def test_a_full_disk_later_keeps_the_documents_before(tmp_path, more, model, monkeypatch):
    (more / "e.txt").write_text("w50 w60")
    store, whole, config = tmp_path / "new", tmp_path / "whole", tmp_path / "c.yaml"
    config.write_text("row_codec: exact\n")
    options = ("--model", model, "--config", config)
    with monkeypatch.context() as patch:
        full_after(3, patch)
        refused("index", more, "--store", store, *options, message=FULL)
    assert names_of(store) == ["d.txt"]
    assert emt_json("info", store)["model"]["source"] == str(model)
    again = emt("index", more, "--store", store)  # the same command goes on
    assert again.out.startswith("1 document added, 1 was there already; 3 tokens, 2 rows in ")
    emt("index", more, "--store", whole, *options)
    rows, expected = (
        np.fromfile(path / "rows" / "layer-000.bin", dtype=np.float32) for path in (store, whole)
    )
    np.testing.assert_allclose(rows, expected, atol=1e-6)  # alone, or in a batch of two


def test_a_full_disk_at_the_index_keeps_the_documents(tmp_path, more, model, monkeypatch):
    store = tmp_path / "new"
    emt("profile", "--model", model)  # so that `index` says nothing of making one
    with monkeypatch.context() as patch:
        patch.setattr(faiss_index, "write_index", full_disk)
        refused("index", more, "--store", store, "--model", model, message=FULL)
    assert not list(store.glob("index/*"))
    assert emt("generate", "--store", store, PROMPT).out
