"""The `emt` command, in this process; `test_cli_errors.py` has what it refuses."""

import json
import re

import torch
import pytest

from emt import MemoryConfig, attach
from emt.citations.citing import cite, content_layers
from emt.cli.printing import bytes_used
from emt.model.loading import load
from tests.emt.commands import TEXTS, emt, emt_process, make_documents, make_model

PROMPT = "w5 w9 w33"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def documents(tmp_path):
    return make_documents(tmp_path / "documents")


@pytest.fixture
def store(tmp_path, model, documents):
    emt("index", documents, "--store", tmp_path / "store", "--model", model)
    return tmp_path / "store"


def expected_tokens(model, config, max_new_tokens=6, **options):
    """Return what the library generates in this process from the same documents."""
    loaded = load(str(model))
    memory = attach(loaded.model, config, tokenizer=loaded.tokenizer)
    if not memory.documents:
        memory.write_all(sorted(TEXTS.items()))
    ids = torch.tensor([loaded.tokenizer(PROMPT).input_ids])
    with memory.using(**options), memory.recording() as recording:
        output = loaded.model.generate(ids, max_new_tokens=max_new_tokens, do_sample=False)
    return output[0, ids.shape[1] :].tolist(), cite(
        memory, recording, layers=content_layers(memory)
    )


def generated(store, *options):
    done = emt("generate", "--store", store, PROMPT, "--json", "--max-new-tokens", 6, *options)
    assert done.out.count("\n") == 1
    return json.loads(done.out)


# -- index --------------------------------------------------------------------------------------


def test_index_says_what_it_will_do_and_what_it_did(tmp_path, model, documents):
    store = tmp_path / "store"
    done = emt("index", documents, "--store", store, "--model", model)
    tokens = sum(len(text.split()) + 1 for text in TEXTS.values())
    rows = tokens - len(TEXTS)
    assert re.fullmatch(rf"3 documents, {tokens} tokens: about [\d.]+ kB and 0:00:0\d\n", done.err)
    found = re.fullmatch(
        rf"3 documents added; {tokens} tokens, {rows} rows in ([\d.]+) s \([\d,]+ tokens/s\); "
        rf"'{store}' has ([\d.]+) kB\n",
        done.out,
    )
    assert float(found[2]) == pytest.approx(bytes_used(store) / 1000, abs=0.05)


def test_a_second_index_adds_to_the_store_and_needs_no_model(tmp_path, store):
    (tmp_path / "more.txt").write_text("w70")
    done = emt("index", tmp_path / "more.txt", "--store", store)
    assert done.out.startswith("1 document added; 2 tokens, 1 row in ")
    described = json.loads(emt("info", store, "--json").out)
    assert [document["name"] for document in described["documents"]] == [*sorted(TEXTS), "more.txt"]
    assert described["index"]["num_rows"] == described["rows"]


def test_the_same_command_again_has_nothing_to_do(store, documents):
    before = json.loads(emt("info", store, "--json").out)
    done = emt("index", documents, "--store", store)
    assert re.fullmatch(
        rf"0 documents added, 3 were there already; '{store}' has [\d.]+ kB\n", done.out
    )
    after = json.loads(emt("info", store, "--json").out)
    assert (after["documents"], after["rows"]) == (before["documents"], before["rows"])


def test_what_is_new_is_added_and_what_has_changed_is_replaced(tmp_path, model, store, documents):
    (documents / "b.md").write_text("w70 w71 w72")
    (documents / "d.txt").write_text("w80 w81")
    done = emt("index", documents, "--store", store)
    assert done.out.startswith(
        "1 document added, 1 replaced, 2 were there already; 7 tokens, 5 rows in "
    )
    emt("index", documents, "--store", tmp_path / "whole", "--model", model)
    found, whole = (
        json.loads(emt("info", path, "--json").out) for path in (store, tmp_path / "whole")
    )
    assert sorted(map(str, found["documents"])) == sorted(map(str, whole["documents"]))
    assert generated(store)["token_ids"] == generated(tmp_path / "whole")["token_ids"]


def test_the_settings_of_a_store_are_kept_until_changed(tmp_path, model, documents):
    (tmp_path / "c.yaml").write_text("memory_type: vector_db\ntopk: 3\nsinks: one\npath: other\n")
    store = tmp_path / "store"
    emt("index", documents, "--store", store, "--model", model, "--config", tmp_path / "c.yaml")
    assert not (tmp_path / "other").exists()
    config = MemoryConfig(memory_type="vector_db", topk=3, sinks="one")
    kept = json.loads(emt("info", store, "--json").out)["config"]
    assert kept == {key: value for key, value in config.to_dict().items() if key != "path"}
    assert generated(store)["token_ids"] == expected_tokens(model, config)[0]
    (tmp_path / "more.txt").write_text("w70 w71")
    emt("index", tmp_path / "more.txt", "--store", store)
    assert json.loads(emt("info", store, "--json").out)["config"] == kept
    (tmp_path / "more.txt").rename(tmp_path / "again.txt")
    (tmp_path / "c.yaml").write_text("topk: 5\n")
    emt("index", tmp_path / "again.txt", "--store", store, "--config", tmp_path / "c.yaml")
    changed = json.loads(emt("info", store, "--json").out)["config"]
    assert (changed["topk"], changed["memory_type"], changed["sinks"]) == (5, "vector_db", "one")


