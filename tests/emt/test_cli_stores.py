"""The subcommands that need no model: info, remove, verify, compact, rebuild."""

import contextlib
import json
import shutil
import subprocess

import torch
import pytest

import memory_backends
from emt import MemoryConfig, attach
from emt.cli import printing
from emt.loading import load
from memory_backends import MemoryBackend, StoreError
from memory_backends.catalog import FORMAT_VERSION, Catalog
from tests.emt.commands import TEXTS, emt, make_documents, make_model

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


def on_disk(folder):
    """Return what `du` says of a folder's files, in bytes."""
    files = [str(path) for path in folder.rglob("*") if path.is_file()]
    done = subprocess.run(["du", "-B1", *files], capture_output=True, text=True, check=True)
    return sum(int(line.split()[0]) for line in done.stdout.splitlines())


def set_index(store, **facts):
    with contextlib.closing(Catalog.open(store)) as catalog:
        catalog.set_setting("index", {**catalog.setting("index"), **facts})


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
    assert described["row_codec"] == "exact"
    assert described["format_version"] == FORMAT_VERSION
    assert described["index"]["factory"] == "Flat"
    assert described["index"]["num_rows"] == sum(rows.values())
    per_row = 3 * 2 * 32 * 4  # layers, heads, key and value, bytes
    sizes = described["bytes"]
    assert sizes["per_row"] == per_row
    assert sizes["rows"] == on_disk(store / "rows")
    assert sizes["index"] == on_disk(store / "index")
    assert sizes["total"] == on_disk(store) > sizes["rows"] + sizes["index"]
    text = emt("info", store).out
    assert f"index      Flat over {sum(rows.values())} rows" in text
    assert f"model      {model} (llama)\n" in text
    assert f"rows       {sum(rows.values())} in each of 3 layers\n" in text
    assert f"({per_row:,} bytes a token, exact), index" in text
    assert "  a.txt  31 tokens, 30 rows\n" in text


def test_info_tells_the_codec_and_what_a_token_takes(tmp_path, model):
    config = tmp_path / "config.yaml"
    MemoryConfig(memory_type="vector_db", row_codec="int4").to_yaml(config)
    documents, store = make_documents(tmp_path / "documents"), tmp_path / "store"
    emt("index", documents, "--store", store, "--model", model, "--config", config)
    per_row = 3 * 2 * 32 // 2  # layers, heads, key and value at half a byte
    assert f"({per_row:,} bytes a token, int4), index" in emt("info", store).out
    described = json.loads(emt("info", store, "--json").out)
    assert (described["row_codec"], described["bytes"]["per_row"]) == ("int4", per_row)
    files = (store / "rows").iterdir()
    assert sum(file.stat().st_size for file in files) == described["rows"] * per_row
    assert "no damage" in emt("verify", store).out


def test_remove_keeps_everything_else(model, store):
    before = json.loads(emt("info", store, "--json").out)
    done = emt("remove", store, "b.md", "b.md")
    assert done.out == (
        f"removed 1 document, 20 rows, from '{store}'; `emt compact` gives back their space\n"
    )
    after = json.loads(emt("info", store, "--json").out)
    assert after["documents"] == [d for d in before["documents"] if d["name"] != "b.md"]
    assert after["rows"] == before["rows"] - 20
    assert (after["config"], after["model"]) == (before["config"], before["model"])
    found = json.loads(
        emt("generate", "--store", store, PROMPT, "--json", "--max-new-tokens", 6).out
    )
    assert "b.md" not in json.dumps(found)
    loaded = load(str(model))
    memory = attach(loaded.model, tokenizer=loaded.tokenizer)
    memory.write_all((name, text) for name, text in sorted(TEXTS.items()) if name != "b.md")
    ids = torch.tensor([loaded.tokenizer(PROMPT).input_ids])
    expected = loaded.model.generate(ids, max_new_tokens=6, do_sample=False)
    assert found["token_ids"] == expected[0, ids.shape[1] :].tolist()


def test_info_says_what_the_index_was_measured_to_find(store):
    facts = {
        "factory": "IVF128,SQfp16",
        "num_rows": 12_345,
        "recall": 0.9534,
        "attention": 0.9712,
        "scanned": 0.0617,
    }
    set_index(store, **facts)
    index = json.loads(emt("info", store, "--json").out)["index"]
    assert {key: index[key] for key in facts} == facts
    assert (
        "index      IVF128,SQfp16 over 12,345 rows, finds 95.3% of the nearest 10 rows, which get "
        "97.1% of their attention, in 6.2% of the rows\n"
    ) in emt("info", store).out


