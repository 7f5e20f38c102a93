"""Perplexity over length: numbers against plain loops, pairing, resuming, what is left out."""

import json
import math

import torch
import pytest
from experiments.forward import nats_of_last
from experiments.perplexity import experiment as perplexity
from experiments.perplexity.experiment import run_perplexity
from experiments.perplexity.report import differences, draw, nats_per_token, summary
from experiments.perplexity.settings import PerplexitySettings
from experiments.settings import load_settings
from experiments.texts import first_ids, read_texts

from emt import MemoryConfig, attach, detach
from emt.attach import memory_of
from emt.errors import ConfigError, DocumentError
from tests.emt.commands import ROOT
from tests.experiments.long_texts import nats_one_by_one, random_ids, tiny, write_texts

BOS = torch.tensor([1])
WINDOWS = {"stride": 8, "max_length": 16}


def settings(data, **changes):
    given = {"lengths": [20, 40, 60], "window": 24, "scored": 6, "topk": [3], "memory": WINDOWS}
    return PerplexitySettings(data=str(data), **{**given, **changes})


@pytest.fixture
def data(tmp_path):
    """Texts of 70 and 45 words; with <bos>, 71 and 46 tokens."""
    return write_texts(tmp_path / "texts.jsonl", 70, 45)


def whole(length, text=0):
    """The first tokens of a text of `data`."""
    return torch.cat([BOS, random_ids((70, 45)[text], text)])[:length]


def window(length, text=0):
    """What is local at a length: <bos> and the last 23 tokens."""
    return torch.cat([BOS, whole(length, text)[-23:]])


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mpt"])
def test_nats_are_those_of_one_forward_a_token(model_type):
    loaded, token_ids = tiny(model_type), random_ids(20, 5)
    expected = nats_one_by_one(loaded.model, token_ids, 7)
    assert nats_of_last(loaded.model, token_ids, 7) == pytest.approx(expected, abs=1e-4)


def test_window_and_full_are_the_plain_model_over_the_same_tokens(data, tmp_path):
    loaded = tiny()
    items = run_perplexity(settings(data), loaded, tmp_path / "r.jsonl").items
    plain = tiny().model
    for length in (40, 60):
        nats = items[f"0 / {length}"]["nats"]
        expected = nats_one_by_one(plain, window(length), 6)
        assert nats["window"] == pytest.approx(expected, abs=1e-4)
        assert nats["full"] == pytest.approx(nats_one_by_one(plain, whole(length), 6), abs=1e-4)
        assert abs(nats["full"] - nats["window"]) > 1e-2
    assert memory_of(loaded.model) is None


@pytest.mark.parametrize("changes", [{}, {"carry_context": True, "max_length": 20}])
@pytest.mark.parametrize("memory_type", ["manual", "vector_db"])
def test_a_memory_that_grew_is_one_written_at_once(data, tmp_path, memory_type, changes):
    changes = {**WINDOWS, "memory_type": memory_type, **changes}
    asked = settings(data, topk=[2, 5], memory=changes)
    items = run_perplexity(asked, tiny(), tmp_path / "r.jsonl").items
    model = tiny().model
    for length, topk in ((40, 2), (60, 2), (60, 5)):
        config = MemoryConfig(**changes, topk=topk, special_ids=[1])
        attach(model, config).write(whole(length - 23), document="before")
        expected = nats_one_by_one(model, window(length), 6)
        detach(model)
        record = items[f"0 / {length}"]
        assert record["older"] == length - 23
        assert record["nats"][f"memory, topk {topk}"] == pytest.approx(expected, abs=1e-4)
        assert abs(expected - record["nats"]["window"]) > 1e-2


