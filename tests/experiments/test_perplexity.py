"""Perplexity over length: numbers against plain loops, pairing, resuming, what is left out."""

import math

import torch
import numpy as np
import pytest
from experiments.forward import nats_of_last
from experiments.perplexity.growing import GrowingMemory
from experiments.perplexity.report import draw, summary
from experiments.perplexity.run import run_perplexity
from experiments.perplexity.settings import PerplexitySettings
from experiments.texts import first_ids, read_texts

from emt import MemoryConfig, attach, detach
from emt.attach import memory_of
from emt.errors import ConfigError, DocumentError
from emt.ingest import sinks
from emt.ingest.windows import Windows
from tests.emt.marked_sinks import first_rows_are_sinks
from tests.experiments.fakes import nats_one_by_one, random_ids, write_texts
from tests.experiments.fakes import tiny_of_words as tiny

BOS = torch.tensor([1])
WINDOWS = {"stride": 8, "max_length": 16}


def settings(data, **changes):
    given = {"lengths": [20, 40, 60], "window": 24, "scored": 6, "topk": [3], "memory": WINDOWS}
    return PerplexitySettings(data=str(data), **{**given, **changes})


def run(asked, folder, loaded=None):
    return run_perplexity(asked, folder, lambda: loaded or tiny())


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
    items = run(settings(data), tmp_path, loaded).items
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
    items = run(asked, tmp_path).items
    model = tiny().model
    for length, topk in ((40, 2), (60, 2), (60, 5)):
        config = MemoryConfig.published(**changes, topk=topk, special_ids=[1])
        attach(model, config).write(whole(length - 23), document="before")
        expected = nats_one_by_one(model, window(length), 6)
        detach(model)
        record = items[f"0 / {length}"]
        assert record["older"] == length - 23
        assert record["nats"][f"memory, topk {topk}"] == pytest.approx(expected, abs=1e-4)
        assert abs(expected - record["nats"]["window"]) > 1e-2


@first_rows_are_sinks(3)  # of every window
def test_one_set_of_sinks_is_that_of_the_first_window(data, tmp_path):
    changes = {"stride": 8, "max_length": 8, "sinks": "one"}  # windows without left context
    items = run(settings(data, lengths=[60], memory=changes), tmp_path).items
    model, before = tiny().model, whole(37)
    memory = attach(model, MemoryConfig.published(**changes, topk=3, special_ids=[1]))
    for start in range(0, 37, 8):
        memory.write(before[start : start + 8], document=str(start))
    expected = nats_one_by_one(model, window(60), 6)
    detach(model)
    assert items["0 / 60"]["nats"]["memory, topk 3"] == pytest.approx(expected, abs=1e-4)
    changes["sinks"] = "all"
    other = run(settings(data, lengths=[60], memory=changes), tmp_path / "all").items["0 / 60"]
    assert abs(expected - other["nats"]["memory, topk 3"]) > 1e-2


def test_up_to_the_window_all_conditions_are_one(data, tmp_path):
    record = run(settings(data), tmp_path).items["1 / 20"]
    expected = nats_one_by_one(tiny().model, whole(20, text=1), 6)
    assert record["older"] == 0
    assert set(record["nats"]) == {"window", "memory, topk 3", "full"}
    assert list(record["nats"].values()) == pytest.approx([expected] * 3, abs=1e-4)


def test_a_run_goes_on_where_it_was_stopped(data, tmp_path, monkeypatch):
    asked = settings(data)
    full = run(asked, tmp_path / "whole")
    part = tmp_path / "part"
    part.mkdir()
    lines = full.path.read_text().splitlines(keepends=True)
    (part / "results.jsonl").write_text("".join(lines[:3]) + lines[3][:20])  # one is cut off
    again = run(asked, part)
    assert list(again.items) == list(full.items)
    for key, record in full.items.items():
        assert again.items[key]["nats"] == pytest.approx(record["nats"], abs=1e-4)
    monkeypatch.setattr("experiments.perplexity.run.nats_of_last", None)
    assert run(asked, part).items == again.items


def test_other_texts_under_the_same_name_are_another_run(data, tmp_path):
    run(settings(data), tmp_path)
    write_texts(tmp_path / "texts.jsonl", 70)
    with pytest.raises(ConfigError, match="data_sha256"):
        run(settings(data), tmp_path)


def test_what_is_left_out_is_said(data, tmp_path):
    loaded = tiny(max_position_embeddings=40)
    results = run(settings(data), tmp_path, loaded)
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