def test_info_says_which_heads_are_indexed_and_what_that_saves(store):
    (folder,) = (store / "index").iterdir()
    files = sum(file.stat().st_size for file in folder.glob("*.faiss"))
    assert f"heads      all 6 heads, FAISS files {printing.size(files)}\n" in emt("info", store).out
    found = json.loads(emt("info", store, "--json").out)["index"]
    assert found["heads"] == {"0": [0, 1], "1": [0, 1], "2": [0, 1]}
    assert (found["file_bytes"], found["saved_bytes_estimate"]) == (files, 0)
    one = files // 6  # all heads have equally many keys of the same size
    for heads, named in (
        ({1: [0], 2: [1]}, "2 of 6 heads (1.0, 2.1)"),
        ({0: [1], 2: [0, 1]}, "3 of 6 heads (0.1, 2.0-1)"),
    ):
        with contextlib.closing(
            MemoryBackend.open(store, "vector_db", indexed_heads=heads)
        ) as backend:
            backend.rebuild()
        indexed = sum(map(len, heads.values()))
        found = json.loads(emt("info", store, "--json").out)["index"]
        assert found["heads"] == {str(layer_idx): each for layer_idx, each in heads.items()}
        assert (found["num_heads"], found["all_heads"]) == (indexed, 6)
        assert found["file_bytes"] == indexed * one
        assert found["saved_bytes_estimate"] == (6 - indexed) * one
        there, saved = printing.size(indexed * one), printing.size((6 - indexed) * one)
        assert (
            f"heads      {named}, FAISS files {there}: about {saved} less than all heads, "
            "estimated from these files\n"
        ) in emt("info", store).out
        emt("rebuild", store)
        assert json.loads(emt("info", store, "--json").out)["index"]["heads"] == found["heads"]
    with contextlib.closing(MemoryBackend.open(store, "vector_db", indexed_heads={})) as backend:
        backend.rebuild()
    assert "heads      0 of 6 heads\n" in emt("info", store).out


def test_info_names_the_heads_of_a_few_layers_only(store):
    heads = {str(layer_idx): [1] for layer_idx in range(11)}
    with contextlib.closing(Catalog.open(store)) as catalog:
        layout = catalog.layout.to_json()
        anywhere = next(iter(layout["layers"].values()))
        layout["layers"] = {str(layer_idx): anywhere for layer_idx in range(12)}
        catalog.set_setting("layout", layout)
    nothing = {"size": 0, "crc32": 0}
    set_index(
        store, heads=heads, files={f"layer-{n:03d}-head-001.faiss": nothing for n in range(11)}
    )
    said = emt("info", store).out
    named = ", ".join(f"{layer_idx}.1" for layer_idx in range(8))
    assert f"heads      11 of 24 heads ({named} and those of 3 layers more)\n" in said


def test_info_of_a_damaged_record_of_heads_says_what_to_do(store):
    set_index(store, heads={"0": [2]})
    done = emt("info", store, code=2)
    assert done.err.startswith("emt: the record of the index is damaged: ")
    assert "Run `emt rebuild`" in done.err


# -- verify -------------------------------------------------------------------------------------


class Damage:
    """What the library says of a damaged file."""

    def __init__(self, file, reason):
        self.file, self.reason = file, reason


def test_verify_names_what_is_damaged_and_ends_with_1(store, monkeypatch):
    found = [Damage("rows/layer-001.bin", "bad rows 3 to 9"), Damage("catalog.sqlite", "bad page")]
    monkeypatch.setattr(memory_backends, "verify", lambda path: found, raising=False)
    done = emt("verify", store, code=1)
    assert done.out == "rows/layer-001.bin: bad rows 3 to 9\ncatalog.sqlite: bad page\n"
    assert done.err == f"emt: 2 files of '{store}' are damaged.\n"
    done = emt("verify", store, "--json", code=1)
    assert json.loads(done.out) == {
        "store": str(store),
        "damaged": [
            {"file": "rows/layer-001.bin", "reason": "bad rows 3 to 9"},
            {"file": "catalog.sqlite", "reason": "bad page"},
        ],
    }
    assert done.err == ""
    found[:] = found[:1] * 2
    assert emt("verify", store, code=1).err == f"emt: 1 file of '{store}' is damaged.\n"


def test_verify_of_a_whole_store_ends_with_0(store, monkeypatch):
    monkeypatch.setattr(memory_backends, "verify", lambda path: [], raising=False)
    done = emt("verify", store)
    assert done.out == f"no damage in the {printing.size(on_disk(store))} of '{store}'\n"
    assert json.loads(emt("verify", store, "--json").out)["damaged"] == []


