"""`emt info`: what a store has, as JSON and in words."""

import contextlib

from emt.cli import printing
from memory_backends import MemoryBackend
from memory_backends.catalog import FORMAT_VERSION, Catalog
from tests.emt.cli.test_store import on_disk, set_index
from tests.emt.commands import TEXTS, emt, emt_json, refused


def test_info_describes_a_store(model, store):
    described = emt_json("info", store)
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
    assert described["row_codec"] == "float16"
    assert described["format_version"] == FORMAT_VERSION
    assert described["index"]["factory"] == "Flat"
    assert described["index"]["num_rows"] == sum(rows.values())
    per_row = 3 * 2 * 32 * 2  # layers, heads, key and value, bytes
    sizes = described["bytes"]
    assert sizes["per_row"] == per_row
    assert sizes["rows"] == on_disk(store / "rows")
    assert sizes["index"] == on_disk(store / "index")
    assert sizes["total"] == on_disk(store) > sizes["rows"] + sizes["index"]
    text = emt("info", store).out
    assert f"index      Flat over {sum(rows.values())} rows" in text
    assert f"model      {model} (llama)\n" in text
    assert f"rows       {sum(rows.values())} in each of 3 layers\n" in text
    assert f"({per_row:,} bytes a token, float16), index" in text
    assert "  a.txt  31 tokens, 30 rows\n" in text


def test_info_tells_the_codec_and_what_a_token_takes(tmp_path, model, documents):
    config, store = tmp_path / "config.yaml", tmp_path / "new"
    config.write_text("row_codec: int4\n")
    emt("index", documents, "--store", store, "--model", model, "--config", config)
    per_row = 3 * 2 * 32 // 2  # layers, heads, key and value at half a byte
    assert f"({per_row:,} bytes a token, int4), index" in emt("info", store).out
    described = emt_json("info", store)
    assert (described["row_codec"], described["bytes"]["per_row"]) == ("int4", per_row)
    files = (store / "rows").iterdir()
    exact = 8 * per_row  # until there are enough rows for the codec to learn from
    assert sum(file.stat().st_size for file in files) == described["rows"] * exact
    assert "no damage" in emt("verify", store).out


def test_info_says_what_the_index_was_measured_to_find(store):
    facts = {
        "factory": "IVF128,SQfp16",
        "num_rows": 12_345,
        "recall": 0.9534,
        "attention": 0.9712,
        "scanned": 0.0617,
    }
    set_index(store, **facts)
    index = emt_json("info", store)["index"]
    assert {key: index[key] for key in facts} == facts
    assert (
        "index      IVF128,SQfp16 over 12,345 rows, finds 95.3% of the nearest 10 rows, which get "
        "97.1% of their attention, in 6.2% of the rows\n"
    ) in emt("info", store).out


def test_info_says_which_heads_are_indexed_and_what_that_saves(store_of_all_heads):
    store = store_of_all_heads
    (folder,) = (store / "index").iterdir()
    files = sum(file.stat().st_size for file in folder.glob("*.faiss"))
    assert f"heads      all 6 heads, FAISS files {printing.size(files)}\n" in emt("info", store).out
    index = emt_json("info", store)["index"]
    assert index["heads"] == {"0": [0, 1], "1": [0, 1], "2": [0, 1]}
    assert (index["file_bytes"], index["saved_bytes_estimate"]) == (files, 0)
    one = files // 6  # all heads have equally many keys of the same size
    for heads, named in (
        ({1: [0], 2: [1]}, "2 of 6 heads (1.0, 2.1)"),
        ({0: [1], 2: [0, 1]}, "3 of 6 heads (0.1, 2.0-1)"),
    ):
        handle = MemoryBackend.open(store, "vector_db", indexed_heads=heads)
        with contextlib.closing(handle) as backend:
            backend.rebuild()
        indexed = sum(map(len, heads.values()))
        index = emt_json("info", store)["index"]
        assert index["heads"] == {str(layer_idx): each for layer_idx, each in heads.items()}
        assert (index["num_heads"], index["all_heads"]) == (indexed, 6)
        assert index["file_bytes"] == indexed * one
        assert index["saved_bytes_estimate"] == (6 - indexed) * one
        there, saved = printing.size(indexed * one), printing.size((6 - indexed) * one)
        assert (
            f"heads      {named}, FAISS files {there}: about {saved} less than all heads, "
            "estimated from these files\n"
        ) in emt("info", store).out
        emt("rebuild", store)
        assert emt_json("info", store)["index"]["heads"] == index["heads"]
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
        file = next(iter(catalog.setting("index")["files"].values()))
    files = {f"layer-{layer_idx:03d}-head-001.faiss": file for layer_idx in range(11)}
    set_index(store, heads=heads, files=files)
    said = emt("info", store).out
    named = ", ".join(f"{layer_idx}.1" for layer_idx in range(8))
    assert f"heads      11 of 24 heads ({named} and those of 3 layers more)" in said


def test_info_of_a_damaged_record_of_heads_says_what_to_do(store):
    set_index(store, heads={"0": [2]})
    refused("info", store, message="the record of the index is damaged: .* Run `emt rebuild`")