def test_conditions_are_compared_over_the_texts_that_have_both(data, tmp_path):
    header = run(settings(data), tmp_path).header
    text = summary(header, ITEMS)
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| 8 ")]
    perplexities, gains = rows
    assert perplexities[1] == "3"
    assert perplexities[2].startswith(f"{math.exp(3.0):.2f} [")
    assert perplexities[4].startswith(f"{math.exp(2.0):.2f} [")
    # three texts: one resample in 27 is thrice "a", one thrice "b"
    assert gains[1] == f"{(-0.5 + 0.25) / 3:+.4f} [-0.5000, +0.2500]"
    assert gains[2].startswith("-0.5000 [")  # of two texts, not the difference of the means
    assert "| 4 | 1 | 2.72" in text
    assert text.count("| 4 |") == 1  # where all conditions are one, there is no difference
    assert draw(header, ITEMS, tmp_path) == [tmp_path / "perplexity.png"]
    assert (tmp_path / "perplexity.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="no text was long enough"):
        draw(header, {"a": {"length": 8, "nats": {}}}, tmp_path)


def test_texts_are_cut_into_pieces(data):
    texts = read_texts(data, tiny().tokenizer, piece_tokens=30)
    assert [text.name for text in texts] == ["0 [0]", "0 [1]", "1 [0]"]
    assert torch.equal(texts[1].token_ids, random_ids(70, 0)[30:60])
    assert first_ids(tiny().tokenizer).tolist() == [1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scored": 20}, "scored .20. must be below the window .24. and every length .20"),
        ({"lengths": [40, 20]}, "lengths: expected ascending numbers"),
        ({"memory": {"topk": 3}}, "memory: 'topk' is a setting of the experiment"),
        ({"window": 50}, r"window \(50\) must be at most the model's 48 positions"),
        ({"memory": {}}, r"max_length \(3072\) must be at most the model's 48 positions"),
        ({"lengths": [72, 90]}, "the shortest length is 72 tokens, .* has 71"),
    ],
)
def test_settings_that_cannot_be_run_are_refused(data, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        run(settings(data, **changes), tmp_path, tiny(max_position_embeddings=48))
    assert not (tmp_path / "results.jsonl").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", None, "cannot be read: .*No such file"),
        ("x.txt", b" ", "is empty"),
        ("x.txt", b"\xff", "cannot be read: .*utf-8"),
        ("x.jsonl", b'{"text": "w3"}\n{"title": "w4"}', "row 2 has no field 'text'"),
        ("x.jsonl", b'{"id": 1, "text": "w3"}\n{"id": 1, "text": "w4"}', "name '1' comes twice"),
        ("x.jsonl", b'{"text": "w3 w4"}', "pieces of 3 tokens need a text as long; .* has 2"),
    ],
)
def test_texts_that_cannot_be_read_are_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    pieces = 3 if "pieces" in message else None
    with pytest.raises(DocumentError, match=message):
        read_texts(tmp_path / name, tiny().tokenizer, piece_tokens=pieces)


IDS = torch.cat([BOS, random_ids(60, 4)])


@pytest.mark.parametrize("carry_context", [False, True])
def test_a_growing_memory_has_the_rows_of_one_written_at_once(carry_context, monkeypatch):
    monkeypatch.setattr(sinks, "FACTOR", 1.05)  # a model of random weights has hardly any
    changes = {"stride": 8, "max_length": 24}
    config = MemoryConfig.published(**changes, carry_context=carry_context, special_ids=[1])
    loaded, other = tiny(), tiny()
    memory, expected = attach(loaded.model, config), attach(other.model, config)
    expected.write(IDS[:53], document="at once")
    growing = GrowingMemory(memory, IDS[:53], [1])
    read = []
    loaded.model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    for length in (0, 10, 10, 30, 53):
        growing.grow(length)
        assert len(memory) == max(length - 1, 0)  # <bos> has no row
    windows = Windows(8, 24).cut(53)  # each read whole, unless context is carried
    num_read = 53 if carry_context else sum(window.stop - window.start for window in windows)
    assert sum(read) == num_read
    backends = (memory.backend, expected.backend)
    for layer_idx in memory.layers:
        ids = torch.arange(52).expand(2, -1)
        grown, written = (backend.fetch(layer_idx, ids) for backend in backends)
        for part, other_part in zip(grown, written, strict=True):
            assert torch.allclose(part, other_part, atol=1e-5)
    is_sink = np.concatenate([run.sinks for run in expected.read(IDS[:53])])  # <bos> included
    grown = memory.backend.catalog.sink_rows()
    assert 0 < len(grown) < 52
    assert grown.tolist() == np.flatnonzero(is_sink[1:]).tolist()
    document = memory.backend.catalog.document("tokens 30 to 31")
    assert document.token_ids.tolist() == IDS[30:32].tolist()
    with pytest.raises(ValueError, match="at most 53; got 62"):
        growing.grow(62)
