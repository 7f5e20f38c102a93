"""What the `emt` command refuses: one line on stderr, exit code 2, and nothing half-written."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from memory_backends.faiss import index as faiss_index
from memory_backends.rows.files import RowFiles
from tests.emt.commands import ROOT, emt, emt_process, make_documents, make_model
from tests.emt.words import word_tokenizer
from tests.families import REFUSED

PROMPT = "w5 w9 w33"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def indexed(tmp_path_factory, model):
    """Return a store that tests copy."""
    folder = tmp_path_factory.mktemp("indexed")
    documents = make_documents(folder / "documents")
    emt("index", documents, "--store", folder / "store", "--model", model)
    return folder / "store"


@pytest.fixture
def store(tmp_path, indexed):
    return shutil.copytree(indexed, tmp_path / "store")


@pytest.fixture
def more(tmp_path):
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "d.txt").write_text("w20 w30 w40")
    return tmp_path / "more"


def refused(*arguments, message):
    """Run a command; expect one line that begins with the message, and nothing else."""
    done = emt(*arguments, code=2)
    assert done.out == ""
    lines = done.err.splitlines()
    if re.match(r"\d+ documents?, ", lines[0]):  # the estimate
        del lines[0]
    assert len(lines) == 1, done.err
    assert re.match(f"emt: {message}", lines[0]), lines[0]


def contents(folder):
    """Return what is in a folder; logs of the database aside, which are no part of its state."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "write.lock"
    }


# -- arguments ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"the following arguments are required: COMMAND \(see `emt --help`\)$"),
        (["look"], "argument COMMAND: invalid choice: 'look'"),
        (
            ["index", "--store", "s"],
            r"the following arguments are required: source \(see `emt index",
        ),
        (["index", "a.txt"], "the following arguments are required: --store"),
        (
            ["generate", "--store", "s", "p", "--topk", "0"],
            "argument --topk: must be a whole number",
        ),
        (["generate", "--store", "s", "p", "--topk", "-3"], "argument --topk: must be a whole "),
        (["generate", "--store", "s", "p", "--topk", "many"], ".* of at least 1; got 'many'"),
        (
            ["generate", "--store", "s", "p", "--uncertainty", "1.0"],
            "argument --uncertainty: must be an entropy and a whole number, such as 1.0:12; got '1",
        ),
        (["generate", "--store", "s", "p", "--max-new-tokens", "0"], "argument --max-new-tokens"),
        (["generate", "--store", "s", "p", "--loud"], "unrecognized arguments: --loud"),
        (["info"], "the following arguments are required: DIR"),
        (["verify"], "the following arguments are required: DIR"),
        (["compact", "s", "--json"], "unrecognized arguments: --json"),
        (["remove", "s"], "the following arguments are required: document"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, message):
    refused(*arguments, message=message)


def test_help_is_still_help():
    assert emt("generate", "--help").out.startswith("usage: emt generate ")


# -- documents ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("bad.txt", b"", "'.*bad.txt' is empty"),
        ("bad.txt", b"ab\0c", "'.*bad.txt' is binary"),
        ("bad.md", b"caf\xe9", "'.*bad.md' is not UTF-8: byte 3 is 0xe9"),
        ("bad.jsonl", b'{"id": "x", "text": "w5"}\n[1]', "'.*bad.jsonl' line 2 must be an object"),
        ("bad.jsonl", b'{"id": "x"}', "'.*bad.jsonl' line 1 must have the keys"),
        ("bad.jsonl", b'{"id": null, "text": "w5"}', "'.*bad.jsonl' line 1: \"id\" must be"),
        (
            "bad.jsonl",
            b'{"id": "x", "text": "w5 \\ud800"}',
            "'.*bad.jsonl' line 1: \"text\" has half",
        ),
        (
            "bad.jsonl",
            b'{"id": "d.txt", "text": "w5"}',
            "document names must be unique; 'd.txt' is",
        ),
        ("bad.txt", b"no words of the model", "document 'bad.txt' has nothing but special tokens"),
    ],
)
def test_bad_documents_leave_no_store_and_change_none(
    tmp_path, store, more, model, name, data, message
):
    (more / name).write_bytes(data)
    refused("index", more, "--store", tmp_path / "new", "--model", model, message=message)
    assert not (tmp_path / "new").exists()
    before = contents(store)
    refused("index", more, "--store", store, message=message)
    assert contents(store) == before


