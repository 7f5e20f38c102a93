"""`emt profile`, head profiles in `index` and `info`, and passages in `generate`."""

import contextlib
import json
import logging
import re
import shutil

import torch
import pytest

from emt import HeadProfile, MemoryConfig, attach, detach
from emt.errors import ConfigError, MemoryUseError
from emt.memory import modes as passage_mode
from emt.model.loading import load
from emt.profiles.examples import make_examples, read_examples
from emt.profiles.stored_text import stored_texts
from emt.routing.head_profile import ProfiledHead
from emt.routing.router import Router
from memory_backends.catalog import Catalog
from tests.emt.bytes import BYTES_VOCAB_SIZE, byte_tokenizer
from tests.emt.commands import emt
from tests.emt.commands import make_model as make_word_model
from tests.families import build

PEOPLE = ["Anselm", "Beatrix", "Caspar", "Dorothea", "Emmerich", "Friederike"]
TEXTS = {
    f"{number}.txt": "\n".join(
        f"The {thing} near the old river {verb} by {person}{number} before the long winter."
        for person, thing, verb in zip(
            PEOPLE,
            ["bridge", "castle", "garden", "chapel", "tavern", "harbour"],
            ["was measured", "was painted", "got restored", "was visited", "got sold", "was drawn"],
            strict=True,
        )
    )
    for number in (11, 12, 13)
}
PROMPT = "Who restored the garden?"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    build("llama", vocab_size=BYTES_VOCAB_SIZE).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documents")
    for name, text in TEXTS.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def indexed(tmp_path_factory, model, documents):
    """Return a small store without a profile, which tests copy."""
    store = tmp_path_factory.mktemp("indexed") / "store"
    emt("index", documents, "--store", store, "--model", model)
    return store


@pytest.fixture
def store(tmp_path, indexed):
    return shutil.copytree(indexed, tmp_path / "store")


@pytest.fixture
def all_is_relevant(monkeypatch):
    """Let no prompt be refused: what a model of random weights finds means nothing."""
    monkeypatch.setattr(Router, "measure_relevance", lambda self, backend: None)


