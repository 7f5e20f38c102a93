"""The `emt` command, in this process; `test_cli_errors.py` has what it refuses."""

import json
import re

import pytest
import torch

from emt import MemoryConfig, attach, cli
from emt.citations import cite, content_layers
from emt.loading import load
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
        rf"3 documents, {tokens} tokens, {rows} rows in ([\d.]+) s \([\d,]+ tokens/s\); "
        rf"'{store}' has ([\d.]+) kB\n",
        done.out,
    )
    size = sum(path.stat().st_size for path in store.rglob("*") if path.is_file())
    assert float(found[2]) == pytest.approx(size / 1000, abs=0.05)


def test_a_second_index_adds_to_the_store_and_needs_no_model(tmp_path, store):
    (tmp_path / "more.txt").write_text("w70")
    done = emt("index", tmp_path / "more.txt", "--store", store)
    assert done.out.startswith("1 document, 2 tokens, 1 row in ")
    described = json.loads(emt("info", store, "--json").out)
    assert [document["name"] for document in described["documents"]] == [*sorted(TEXTS), "more.txt"]
    assert described["index"]["num_rows"] == described["rows"]


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


# -- info and remove ----------------------------------------------------------------------------


def test_info_describes_a_store(model, store):
    described = json.loads(emt("info", store, "--json").out)
    rows = {name: len(text.split()) for name, text in TEXTS.items()}
    assert described["store"] == str(store)
    assert described["model"]["source"] == str(model)
    assert described["model"]["model_type"] == "llama"
    assert described["documents"] == [
        {"name": name, "tokens": rows[name] + 1, "rows": rows[name]} for name in sorted(rows)
    ]
    assert described["tokens"] == sum(rows.values()) + 3
    assert described["rows"] == sum(rows.values())
    assert described["layers"] == 3
    assert described["index"] == {"factory": "Flat", "num_rows": sum(rows.values())}
    per_row = 3 * 2 * 32 * 4  # layers, heads, key and value, bytes
    sizes = described["bytes"]
    assert sizes["per_row"] == per_row
    assert sizes["rows"] == per_row * sum(rows.values())
    assert sizes["rows"] + sizes["index"] < sizes["total"]
    text = emt("info", store).out
    assert f"model      {model} (llama)\n" in text
    assert f"rows       {sum(rows.values())} in each of 3 layers\n" in text
    assert "  a.txt  31 tokens, 30 rows\n" in text


def test_remove_keeps_everything_else(model, store):
    before = json.loads(emt("info", store, "--json").out)
    done = emt("remove", store, "b.md", "b.md")
    assert done.out == f"removed 1 document, 20 rows, from '{store}'\n"
    after = json.loads(emt("info", store, "--json").out)
    assert after["documents"] == [d for d in before["documents"] if d["name"] != "b.md"]
    assert after["rows"] == before["rows"] - 20
    assert (after["config"], after["model"]) == (before["config"], before["model"])
    found = generated(store)
    assert "b.md" not in json.dumps(found)
    loaded = load(str(model))
    memory = attach(loaded.model, tokenizer=loaded.tokenizer)
    memory.write_all((name, text) for name, text in sorted(TEXTS.items()) if name != "b.md")
    ids = torch.tensor([loaded.tokenizer(PROMPT).input_ids])
    expected = loaded.model.generate(ids, max_new_tokens=6, do_sample=False)
    assert found["token_ids"] == expected[0, ids.shape[1] :].tolist()


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


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (2_345_678, "2.3 MB"), (5e15, "5000.0 TB")],
)
def test_sizes(num_bytes, text):
    assert cli._size(num_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0:00:00"), (59.6, "0:01:00"), (3723, "1:02:03"), (9e5, "250:00:00")],
)
def test_durations(seconds, text):
    assert cli._duration(seconds) == text