def test_documents_that_are_not_there(tmp_path, model):
    new = tmp_path / "new"
    (tmp_path / "empty").mkdir()
    for source, message in (
        (tmp_path / "nothing", ".*nothing' does not exist"),
        (tmp_path / "empty", "folder '.*empty' has no documents"),
        (model / "config.json", "expected a .txt, .md, .jsonl file"),
    ):
        refused("index", source, "--store", new, "--model", model, message=message)
    assert not new.exists()


def test_documents_longer_than_the_models_positions(tmp_path):
    short = make_model(tmp_path / "model", max_position_embeddings=32)
    documents = make_documents(tmp_path / "documents")
    message = r"max_length \(41\) must be at most the model's 32 positions"
    refused("index", documents, "--store", tmp_path / "s", "--model", short, message=message)
    assert not (tmp_path / "s").exists()


def test_removing_what_is_not_there_removes_nothing(store):
    before = contents(store)
    refused("remove", store, "a.txt", "z", message="no document 'z' in '.*'; nothing was removed")
    assert contents(store) == before


# -- the store ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        *((name, "{}") for name in ("info", "verify", "compact", "rebuild")),
        ("remove", "{}", "a.txt"),
        ("generate", "--store", "{}", PROMPT),
    ],
    ids=lambda command: command[0],
)
def test_what_is_no_store(tmp_path, command):
    (tmp_path / "file").write_text("text")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("text")
    (tmp_path / "empty").mkdir()
    before = contents(tmp_path)
    for name, message in (
        ("nothing", "expected a store at '{}'; there is none"),
        ("empty", "expected a store at '{}'; there is none"),
        ("file", "expected a store directory at '{}'; it is a file"),
        ("folder", "'{}' has no catalog.sqlite, so it is no store, but it is not empty"),
        ("x" * 300, "'{}' cannot be a store: File name too long"),
    ):
        path = tmp_path / name
        arguments = [part.format(path) for part in command]
        refused(*arguments, message=message.format(path))
    assert contents(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "folder"]


def test_index_where_no_store_can_be(tmp_path, more, model):
    (tmp_path / "file").write_text("text")
    for path, message in (
        (tmp_path / "file", "expected a store directory at '.*file'; it is a file"),
        (tmp_path / "file" / "store", "the store at '.*store' cannot be written: Not a directory"),
        (more, "'.*more' has no catalog.sqlite, so it is no store"),
    ):
        refused("index", more, "--store", path, "--model", model, message=message)
    assert list(contents(more)) == ["d.txt"]


def test_a_store_of_another_model(tmp_path, store, more):
    other = make_model(tmp_path / "other", num_hidden_layers=2)
    before = contents(store)
    message = (
        "memory at '.*store' was written by another model; num_hidden_layers: the memory has 3, "
        "this model 2; weights: the memory has '.*', this model '.*'"
    )
    refused("index", more, "--store", store, "--model", other, message=message)
    refused("generate", "--store", store, "--model", other, PROMPT, message=message)
    assert contents(store) == before


def damage_missing_catalog(store):
    (store / "catalog.sqlite").unlink()
    return "'.*store' has no catalog.sqlite"


def damage_truncated_catalog(store):
    path = store / "catalog.sqlite"
    path.write_bytes(path.read_bytes()[:5000])
    return "the catalogue '.*catalog.sqlite' cannot be used: "


def damage_foreign_catalog(store):
    (store / "catalog.sqlite").write_bytes(b"not a database" * 100)
    return "the catalogue '.*catalog.sqlite' cannot be used: file is not a database"