def test_index_goes_on_in_what_a_killed_process_left(tmp_path, model, documents):
    store = tmp_path / "store"
    store.mkdir()
    (store / "write.lock").touch()
    (store / "catalog.sqlite.partial").write_bytes(b"half")
    emt("index", documents, "--store", store, "--model", model)
    assert json.loads(emt("info", store, "--json").out)["documents"][0]["name"] == "a.txt"


def test_a_progress_bar_on_a_terminal_only(tmp_path, model, documents):
    done = emt("index", documents, "--store", tmp_path / "pipe", "--model", model)
    assert "%" not in done.err
    done = emt("index", documents, "--store", tmp_path / "screen", "--model", model, terminal=True)
    assert "100%" in done.err
    assert "tok/s" in done.err
    assert done.out.count("\n") == 1


# -- generate -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ([], {}),
        (["--topk", "2"], {"topk": 2}),
        (["--topk", "auto"], {"topk": 4}),
        (
            ["--topk", "2", "--uncertainty", "0:12"],
            {"topk": 2, "uncertainty": {"entropy": 0, "topk": 12}},
        ),
        (["--no-memory"], {"enabled": False}),
        (["--no-chat"], {}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_generate_is_the_library(model, store, options, settings):
    expected, citations = expected_tokens(model, MemoryConfig(), **settings)
    found = generated(store, *options)
    assert found["token_ids"] == expected
    assert found["prompt"] == PROMPT
    assert [token["id"] for token in found["tokens"]] == expected
    assert [(c["document"], c["text"]) for c in found["citations"]] == [
        (c.document, c.text) for c in citations
    ]
    assert [c["share"] for c in found["citations"]] == pytest.approx([c.share for c in citations])
    assert set(found["timings"]) == {"open_seconds", "generate_seconds", "tokens_per_second"}


def test_generate_prints_the_text_and_its_sources(store):
    found = generated(store)
    plain = emt("generate", "--store", store, PROMPT, "--max-new-tokens", 6)
    assert (plain.out, plain.err) == (found["text"] + "\n", "")
    cited = emt("generate", "--store", store, PROMPT, "--max-new-tokens", 6, "--citations")
    lines = cited.out.splitlines()
    assert lines[:2] == [found["text"], ""]
    for rank, citation in enumerate(found["citations"]):
        where = f"{citation['document']} {citation['start']}-{citation['end']}"
        assert lines[2 + 2 * rank] == f"[{rank + 1}] {citation['share']:5.1%}  {where}"
        assert lines[3 + 2 * rank].strip() == " ".join(citation["text"].split())
    assert len(lines) == 2 + 2 * len(found["citations"])
    without = emt("generate", "--store", store, PROMPT, "--citations", "--no-memory")
    assert without.out.endswith("\n\nNo memory was used.\n")


def test_only_memory_type_changes_from_one_backend_to_the_other(tmp_path, model, documents):
    store, config = tmp_path / "store", tmp_path / "c.yaml"
    config.write_text("memory_type: manual\ntopk: 4\nindex: Flat\n")
    emt("index", documents, "--store", store, "--model", model, "--config", config)
    assert not (store / "index").exists()
    manual = generated(store)
    assert manual["token_ids"] == expected_tokens(model, MemoryConfig(topk=4))[0]
    config.write_text("memory_type: vector_db\ntopk: 4\nindex: Flat\n")
    vector_db = generated(store, "--config", config)
    assert vector_db["token_ids"] == manual["token_ids"]
    assert [c["text"] for c in vector_db["citations"]] == [c["text"] for c in manual["citations"]]


def test_a_model_that_moved_is_named_by_hand(tmp_path, documents):
    before = make_model(tmp_path / "before")
    emt("index", documents, "--store", tmp_path / "store", "--model", before)
    tokens = generated(tmp_path / "store")["token_ids"]
    after = before.rename(tmp_path / "after")
    done = emt("generate", "--store", tmp_path / "store", PROMPT, code=2)
    assert done.err.startswith(f"emt: model '{before}' cannot be loaded: ")
    assert generated(tmp_path / "store", "--model", after)["token_ids"] == tokens


# -- removing, and processes of their own --------------------------------------------------------


def test_a_removed_document_can_be_indexed_again(store, documents):
    tokens = generated(store)["token_ids"]
    emt("remove", store, "b.md")
    emt("index", documents / "b.md", "--store", store)
    assert generated(store)["token_ids"] == tokens


def test_an_emptied_store_is_the_plain_model(store):
    plain = generated(store, "--no-memory")
    emt("remove", store, *TEXTS)
    emptied = generated(store)
    assert emptied["token_ids"] == plain["token_ids"]
    assert emptied["citations"] == []


def test_index_and_generate_in_processes_of_their_own(tmp_path, model, documents):
    store = tmp_path / "store"
    indexed = emt_process("index", documents, "--store", store, "--model", model)
    assert indexed.err.count("\n") == indexed.out.count("\n") == 1
    done = emt_process(
        "generate", "--store", store, PROMPT, "--json", "--max-new-tokens", 6, "--topk", 3
    )
    expected, citations = expected_tokens(model, MemoryConfig(), topk=3)
    found = json.loads(done.out)
    assert found["token_ids"] == expected
    assert found["citations"][0]["text"] == citations[0].text
    assert (done.err, done.out.count("\n")) == ("", 1)