@pytest.mark.parametrize(
    "pattern",
    [
        "catalog.sqlite",
        "rows/**/*",
        "index/**/*.faiss",
        "index/**/ids.bin",
    ],
)
def test_verify_finds_a_flipped_byte(store, pattern):
    assert emt("verify", store).out.startswith("no damage in the ")
    file = next(path for path in sorted(store.glob(pattern)) if path.is_file())
    data = bytearray(file.read_bytes())
    text = TEXTS["a.txt"][20:40].encode()  # half of the catalogue is nobody's
    data[data.find(text) if text in data else len(data) // 2] ^= 0x40
    file.write_bytes(data)
    done = emt("verify", store, code=1)
    named = [line.split(": ")[0] for line in done.out.splitlines()]
    assert any(name.endswith(file.relative_to(store).as_posix()) for name in named), done


# -- compact, rebuild ---------------------------------------------------------------------------


def test_compact_says_what_it_gave_back(store, monkeypatch):
    monkeypatch.setattr(MemoryBackend, "compact", lambda self: 2_345_678, raising=False)
    done = emt("compact", store)
    size = printing.size(on_disk(store))
    assert done.out == f"gave back 2.3 MB; '{store}' has {size}\n"


@pytest.mark.parametrize(
    ("facts", "heads"),
    [
        ({"heads": {"2": [0, 1]}}, {2: (0, 1)}),
        ({"heads": {"0": [1], "2": [0, 1]}}, {0: (1,), 2: (0, 1)}),
        ({"heads": {"7": [0]}}, {0: (0, 1), 1: (0, 1), 2: (0, 1)}),  # damaged: the model has three
        ({"heads": {"1": [2]}}, {0: (0, 1), 1: (0, 1), 2: (0, 1)}),
    ],
)
def test_rebuild_keeps_the_heads_and_the_settings_of_the_index(store, monkeypatch, facts, heads):
    with contextlib.closing(Catalog.open(store)) as catalog:
        config = {**catalog.setting("config"), "index": "SQ8", "sinks": "one"}
        catalog.set_setting("config", config)
    set_index(store, **facts)
    seen = {}

    def fake(self):
        search = self.searcher
        seen.update(index=search.options.index, heads=search._indexed_heads, sinks=self.sinks)
        set_index(store, factory="SQ8", num_rows=87)

    monkeypatch.setattr(MemoryBackend, "rebuild", fake, raising=False)
    size = printing.size(on_disk(store / "index"))
    assert emt("rebuild", store).out == f"rebuilt SQ8 over 87 rows; the index has {size}\n"
    assert seen == {"index": "SQ8", "heads": heads, "sinks": "one"}


def test_removing_and_compacting_gives_space_back_and_changes_no_answer(tmp_path, model):
    documents = make_documents(tmp_path / "documents")
    store = tmp_path / "store"
    (documents / "long.txt").write_text(" ".join(f"w{3 + i * i % 90}" for i in range(3000)))
    emt("index", documents, "--store", store, "--model", model)
    emt("remove", store, "long.txt")
    answer = emt("generate", "--store", store, PROMPT).out
    before = on_disk(store)
    done = emt("compact", store)
    rows = 3 * 2 * 32 * 4 * 3000  # layers, heads, key and value, bytes, rows
    assert before - on_disk(store) > rows
    assert done.out.startswith("gave back ")
    assert emt("verify", store).out.startswith("no damage in the ")
    assert emt("generate", "--store", store, PROMPT).out == answer


def test_rebuild_mends_damaged_faiss_files(store):
    answer = emt("generate", "--store", store, PROMPT).out
    for path in store.glob("index/*/*.faiss"):
        path.write_bytes(path.read_bytes()[:-100])
    emt("verify", store, code=1)
    emt("rebuild", store)
    assert emt("verify", store).out.startswith("no damage in the ")
    assert emt("generate", "--store", store, PROMPT).out == answer


def test_an_error_of_the_library_is_one_line(store, monkeypatch):
    def fail(path):
        raise StoreError(f"another process is writing to '{path}'.")

    monkeypatch.setattr(memory_backends, "verify", fail)
    done = emt("verify", store, code=2)
    assert (done.out, done.err) == ("", f"emt: another process is writing to '{store}'.\n")


# -- numbers in words ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (2_345_678, "2.3 MB"), (5e15, "5000.0 TB")],
)
def test_sizes(num_bytes, text):
    assert printing.size(num_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0:00:00"), (59.6, "0:01:00"), (3723, "1:02:03"), (9e5, "250:00:00")],
)
def test_durations(seconds, text):
    assert printing.duration(seconds) == text