def damage_missing_rows(store):
    (store / "rows" / "layer-001.bin").unlink()
    return "'.*layer-001.bin' is missing; expected at least "


def damage_truncated_rows(store):
    path = store / "rows" / "layer-002.bin"
    path.write_bytes(path.read_bytes()[:-1])
    return r"'.*layer-002.bin' is truncated to \d+ bytes; expected at least "


def damage_missing_index(store):
    next(store.glob("index/*/layer-001-head-001.faiss")).unlink()
    return r"'.*layer-001-head-001.faiss' is missing; expected \d+ bytes. Run `emt rebuild`"


def damage_truncated_index(store):
    path = next(store.glob("index/*/layer-000-head-001.faiss"))
    path.write_bytes(path.read_bytes()[:-100])
    return r"'.*layer-000-head-001.faiss' has \d+ bytes; expected \d+"


def damage_truncated_ids(store):
    path = next(store.glob("index/*/ids.bin"))
    path.write_bytes(path.read_bytes()[:-8])
    return r"'.*ids.bin' has \d+ bytes; expected "


DAMAGES = [function for name, function in list(globals().items()) if name.startswith("damage_")]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__[7:])
def test_missing_and_truncated_files_are_named(store, damage):
    message = damage(store)
    refused("generate", "--store", store, PROMPT, message=message)


def test_an_index_folder_may_be_deleted(store):
    before = emt("generate", "--store", store, PROMPT).out
    shutil.rmtree(store / "index")
    assert emt("generate", "--store", store, PROMPT).out == before


# -- a disk that fills up -----------------------------------------------------------------------


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


FULL = "the store at '.*' cannot be written: No space left on device"


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
    store = tmp_path / "new"
    with monkeypatch.context() as patch:
        full_after(3, patch)
        refused("index", more, "--store", store, "--model", model, message=FULL)
    found = json.loads(emt("info", store, "--json").out)
    assert [document["name"] for document in found["documents"]] == ["d.txt"]
    assert found["model"]["source"] == str(model)
    again = emt("index", more, "--store", store)  # the same command goes on
    assert again.out.startswith("1 document added, 1 was there already; 3 tokens, 2 rows in ")
    whole = tmp_path / "whole"
    emt("index", more, "--store", whole, "--model", model)
    assert (store / "rows" / "layer-000.bin").read_bytes() == (
        whole / "rows" / "layer-000.bin"
    ).read_bytes()


def test_a_full_disk_at_the_index_keeps_the_documents(tmp_path, more, model, monkeypatch):
    store = tmp_path / "new"
    with monkeypatch.context() as patch:
        patch.setattr(faiss_index, "write_index", full_disk)
        refused("index", more, "--store", store, "--model", model, message=FULL)
    assert not list(store.glob("index/*"))
    assert emt("generate", "--store", store, PROMPT).out


