"""`emt generate`: the library's answer from a store, whole or from some documents, and refusals."""

import json

import torch
import pytest

from emt import MemoryConfig, attach
from emt.model.loading import load
from tests.emt.commands import TEXTS, emt, emt_json, make_model, refused

PROMPT = "w5 w9 w33"
METADATA = {
    "a.txt": {"year": 1999, "language": "en", "draft": False},
    "b.md": {"year": "1999", "language": "de"},
    "c": None,
}


def of_library(model, config, names=TEXTS, **settings):
    """Return what the library generates from some of the documents, and its recording."""
    loaded = load(str(model))
    memory = attach(loaded.model, config, tokenizer=loaded.tokenizer)
    memory.write_all([(name, TEXTS[name]) for name in sorted(names)])
    ids = torch.tensor([loaded.tokenizer(PROMPT).input_ids])
    with memory.using(**settings), memory.recording() as recording:
        output = loaded.model.generate(ids, max_new_tokens=6, do_sample=False)
    return output[0, ids.shape[1] :].tolist(), recording


def generated(store, *options):
    return emt_json("generate", "--store", store, PROMPT, "--max-new-tokens", 6, *options)


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
def test_the_answer_is_the_librarys(model, store, options, settings):
    expected, recording = of_library(model, MemoryConfig(), **settings)
    answer = generated(store, *options)
    assert answer["token_ids"] == expected
    assert answer["prompt"] == PROMPT
    assert [token["id"] for token in answer["tokens"]] == expected
    citations = recording.citations()
    assert [c["text"] for c in answer["citations"]] == [c.text for c in citations]
    assert [c["share"] for c in answer["citations"]] == pytest.approx([c.share for c in citations])
    assert set(answer["timings"]) == {"open_seconds", "generate_seconds", "tokens_per_second"}


def test_the_text_and_its_sources_are_printed(store):
    answer = generated(store)
    plain = emt("generate", "--store", store, PROMPT, "--max-new-tokens", 6)
    assert (plain.out, plain.err) == (answer["text"] + "\n", "")
    cited = emt("generate", "--store", store, PROMPT, "--max-new-tokens", 6, "--citations")
    lines = [answer["text"], ""]
    for rank, citation in enumerate(answer["citations"], start=1):
        where = f"{citation['document']} {citation['start']}-{citation['end']}"
        lines.append(f"[{rank}] {citation['share']:5.1%}  {where}")
        lines.append(f"      {' '.join(citation['text'].split())}")
    assert cited.out.splitlines() == lines
    without = emt("generate", "--store", store, PROMPT, "--citations", "--no-memory")
    assert without.out.endswith("\n\nNo memory was used.\n")


def test_only_memory_type_changes_from_one_backend_to_the_other(tmp_path, model, documents):
    store, config = tmp_path / "new", tmp_path / "c.yaml"
    config.write_text("memory_type: manual\ntopk: 4\nindex: Flat\n")
    emt("index", documents, "--store", store, "--model", model, "--config", config)
    assert not (store / "index").exists()
    manual = generated(store)
    assert manual["token_ids"] == of_library(model, MemoryConfig(topk=4))[0]
    config.write_text("memory_type: vector_db\ntopk: 4\nindex: Flat\n")
    vector_db = generated(store, "--config", config)
    assert vector_db["token_ids"] == manual["token_ids"]
    assert [c["text"] for c in vector_db["citations"]] == [c["text"] for c in manual["citations"]]


def test_a_model_that_moved_is_named_by_hand(tmp_path, documents):
    before, store = make_model(tmp_path / "before"), tmp_path / "new"
    emt("index", documents, "--store", store, "--model", before)
    tokens = generated(store)["token_ids"]
    after = before.rename(tmp_path / "after")
    refused("generate", "--store", store, PROMPT, message=f"model '{before}' cannot be loaded: ")
    assert generated(store, "--model", after)["token_ids"] == tokens


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([""], "prompt is empty"),
        (["w5 \udce9"], "prompt is not UTF-8"),
        (["w5", "--chat"], "no chat template.* --no-chat"),
        (["w5", "--max-new-tokens", "5000"], "2 tokens and 5000 new ones .* 4096"),
        (["w5", "--documents", "z"], "no document 'z'"),
    ],
)
def test_prompts_that_cannot_be_answered(store, arguments, message):
    refused("generate", "--store", store, *arguments, message=message)


# -- from some documents --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scoped(tmp_path_factory, model):
    """A store of documents with metadata."""
    folder = tmp_path_factory.mktemp("scoped")
    lines = [
        json.dumps(
            {"id": name, "text": text} | ({"metadata": METADATA[name]} if METADATA[name] else {})
        )
        for name, text in TEXTS.items()
    ]
    (folder / "lines.jsonl").write_text("\n".join(lines))
    emt("index", folder / "lines.jsonl", "--store", folder / "store", "--model", model)
    return folder / "store"


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ("--documents b.md", ["b.md"]),
        ("--documents a.txt c", ["a.txt", "c"]),
        ("--where language=de", ["b.md"]),
        ("--where year=1999", ["a.txt", "b.md"]),  # the number, or its text
        ("--where draft=false", ["a.txt"]),
        ("--where language=de --where language=en", ["a.txt", "b.md"]),
        ("--where year=1999 --where language=en", ["a.txt"]),
        ("--where year=1999 --documents c b.md", ["b.md"]),
        ("--where year=3", []),
    ],
)
def test_only_what_is_asked_for_is_read(model, scoped, options, names):
    answer = generated(scoped, *options.split())
    config = MemoryConfig(memory_type="vector_db")
    assert answer["token_ids"] == of_library(model, config, names)[0]
    assert {citation["document"] for citation in answer["citations"]} <= set(names)
    assert bool(answer["citations"]) == bool(names)


# -- damaged stores -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("catalog.sqlite", "'.*store' has no catalog.sqlite"),
        ("rows/layer-001.bin", "'.*layer-001.bin' is missing; expected at least "),
        ("index/*/layer-001-head-001.faiss", "'.*faiss' is missing; .* Run `emt rebuild`"),
    ],
)
def test_missing_files_are_named(store, pattern, message):
    (path,) = store.glob(pattern)
    path.unlink()
    refused("generate", "--store", store, PROMPT, message=message)