@pytest.fixture
def data(tmp_path):
    rows = [
        {"context": text, "question": f"Who restored the garden of {name}?", "answer": answer}
        for name, text in TEXTS.items()
        for answer in re.findall(r"by (\w+)", text)
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def by_hand(model, examples):
    loaded = load(str(model))
    memory = attach(loaded.model, tokenizer=loaded.tokenizer)
    return memory.rank_heads(examples, name=model.name)


def described(store):
    return json.loads(emt("info", store, "--json").out)


# -- profile ------------------------------------------------------------------------------------


def test_a_profile_of_questions_is_the_librarys(tmp_path, model, data):
    done = emt("profile", "--model", model, "--data", data, "--output", tmp_path / "p.json")
    expected = by_hand(model, read_examples(data))
    found = HeadProfile.read(tmp_path / "p.json")
    assert found.heads == tuple(
        ProfiledHead(head.layer, head.head, round(head.hit_rate, 4))
        for head in expected.profile.heads
    )
    torch.testing.assert_close(found.means, expected.profile.means, atol=6e-5, rtol=0)
    assert (found.model, found.source) == (model.name, "questions.jsonl")
    assert found.weights == expected.profile.weights
    lines = done.out.splitlines()
    ranking = [
        f"{'*' if (layer, head) in {(h.layer, h.head) for h in found.heads} else ' '} "
        f"layer {layer:2d}, head {head:2d}  {rate:6.1%}"
        for (layer, head), rate in expected.hit_rates.items()
    ]
    assert len(ranking) == 12  # 3 layers of 4 heads
    assert lines[:-2] == ranking
    assert lines[-2] == (
        f"{len(found.heads)} heads together find the passage of {expected.hit_rate:.1%} of "
        f"18 questions in {expected.num_rows:,} rows; "
        f"two halves of the questions agree on {expected.agreement:.0%} of the heads"
    )
    assert lines[-1] == f"written to '{tmp_path / 'p.json'}'"
    assert done.err == ""


def test_what_is_being_done_is_told_on_a_terminal_only(tmp_path, model, data):
    out = ("--output", tmp_path / "p.json")
    done = emt("profile", "--model", model, "--data", data, *out, terminal=True)
    assert "reading text 3" in done.err
    assert "layer 2" in done.err


def test_a_store_keeps_a_profile_made_from_its_own_text(store, model):
    done = emt("profile", "--store", store)
    assert done.out.endswith(f"kept in '{store}'\n")
    expected = by_hand(model, make_examples(TEXTS[name] for name in sorted(TEXTS)))
    assert expected.num_questions == 18
    found = described(store)["profile"]
    assert found["kept"]
    assert (found["model"], found["source"]) == (model.name, "stored text")
    assert {(h["layer"], h["head"]) for h in found["heads"]} == {
        (h.layer, h.head) for h in expected.profile.heads
    }
    heads = ", ".join(f"{h['layer']}.{h['head']}" for h in found["heads"])
    assert (
        f"\nprofile    {len(found['heads'])} query heads ({heads}) of {model.name}, from stored "
        "text\n" in emt("info", store).out
    )


def test_a_store_and_a_file_may_have_different_profiles(tmp_path, store, data):
    emt("profile", "--store", store, "--data", data, "--output", tmp_path / "p.json")
    assert HeadProfile.read(tmp_path / "p.json").source == "questions.jsonl"
    assert described(store)["profile"] is None
    assert "\nprofile    none (`emt profile` makes one)\n" in emt("info", store).out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], r"emt: a head profile needs questions about texts\. Name --data FILE, .*--store DIR"),
        (["--data", "q.json"], r"emt: the head profile has no place\. Name --output FILE"),
        (
            ["--data", "q.json", "--output", "p"],
            r"emt: questions 'q.json' cannot be read",
        ),
        (["--store", "nowhere"], r"emt: expected a store at 'nowhere'; there is none"),
    ],
)
def test_what_profile_refuses(options, message):
    done = emt("profile", *options, code=2)
    assert done.out == ""
    assert re.match(message, done.err), done.err
    assert done.err.count("\n") == 1


def test_a_damaged_profile_is_named_by_info(store):
    with contextlib.closing(Catalog.open(store)) as catalog:
        catalog.set_setting("head_profile", {"version": 9})
    assert "version 1; got 9" in described(store)["profile"]["error"]
    assert "\nprofile    cannot be read: expected a head profile of" in emt("info", store).out