# -- settings and models ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("topk: 0", "config '.*': topk must be a whole number of at least 1, or 'auto'; got 0"),
        ("topk: -2", "config '.*': topk must be a whole number of at least 1, or 'auto'; got -2"),
        (
            "topk: ten",
            "config '.*': topk must be a whole number of at least 1, or 'auto'; got 'ten'",
        ),
        ("top_k: 3", "config '.*': unknown key 'top_k' in a memory config. Did you mean 'topk'"),
        ("[1, 2]", "config '.*' must be a mapping of settings; got a list"),
        ("a: [1", "config '.*' cannot be read as YAML: "),
        ("layers: [0, 3]", "layers must be layers with attention, 0 to 2; got 3"),
        (
            "memory_type: vector_db\nindex: Flatt",
            "index must be 'auto' or a FAISS factory string .*; got 'Flatt'. FAISS says: ",
        ),
        (
            "stride: 600\nmax_length: 500",
            r"config '.*': max_length \(500\) must be at least stride",
        ),
        (None, "config '.*' cannot be read as YAML: .*No such file"),
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


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nobody/nothing", "model 'nobody/nothing' cannot be loaded: "),
        ("./nothing", "model './nothing' cannot be loaded: "),
        ("./nothing.gguf", "model file 'nothing.gguf' does not exist. Correct --model."),
    ],
)
def test_models_that_are_not_there(tmp_path, more, name, message, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused("index", more, "--store", tmp_path / "new", "--model", name, message=message)
    assert not (tmp_path / "new").exists()


def test_families_that_cannot_be_reached(tmp_path, more):
    family = REFUSED[0]
    folder = tmp_path / "model"
    family.build().save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    message = f"{family.model_type}: attention must go through transformers' AttentionInterface; "
    refused("index", more, "--store", tmp_path / "new", "--model", folder, message=message)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([""], "the prompt is empty"),
        ([" \n"], "the prompt is empty"),
        (["w5 \udce9"], "the prompt is not UTF-8"),
        (["w5", "--chat"], "this model's tokenizer has no chat template. Use --no-chat"),
        (["w5 " * 5000], "the prompt's 5001 tokens and 64 new ones must fit the model's 4096"),
        (["w5", "--max-new-tokens", "5000"], "the prompt's 2 tokens and 5000 new ones must fit"),
    ],
)
def test_prompts_that_cannot_be_answered(store, arguments, message):
    refused("generate", "--store", store, *arguments, message=message)


# -- what is no mistake of the user's -----------------------------------------------------------


def test_ctrl_c_is_one_line_and_keeps_what_was_finished(tmp_path, more, model, monkeypatch):
    (more / "e.txt").write_text("w50 w60")
    append, store = RowFiles.append, tmp_path / "new"

    def interrupted(self, run):
        if len(run) == 2:
            raise KeyboardInterrupt
        append(self, run)

    with monkeypatch.context() as patch:
        patch.setattr(RowFiles, "append", interrupted)
        done = emt("index", more, "--store", store, "--model", model, code=130)
    assert done.err.splitlines()[1:] == [
        "emt: interrupted. What was finished before is kept; the same command goes on from there."
    ]
    found = json.loads(emt("info", store, "--json").out)
    assert [document["name"] for document in found["documents"]] == ["d.txt"]
    again = emt("index", more, "--store", store)
    assert again.out.startswith("1 document added, 1 was there already; 3 tokens, 2 rows in ")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("info", "emt: interrupted.\n"),
        ("compact", "emt: interrupted. The store is whole; run it again.\n"),
        ("remove", "emt: interrupted. `emt info` lists what is left.\n"),
    ],
)
def test_ctrl_c_in_other_commands(store, monkeypatch, name, message):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("emt.cli.stores.Catalog.open", interrupted)
    done = emt(name, store, *(["a.txt"] if name == "remove" else []), code=130)
    assert (done.out, done.err) == ("", message)


def test_ctrl_c_in_the_first_document_leaves_no_store(tmp_path, more, model, monkeypatch):
    def interrupted(self, run):
        raise KeyboardInterrupt

    monkeypatch.setattr(RowFiles, "append", interrupted)
    emt("index", more, "--store", tmp_path / "new", "--model", model, code=130)
    assert not (tmp_path / "new").exists()


def test_a_bug_of_ours_keeps_its_traceback(tmp_path, more, model, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr("emt.cli.reading.estimate", broken)
    with pytest.raises(ZeroDivisionError):
        emt("index", more, "--store", tmp_path / "new", "--model", model)


def test_a_reader_that_goes_away_is_no_error(store):
    command = [sys.executable, "-m", "emt", "info", str(store)]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        command, cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_error_in_a_process_of_its_own_is_all_there_is_on_the_screen(store):
    done = emt_process("generate", "--store", store, "--chat", PROMPT, code=2)
    assert done.err == "emt: this model's tokenizer has no chat template. Use --no-chat.\n"
    assert done.out == ""
