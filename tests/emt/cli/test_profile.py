"""`emt profile`, head profiles in `index` and `info`, and passages in `generate`."""

import contextlib
import json
import re
import shutil

import torch
import pytest

from emt import HeadProfile, attach
from emt.model.loading import load
from emt.profiles.cache import cached_profiles
from emt.profiles.examples import make_examples, read_examples
from emt.routing.head_profile import ProfiledHead
from memory_backends.catalog import Catalog
from tests.emt.bytes import BYTES_VOCAB_SIZE, byte_tokenizer
from tests.emt.commands import emt, emt_json, refused
from tests.emt.commands import make_model as make_word_model
from tests.emt.profiles.test_own_text import TEXTS
from tests.families import build

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
    """A store with the profile that `emt index` made."""
    store = tmp_path_factory.mktemp("indexed") / "store"
    emt("index", documents, "--store", store, "--model", model)
    return store


@pytest.fixture(scope="module")
def kept(tmp_path_factory, indexed):
    """A store that keeps a profile made from its own text, and what the command printed."""
    store = shutil.copytree(indexed, tmp_path_factory.mktemp("kept") / "store")
    return store, emt("profile", "--store", store)


@pytest.fixture
def store(tmp_path, indexed):
    return shutil.copytree(indexed, tmp_path / "store")


@pytest.fixture
def data(tmp_path):
    """A file of six questions about two texts."""
    rows = [
        {
            "context": TEXTS[name],
            "question": f"Who restored the garden of {name}?",
            "answer": answer,
        }
        for name in ("11.txt", "12.txt")
        for answer in re.findall(r"by (\w+)", TEXTS[name])[:3]
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def by_hand(model, examples):
    loaded = load(str(model))
    memory = attach(loaded.model, tokenizer=loaded.tokenizer)
    return memory.rank_heads(examples, name=model.name)


# -- profile ------------------------------------------------------------------------------------


def test_a_profile_of_questions_is_the_librarys(tmp_path, model, data):
    done = emt("profile", "--model", model, "--data", data, "--output", tmp_path / "p.json")
    expected = by_hand(model, read_examples(data))
    profile = HeadProfile.read(tmp_path / "p.json")
    assert profile.heads == tuple(
        ProfiledHead(head.layer, head.head, round(head.hit_rate, 4))
        for head in expected.profile.heads
    )
    torch.testing.assert_close(profile.means, expected.profile.means, atol=6e-5, rtol=0)
    assert (profile.model, profile.source) == (model.name, "questions.jsonl")
    assert profile.sketch.to_json() == expected.profile.sketch.to_json()
    lines = done.out.splitlines()
    ranking = [
        f"{'*' if (layer, head) in {(h.layer, h.head) for h in profile.heads} else ' '} "
        f"layer {layer:2d}, head {head:2d}  {score.deviations:5.2f} deviations above other places, "
        f"right for {score.hit_rate:6.1%}"
        for (layer, head), score in expected.scores.items()
    ]
    assert len(ranking) == 12  # 3 layers of 4 heads
    assert lines[:-2] == ranking
    assert lines[-2] == (
        f"{len(profile.heads)} heads together find the passage of {expected.hit_rate:.1%} of "
        f"6 questions in {expected.num_rows:,} rows; "
        f"two halves of the questions agree on {expected.agreement:.0%} of the heads"
    )
    assert lines[-1] == f"written to '{tmp_path / 'p.json'}'"
    assert done.err == ""


def test_a_terminal_shows_how_many_tokens_of_how_many_were_read(tmp_path, model, data):
    out = ("--output", tmp_path / "p.json")
    done = emt("profile", "--model", model, "--data", data, *out, terminal=True)
    texts = sum(len(TEXTS[name]) for name in ("11.txt", "12.txt"))
    prompts = sum(
        len(json.loads(line)["question"]) + 2 for line in data.read_text().splitlines()
    )  # bytes, and <bos> and <eos>
    assert f"/{texts + prompts} [" in done.err


def test_without_data_and_store_the_texts_of_emt_are_used(model, tmp_path, monkeypatch):
    monkeypatch.setenv("EMT_CACHE", str(tmp_path / "cache"))
    done = emt("profile", "--model", model)
    assert done.err == ""
    (profile,) = cached_profiles()
    expected = by_hand(model, None)
    assert profile.to_json() == expected.profile.to_json()
    assert (profile.model, profile.source) == (model.name, "texts of emt")
    (file,) = (tmp_path / "cache" / "profiles").iterdir()
    assert done.out.endswith(f"kept for all stores of this model, in '{file}'\n")


def test_a_profile_of_a_cache_that_cannot_be_written_is_refused(model, data, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file in its place")
    monkeypatch.setenv("EMT_CACHE", str(tmp_path / "cache"))
    refused("profile", "--model", model, "--data", data, message="Name --output FILE")


def test_a_store_keeps_a_profile_made_from_its_own_text(kept, model):
    store, done = kept
    assert done.out.endswith(f"kept in '{store}'\n")
    expected = by_hand(model, make_examples(TEXTS[name] for name in sorted(TEXTS)))
    assert expected.num_questions == 18
    profile = emt_json("info", store)["profile"]
    assert profile["kept"]
    assert (profile["model"], profile["source"]) == (model.name, "stored text")
    assert {(h["layer"], h["head"]) for h in profile["heads"]} == {
        (h.layer, h.head) for h in expected.profile.heads
    }
    heads = ", ".join(f"{h['layer']}.{h['head']}" for h in profile["heads"])
    assert (
        f"\nprofile    {len(profile['heads'])} query heads ({heads}) of {model.name}, from stored "
        "text\n" in emt("info", store).out
    )


def test_a_store_and_a_file_may_have_different_profiles(tmp_path, store, data):
    before = emt_json("info", store)["profile"]
    emt("profile", "--store", store, "--data", data, "--output", tmp_path / "p.json")
    assert HeadProfile.read(tmp_path / "p.json").source == "questions.jsonl"
    assert emt_json("info", store)["profile"] == before
    assert before["source"] == "texts of emt"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "q.json", "--output", "p"], "'q.json' cannot be read"),
        (["--store", "nowhere"], "'nowhere'; there is none"),
    ],
)
def test_what_profile_refuses(options, message):
    refused("profile", *options, message=message)