# -- index --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("all_is_relevant")
def test_a_large_store_gets_a_profile_and_indexes_of_its_heads_only(
    tmp_path, model, documents, monkeypatch
):
    monkeypatch.setattr(passage_mode, "LARGE", 100)
    done = emt("index", documents, "--store", tmp_path / "store", "--model", model)
    said = done.err.splitlines()[1:]
    assert said[0] == (
        "emt: no head profile of this model: one is made from the text that was read"
    )
    assert re.match(r"emt: head profile: \d heads together find the passage of", said[1])
    assert len(said) == 2
    found = described(tmp_path / "store")
    searched = {(h["layer"], h["head"] // 2) for h in found["profile"]["heads"]}
    assert found["index"]["heads"] == {
        str(layer): sorted(head for at, head in searched if at == layer)
        for layer in sorted({layer for layer, _ in searched})
    }
    files = {path.name for path in (tmp_path / "store" / "index").rglob("*.faiss")}
    assert len(files) == len(searched)
    again = emt("index", documents, "--store", tmp_path / "store")
    assert "head profile" not in again.err
    options = ("--store", tmp_path / "store", "--json", "--max-new-tokens", 3)
    answer = json.loads(emt("generate", PROMPT, *options).out)
    assert answer["passages"]
    token = json.loads(emt("generate", PROMPT, *options, "--mode", "token").out)
    assert token["passages"] == []


def test_without_questions_a_large_store_stays_in_token_mode(tmp_path, monkeypatch):
    monkeypatch.setattr(passage_mode, "LARGE", 10)
    model = make_word_model(tmp_path / "model")
    (tmp_path / "d.txt").write_text(" ".join(f"w{number}" for number in range(5, 60)))
    store = tmp_path / "store"
    done = emt("index", tmp_path / "d.txt", "--store", store, "--model", model)
    assert re.search(
        r"\nemt: no head profile could be made: a profile needs at least 4 questions .*; got 0\. "
        rf".*emt profile --store {store} --data FILE`, read this store with --mode token, as is "
        r"the default\.\n",
        done.err,
    )
    assert done.out.startswith("1 document added")
    found = described(store)
    assert found["profile"] is None
    assert found["index"]["num_heads"] == found["index"]["all_heads"] == 6
    answer = json.loads(emt("generate", "w7 w8", "--store", store, "--json").out)
    assert answer["citations"]
    assert answer["passages"] == []
    refused = emt("generate", "w7 w8", "--store", store, "--mode", "passage", code=2)
    assert "the passage mode needs a head profile of this model" in refused.err


@pytest.mark.parametrize(
    ("mode", "is_made"), [("token", False), ("auto", False), ("passage", True)]
)
def test_a_small_store_gets_a_profile_only_if_it_is_read_in_passages(
    tmp_path, model, documents, mode, is_made
):
    (tmp_path / "c.yaml").write_text(f"memory_type: vector_db\nmode: {mode}\n")
    store = tmp_path / "store"
    done = emt(
        "index", documents, "--store", store, "--model", model, "--config", tmp_path / "c.yaml"
    )
    assert ("head profile" in done.err) == is_made
    assert (described(store)["profile"] is not None) == is_made


# -- generate -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("all_is_relevant")
def test_generate_prints_the_passages_that_were_recalled(store):
    emt("profile", "--store", store)
    options = ("--store", store, "--max-new-tokens", 3, "--mode", "passage")
    found = json.loads(emt("generate", PROMPT, *options, "--json").out)
    assert found["passages"]
    assert set(found["passages"][0]) == {
        *("document", "start", "end", "text", "score", "attention", "token_attention"),
    }
    for passage in found["passages"]:
        text = TEXTS[passage["document"]]
        assert text[passage["start"] : passage["end"]] == passage["text"]
    lines = emt("generate", PROMPT, *options, "--citations").out.splitlines()
    shown = [
        f"      {p['document']} {p['start']}-{p['end']}: {p['attention']:.1%} of the attention, "
        f"score {p['score']:.2f}"
        for p in found["passages"]
    ]
    noun = "passage" if len(shown) == 1 else "passages"
    assert lines[-len(shown) - 2 :] == ["", f"{len(shown)} {noun} recalled:", *shown]
    assert "passage" not in emt("generate", PROMPT, "--store", store, "--citations").out


# -- stored text --------------------------------------------------------------------------------


def test_pieces_of_stored_text_end_where_sentences_do():
    model = build("llama", vocab_size=BYTES_VOCAB_SIZE)
    memory = attach(model, tokenizer=byte_tokenizer())
    long = " ".join(f"Sentence {number} of a long text." for number in range(400))
    memory.write(long[:9000], document="long")
    memory.write("A short one.", document="short")
    memory.write([70, 71, 72], document="ids")
    pieces = list(stored_texts(memory.backend, memory.tokenizer))
    of_long = sorted(piece for piece in pieces if piece.startswith("Sentence"))
    assert "".join(sorted(of_long, key=long.index)) == long[:9000]
    assert len(of_long) == 2
    assert max(map(len, of_long)) <= 6000
    assert sum(piece.endswith("text. ") for piece in of_long) == 1
    assert sorted(set(pieces) - set(of_long)) == ["A short one.", "def"]
    one = list(stored_texts(memory.backend, None, num_texts=2, seed=1))
    assert len(one) <= 2
    assert "def" not in one


def test_saving_gives_a_memory_the_profile_that_it_lacks(tmp_path):
    model = build("llama", vocab_size=BYTES_VOCAB_SIZE)
    settings = {"mode": "passage", "path": str(tmp_path / "store")}
    memory = attach(model, MemoryConfig(**settings), tokenizer=byte_tokenizer())
    for name, text in sorted(TEXTS.items()):
        memory.write(text, document=name)
    assert memory.lacks_profile
    memory.save()  # as `write_all` does
    kept = memory.profile
    assert (kept.model, kept.source) == ("llama", "stored text")
    examples = make_examples(TEXTS[name] for name in sorted(TEXTS))
    expected = memory.rank_heads(examples, name="llama").profile
    assert [(head.layer, head.head) for head in kept.heads] == [
        (head.layer, head.head) for head in expected.heads
    ]
    stored = memory.backend.catalog.setting("head_profile")
    assert HeadProfile.from_json(stored).to_json() == kept.to_json()
    memory.save()
    assert memory.profile is kept  # it is made once


def test_without_questions_a_memory_is_saved_without_a_profile(tmp_path, caplog):
    model = build("llama", vocab_size=BYTES_VOCAB_SIZE)
    settings = {"mode": "passage", "path": str(tmp_path / "store")}
    memory = attach(model, MemoryConfig(**settings), tokenizer=byte_tokenizer())
    memory.write("no question can be made of this", document="d")
    memory.save()
    assert memory.lacks_profile
    assert not caplog.records  # nothing took long
    with pytest.raises(ConfigError, match="a profile needs at least 4 questions"):
        memory.make_profile()
    with pytest.raises(ConfigError, match=r"memory\.make_profile\(\)"):
        memory.route("what?")


def test_a_model_with_windows_only_has_no_profile(data):
    model = build("mistral", vocab_size=BYTES_VOCAB_SIZE, sliding_window=16)
    memory = attach(model, MemoryConfig(layers=[0]), tokenizer=byte_tokenizer())
    with pytest.raises(ConfigError, match="layers that see the whole context; this model has none"):
        memory.rank_heads(read_examples(data), name="tiny")


@pytest.fixture
def lacking(tmp_path):
    """A model, and its memory that lacks a head profile."""
    model = build("llama", vocab_size=BYTES_VOCAB_SIZE)
    settings = {"mode": "passage", "path": str(tmp_path / "store")}
    memory = attach(model, MemoryConfig(**settings), tokenizer=byte_tokenizer())
    for name, text in sorted(TEXTS.items()):
        memory.write(text, document=name)
    return model, memory


def test_the_log_says_once_that_a_profile_is_made(lacking, caplog):
    _, memory = lacking
    caplog.set_level(logging.WARNING, "emt")
    memory.save()
    (record,) = caplog.records
    said = record.getMessage()
    assert record.levelno == logging.WARNING
    assert "no head profile: one is made of the memory's own text" in said
    assert "`emt profile` and set profile to its file, or set mode to token" in said
    memory.save()
    assert len(caplog.records) == 1


def test_no_profile_is_made_while_the_model_generates(lacking):
    _, memory = lacking
    refused = pytest.raises(MemoryUseError, match="cannot save while the model is generating")
    with memory.activity.shared("generate"), refused:
        memory.save()
    assert memory.lacks_profile


def test_a_memory_whose_model_cannot_be_asked_is_saved_without_a_profile(lacking, monkeypatch):
    model, memory = lacking
    model.train()
    memory.save()
    assert memory.lacks_profile
    model.eval()
    with monkeypatch.context() as patched:
        patched.setattr(type(memory.tokenizer), "is_fast", False)
        memory.save()
        assert memory.lacks_profile
        with pytest.raises(ConfigError, match="needs a fast tokenizer"):
            memory.make_profile()
    detach(model)
    memory.save()
    assert memory.backend.catalog.setting("head_profile") is None
