"""`emt remove`, `verify`, `compact` and `rebuild`, which need no model."""

import contextlib
import json
import re
import subprocess
from types import SimpleNamespace

import pytest

import memory_backends
from emt.cli import printing
from memory_backends import MemoryBackend, StoreError
from memory_backends.catalog import Catalog
from tests.emt.cli.test_generate import PROMPT, generated, of_library
from tests.emt.commands import TEXTS, contents, emt, emt_json, refused


def on_disk(folder):
    """Return what `du` says of a folder's files, in bytes."""
    files = [str(path) for path in folder.rglob("*") if path.is_file()]
    done = subprocess.run(["du", "-B1", *files], capture_output=True, text=True, check=True)
    return sum(int(line.split()[0]) for line in done.stdout.splitlines())


def set_index(store, **facts):
    with contextlib.closing(Catalog.open(store)) as catalog:
        catalog.set_setting("index", {**catalog.setting("index"), **facts})


def test_remove_keeps_everything_else(tmp_path, model, store):
    before = emt_json("info", store)
    done = emt("remove", store, "b.md", "b.md")
    assert done.out == (
        f"removed 1 document, 20 rows, from '{store}'; `emt compact` gives back their space\n"
    )
    after = emt_json("info", store)
    assert after["documents"] == [d for d in before["documents"] if d["name"] != "b.md"]
    assert after["rows"] == before["rows"] - 20
    assert (after["config"], after["model"]) == (before["config"], before["model"])
    answer = generated(store)
    assert "b.md" not in json.dumps(answer)
    expected, _ = of_library(model, tmp_path, set(TEXTS) - {"b.md"})
    assert answer["token_ids"] == expected


def test_removing_what_is_not_there_removes_nothing(store):
    before = contents(store)
    refused("remove", store, "a.txt", "z", message="'z' in '.*store'; nothing was removed")
    assert contents(store) == before


def test_an_emptied_store_is_the_plain_model(store):
    plain = generated(store, "--no-memory")
    emt("remove", store, *TEXTS)
    emptied = generated(store)
    assert emptied["token_ids"] == plain["token_ids"]
    assert emptied["citations"] == []


# -- verify -------------------------------------------------------------------------------------


def test_verify_names_what_is_damaged_and_ends_with_1(store, monkeypatch):
    damaged = [
        SimpleNamespace(file="rows/layer-001.bin", reason="bad rows 3 to 9"),
        SimpleNamespace(file="catalog.sqlite", reason="bad page"),
    ]
    monkeypatch.setattr(memory_backends, "verify", lambda path: damaged)
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
    damaged[:] = damaged[:1] * 2
    assert emt("verify", store, code=1).err == f"emt: 1 file of '{store}' is damaged.\n"


def test_verify_of_a_whole_store_ends_with_0(store):
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


# -- compact and rebuild -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "heads"),
    [
        ({"heads": {"2": [0, 1]}}, {2: (0, 1)}),
        ({"heads": {"0": [1], "2": [0, 1]}}, {0: (1,), 2: (0, 1)}),
        ({"heads": {"7": [0]}}, {0: (0, 1), 1: (0, 1), 2: (0, 1)}),  # damaged: three layers
        ({"heads": {"1": [2]}}, {0: (0, 1), 1: (0, 1), 2: (0, 1)}),
    ],
)
def test_rebuild_keeps_the_heads_and_the_settings_of_the_index(
    store_of_all_heads, monkeypatch, facts, heads
):
    store = store_of_all_heads
    with contextlib.closing(Catalog.open(store)) as catalog:
        config = {**catalog.setting("config"), "index": "SQ8", "sinks": "all"}
        catalog.set_setting("config", config)
    set_index(store, **facts)
    seen = {}

    def fake(self):
        seen.update(index=self.searcher.options.index, sinks=self.sinks)
        seen["heads"] = self.searcher._indexed_heads
        set_index(store, factory="SQ8", num_rows=87)

    monkeypatch.setattr(MemoryBackend, "rebuild", fake)
    size = printing.size(on_disk(store / "index"))
    assert emt("rebuild", store).out == f"rebuilt SQ8 over 87 rows; the index has {size}\n"
    assert seen == {"index": "SQ8", "heads": heads, "sinks": "all"}


def test_removing_and_compacting_gives_space_back_and_changes_no_answer(tmp_path, model, documents):
    store = tmp_path / "new"
    (documents / "long.txt").write_text(" ".join(f"w{3 + i * i % 90}" for i in range(1000)))
    emt("index", documents, "--store", store, "--model", model)
    emt("remove", store, "long.txt")
    answer = emt("generate", "--store", store, PROMPT).out
    before = on_disk(store)
    done = emt("compact", store)
    rows = 3 * 2 * 32 * 2 * 1000  # layers, heads, key and value, bytes, rows
    assert before - on_disk(store) > rows
    size = printing.size(on_disk(store))
    assert re.fullmatch(rf"gave back [\d.]+ [kM]B; '{store}' has {size}\n", done.out)
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
    refused("verify", store, message=f"another process is writing to '{store}'.")