def test_a_damaged_profile_is_named_by_info(store):
    with contextlib.closing(Catalog.open(store)) as catalog:
        catalog.set_setting("head_profile", {"version": 9})
    assert "version 2; got 9" in emt_json("info", store)["profile"]["error"]
    assert "\nprofile    cannot be read: expected a head profile of" in emt("info", store).out


# -- index --------------------------------------------------------------------------------------


def test_a_store_gets_a_profile_and_indexes_of_its_heads_only(tmp_path, model, documents):
    done = emt("index", documents, "--store", tmp_path / "store", "--model", model)
    said = done.err.splitlines()[1:]
    assert said[0] == (
        "emt: no head profile of this model: one is made, and kept for all its stores"
    )
    assert re.fullmatch(r"emt: head profile: \d heads", said[1])
    assert len(said) == 2
    described = emt_json("info", tmp_path / "store")
    searched = {(h["layer"], h["head"] // 2) for h in described["profile"]["heads"]}
    assert described["index"]["heads"] == {
        str(layer): sorted(head for at, head in searched if at == layer)
        for layer in sorted({layer for layer, _ in searched})
    }
    files = {path.name for path in (tmp_path / "store" / "index").rglob("*.faiss")}
    assert len(files) == len(searched)
    again = emt("index", documents, "--store", tmp_path / "store")
    assert "head profile" not in again.err
    (tmp_path / "c.yaml").write_text("relevance: null\n")
    (tmp_path / "none.yaml").write_text("relevance: 1000\n")
    options = ("--store", tmp_path / "store", "--max-new-tokens", 3)
    config, none = (("--config", tmp_path / name) for name in ("c.yaml", "none.yaml"))
    assert emt_json("generate", PROMPT, *options, *none)["passages"] == []
    assert emt_json("generate", PROMPT, *options, *config)["passages"]
    assert emt_json("generate", PROMPT, *options, *config, "--mode", "token")["passages"] == []


@pytest.mark.parametrize("text", ["谁种了樱桃树？", "x"])
def test_a_profile_needs_no_text_of_a_kind(tmp_path, model, text):
    """It is made from texts of emt, whatever the script of the user's, and however short."""
    (tmp_path / "d.txt").write_text(text, encoding="utf-8")
    store = tmp_path / "store"
    done = emt("index", tmp_path / "d.txt", "--store", store, "--model", model)
    assert "emt: head profile: " in done.err
    assert emt_json("info", store)["profile"]["source"] == "texts of emt"


@pytest.mark.parametrize(
    ("settings", "instead"),
    [
        ("", "Passages are found without heads."),
        ("routing: heads\n", "All heads read memories."),
        ("mode: token\nheads: profile\n", "All heads read memories."),
    ],
)
def test_a_model_that_cannot_have_a_profile_is_told_of(tmp_path, settings, instead):
    model = build("gemma3_text", sliding_window=16, layer_types=["sliding_attention"] * 3)
    model.save_pretrained(tmp_path / "model")
    make_word_model(tmp_path / "words")
    for file in (tmp_path / "words").glob("*token*"):
        shutil.copy(file, tmp_path / "model")
    (tmp_path / "c.yaml").write_text(f"layers: [0]\n{settings}")
    (tmp_path / "d.txt").write_text("w5 w6 w7 w8")
    store = tmp_path / "store"
    options = ("--store", store, "--model", tmp_path / "model", "--config", tmp_path / "c.yaml")
    done = emt("index", tmp_path / "d.txt", *options)
    assert (
        "\nemt: no head profile could be made: a head profile needs layers that see the whole "
        f"context; this model has none. {instead}\n" in done.err
    )
    assert done.out.startswith("1 document added")


@pytest.mark.parametrize(
    "settings", ["mode: token", "routing: words"], ids=lambda settings: settings.split()[-1]
)
def test_a_store_that_heads_find_no_passages_in_gets_no_profile(
    tmp_path, model, documents, settings
):
    (tmp_path / "c.yaml").write_text(settings)
    store = tmp_path / "store"
    done = emt(
        "index", documents, "--store", store, "--model", model, "--config", tmp_path / "c.yaml"
    )
    assert "head profile" not in done.err
    assert emt_json("info", store)["profile"] is None
    assert "\nprofile    none (`emt profile` makes one)\n" in emt("info", store).out