def test_one_set_of_sinks_is_that_of_the_first_window(data, tmp_path):
    changes = {"stride": 8, "max_length": 8}  # windows without left context
    asked = settings(data, lengths=[60], sinks=["all", "one"], memory=changes)
    nats = run_perplexity(asked, tiny(), tmp_path / "r.jsonl").items["0 / 60"]["nats"]
    model, before = tiny().model, whole(37)
    expected = {}
    for sinks in ("all", "one"):
        memory = attach(model, MemoryConfig(**changes, topk=3, special_ids=[1], sinks=sinks))
        for start in range(0, 37, 8):
            memory.write(before[start : start + 8], document=str(start))
        expected[sinks] = nats_one_by_one(model, window(60), 6)
        detach(model)
        found = nats[f"memory, topk 3, sinks {sinks}"]
        assert found == pytest.approx(expected[sinks], abs=1e-4)
    assert abs(expected["all"] - expected["one"]) > 1e-2


def test_up_to_the_window_all_conditions_are_one(data, tmp_path):
    record = run_perplexity(settings(data), tiny(), tmp_path / "r.jsonl").items["1 / 20"]
    expected = nats_one_by_one(tiny().model, whole(20, text=1), 6)
    assert record["older"] == 0
    assert set(record["nats"]) == {"window", "memory, topk 3", "full"}
    assert list(record["nats"].values()) == pytest.approx([expected] * 3, abs=1e-4)


def test_a_run_goes_on_where_it_was_stopped(data, tmp_path, monkeypatch):
    asked = settings(data)
    full = run_perplexity(asked, tiny(), tmp_path / "whole.jsonl")
    part = tmp_path / "part.jsonl"
    lines = full.path.read_text().splitlines(keepends=True)
    part.write_text("".join(lines[:3]) + lines[3][:20])  # two items, and one cut off
    again = run_perplexity(asked, tiny(), part)
    assert list(again.items) == list(full.items)
    for key, record in full.items.items():
        assert again.items[key]["nats"] == pytest.approx(record["nats"], abs=1e-4)
    monkeypatch.setattr(perplexity, "nats_of_last", None)
    assert run_perplexity(asked, tiny(), part).items == again.items


def test_other_texts_under_the_same_name_are_another_run(data, tmp_path):
    run_perplexity(settings(data), tiny(), tmp_path / "r.jsonl")
    write_texts(tmp_path / "texts.jsonl", 70)
    with pytest.raises(ConfigError, match="data_sha256"):
        run_perplexity(settings(data), tiny(), tmp_path / "r.jsonl")


def test_what_is_left_out_is_said(data, tmp_path):
    loaded = tiny(max_position_embeddings=40)
    results = run_perplexity(settings(data), loaded, tmp_path / "r.jsonl")
    assert "left_out" not in results.items["1 / 40"]
    assert results.items["1 / 60"]["left_out"] == "the text has 46 tokens"
    assert results.items["1 / 60"]["nats"] == {}
    assert set(results.items["0 / 40"]["nats"]) == {"window", "memory, topk 3", "full"}
    assert set(results.items["0 / 60"]["nats"]) == {"window", "memory, topk 3"}
    text = summary(results.header, results.items)
    assert "* 60 tokens: 1 of 2 texts, which are shorter" in text
    assert "* 60 tokens: `full`, because the model has 40 positions" in text
    assert "Fewer than 10 texts at 20, 40, 60 tokens" in text


def item(length, text, older=1, **nats):
    return {"length": length, "text": text, "older": older, "scored": 2, "nats": nats}


ITEMS = {
    "a": item(8, "a", window=4.0, memory=3.0, full=2.0),
    "b": item(8, "b", window=8.0, memory=8.5),
    "c": item(8, "c", window=6.0, memory=6.0, full=6.0),
    "d": item(4, "a", older=0, window=2.0, memory=2.0),
}


