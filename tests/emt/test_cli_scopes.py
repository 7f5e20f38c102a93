"""`emt index` of documents with metadata, and `emt generate` from some of them."""

import json
import shutil

import torch
import pytest

from emt import MemoryConfig, attach
from emt.corpus import Corpus
from emt.errors import CorpusError
from emt.loading import load
from memory_backends.catalog import Catalog
from tests.emt.commands import TEXTS, emt, make_model

PROMPT = "w5 w9 w33"
KNOWN = {
    "a.txt": {"year": 1999, "language": "en", "draft": False},
    "b.md": {"year": "1999", "language": "de"},
    "c": None,
}


def write_lines(path, known):
    lines = []
    for name, text in TEXTS.items():
        line = {"id": name, "text": text}
        if known[name] is not None:
            line["metadata"] = known[name]
        lines.append(json.dumps(line))
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def indexed(tmp_path_factory, model):
    folder = tmp_path_factory.mktemp("indexed")
    lines = write_lines(folder / "lines.jsonl", KNOWN)
    emt("index", lines, "--store", folder / "store", "--model", model)
    return folder / "store"


@pytest.fixture
def store(tmp_path, indexed):
    return shutil.copytree(indexed, tmp_path / "store")


def known_of(store):
    catalog = Catalog.open(store)
    found = {name: catalog.metadata(name) for name in catalog.document_names()}
    catalog.close()
    return found


def generated(store, *options):
    options = ("--json", "--max-new-tokens", 6, *options)
    return json.loads(emt("generate", "--store", store, PROMPT, *options).out)


def of_library(model, names):
    """Return what a memory of some documents alone gives."""
    loaded = load(str(model))
    config = MemoryConfig(memory_type="vector_db")
    memory = attach(loaded.model, config, tokenizer=loaded.tokenizer)
    memory.write_all([(name, TEXTS[name]) for name in names])
    ids = torch.tensor([loaded.tokenizer(PROMPT).input_ids])
    output = loaded.model.generate(ids, max_new_tokens=6, do_sample=False)
    return output[0, ids.shape[1] :].tolist()


def test_metadata_is_indexed_and_brought_up_to_date(tmp_path, store):
    expected = {name: known or {} for name, known in KNOWN.items()}
    assert known_of(store) == expected
    done = emt("index", write_lines(tmp_path / "lines.jsonl", KNOWN), "--store", store)
    assert done.out.startswith("0 documents added, 3 were there already;")
    changed = {"a.txt": {"year": 2000}, "b.md": None, "c": {"year": 7}}
    done = emt("index", write_lines(tmp_path / "lines.jsonl", changed), "--store", store)
    assert done.out.startswith("0 documents added, 3 were there already;")
    assert known_of(store) == {"a.txt": {"year": 2000}, "b.md": KNOWN["b.md"], "c": {"year": 7}}


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["--documents", "b.md"], ["b.md"]),
        (["--documents", "a.txt", "c"], ["a.txt", "c"]),
        (["--where", "language=de"], ["b.md"]),
        (["--where", "year=1999"], ["a.txt", "b.md"]),  # the number, or its text
        (["--where", "draft=false"], ["a.txt"]),
        (["--where", "language=de", "--where", "language=en"], ["a.txt", "b.md"]),
        (["--where", "year=1999", "--where", "language=en"], ["a.txt"]),
        (["--where", "year=1999", "--documents", "c", "b.md"], ["b.md"]),
        (["--where", "year=3"], []),
    ],
)
def test_generate_reads_what_is_asked_for(model, store, options, names):
    answer = generated(store, *options)
    assert answer["token_ids"] == of_library(model, names)
    assert {citation["document"] for citation in answer["citations"]} <= set(names)
    assert bool(answer["citations"]) == bool(names)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--documents", "z"], "emt: no document 'z' in this memory. `emt info` lists"),
        (["--where", "year"], "must be KEY=VALUE, such as year=1999; got 'year'"),
        (["--where", "=1"], "must be KEY=VALUE, such as year=1999; got '=1'"),
    ],
)
def test_what_cannot_be_asked_for_is_one_line(store, options, message):
    done = emt("generate", "--store", store, PROMPT, *options, code=2)
    assert done.out == ""
    assert message in done.err
    assert done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("[1]", "metadata of document 'x' must be a mapping of text .* got list"),
        ('{"a": [1]}', r"got \[1\] for 'a'. Make text of it"),
        ('{"a": null}', "got None for 'a'"),
        ('{"a": NaN}', "got nan for 'a'"),
        ('{"": 1}', "keys of the metadata .* must be text; got ''"),
    ],
)
def test_lines_with_other_metadata_are_refused(tmp_path, metadata, message):
    path = tmp_path / "lines.jsonl"
    path.write_text(f'{{"id": "x", "text": "w5", "metadata": {metadata}}}')
    with pytest.raises(CorpusError, match=rf"lines.jsonl' line 1: .*{message}"):
        Corpus([path])


def test_lines_without_metadata_say_nothing(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"id": "x", "text": "w5"}\n{"id": "y", "text": "w6", "metadata": {}}')
    assert [document.metadata for document in Corpus([path])] == [None, {}]