def test_conditions_are_compared_over_the_texts_that_have_both():
    curves = nats_per_token(ITEMS)
    assert list(curves) == ["window", "memory", "full"]
    assert curves["window"][8].mean == pytest.approx(3.0)
    assert curves["full"][8].mean == pytest.approx(2.0)
    found = differences(ITEMS)
    assert found["memory"][8].mean == pytest.approx((-0.5 + 0.25 + 0.0) / 3)
    assert found["memory"][8].low == pytest.approx(-0.5)  # three texts: one in 27 is thrice "a"
    assert found["memory"][8].high == pytest.approx(0.25)
    assert found["full"][8].mean == pytest.approx((-1.0 + 0.0) / 2)  # not -1, of unequal texts
    assert found["full"][8].count == 2
    assert 4 not in found["memory"]


def test_the_table_has_perplexities(data, tmp_path):
    header = run_perplexity(settings(data), tiny(), tmp_path / "r.jsonl").header
    row = next(line for line in summary(header, ITEMS).splitlines() if line.startswith("| 8 | 3 |"))
    assert row.split(" | ")[2].startswith(f"{math.exp(3.0):.2f} (")
    assert row.split(" | ")[4].startswith(f"{math.exp(2.0):.2f} (")
    assert draw(header, ITEMS, tmp_path) == [tmp_path / "perplexity.png"]
    assert (tmp_path / "perplexity.png").read_bytes().startswith(b"\x89PNG")


def test_texts_are_cut_into_pieces(data):
    texts = read_texts(data, tiny().tokenizer, piece_tokens=30)
    assert [text.name for text in texts] == ["0 [0]", "0 [1]", "1 [0]"]
    assert torch.equal(texts[1].token_ids, random_ids(70, 0)[30:60])
    assert first_ids(tiny().tokenizer).tolist() == [1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scored": 20}, "scored .20. must be below the window .24. and every length .20"),
        ({"lengths": [40, 20]}, "lengths must be .* ascending"),
        ({"sinks": ["two"]}, "sinks must be"),
        ({"topk": 3}, "topk must be a list"),
        ({"memory": {"topk": 3}}, "memory.topk cannot be set"),
        ({"memory": {"enabled": False}}, "memory.enabled cannot be set"),
        ({"memory": {"strid": 3}}, "memory: .* Did you mean 'stride'"),
        ({"window": 50}, r"window \(50\) must be at most the model's 48 positions"),
        ({"memory": {}}, r"max_length \(3072\) must be at most the model's 48 positions"),
        ({"lengths": [72, 90]}, "the shortest length is 72 tokens, .* has 71"),
    ],
)
def test_settings_that_cannot_be_run_are_refused(data, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        run_perplexity(
            settings(data, **changes), tiny(max_position_embeddings=48), tmp_path / "r.jsonl"
        )
    assert not (tmp_path / "r.jsonl").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        (b"", "is empty"),
        (b"\xff", "is not UTF-8"),
        (b"{", "line 1 is not JSON"),
        (
            b'{"text": "w3"}\n{"title": "w4"}',
            "line 2 must be an object with .*; got 'title'",
        ),
        (b'{"id": 1, "text": "w3"}\n{"id": 1, "text": "w4"}', "'1' comes twice"),
    ],
)
def test_texts_that_cannot_be_read_are_refused(tmp_path, content, message):
    path = tmp_path / "texts.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DocumentError, match=message):
        read_texts(path, tiny().tokenizer)


@pytest.mark.parametrize("preset", [None, "smoke", "full"])
def test_the_presets_are_settings(preset):
    base = ROOT / "configs" / "experiments" / "perplexity.yaml"
    found = load_settings(PerplexitySettings, base, preset=preset)
    assert (ROOT / found.data).is_file()
    assert found.piece_tokens >= found.lengths[-1]


def test_results_are_plain_json(data, tmp_path):
    path = run_perplexity(settings(data), tiny(), tmp_path / "r.jsonl").path
    header, *records = map(json.loads, path.read_text().splitlines())
    assert header["settings"]["lengths"] == [20, 40, 60]
    assert [record["key"] for record in records] == [
        f"{text} / {length}" for text in (0, 1) for length in (20, 40, 60)
    ]
