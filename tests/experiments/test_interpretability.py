"""The interpretability experiment, on a tiny model that has no idea what it is asked."""

import json

import torch
import numpy as np
import pytest
import yaml
from experiments.interpretability.attention_mass import (
    attention_mass,
    share_of_passages_with,
    tokens_of,
)
from experiments.interpretability.experiment import run_interpretability
from experiments.interpretability.report import draw, memories_a_query, summary
from experiments.interpretability.settings import InterpretabilitySettings
from experiments.results import read_results
from transformers import DynamicCache

from emt import MemoryConfig, attach, detach
from emt.errors import ConfigError
from emt.model.loading import LoadedModel
from tests.emt.commands import ROOT, make_model
from tests.emt.words import word_tokenizer
from tests.experiments.scripts import run_script
from tests.families import build

LINES = [" ".join(f"w{n}" for n in range(start, start + 10)) for start in range(10, 70, 10)]
ITEM = {
    "id": "a",
    "title": "Words",
    "split": "2k",
    "context": "\n".join([*LINES, "w5 w33 w7"]),
    "question": "w5 w9 w33",
    "answer": "w33",
    "original_answer": "w80 w81",
}
UNCERTAIN = {"topk": 2, "uncertainty": {"entropy": 0, "topk": 9}}
LAYERS, HEADS = 3, 4


@pytest.fixture(scope="module")
def loaded():
    return LoadedModel(build("llama"), word_tokenizer(), "tiny")


@pytest.fixture
def items(tmp_path):
    rows = [ITEM, {**ITEM, "id": "b", "original_answer": None}, {**ITEM, "id": "c", "split": "4k"}]
    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings_of(items, **changes):
    changes = {"topk": [2, 9], "others": {"always": UNCERTAIN}, "heat_map": "topk 9", **changes}
    return InterpretabilitySettings(
        items=str(items), question="{question}", max_new_tokens=5, **changes
    )


def prompt_of(loaded):
    return loaded.tokenizer(f"{ITEM['question']}\nAnswer:").input_ids


# -- answers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("condition", "low", "high"), [("topk 9", 9, 9), ("always", 2, 9)])
def test_log_probabilities_are_those_of_the_answer_given_the_prompt(
    loaded, items, tmp_path, condition, low, high
):
    results = run_interpretability(settings_of(items), loaded, tmp_path / "r.jsonl")
    prompt, answer = prompt_of(loaded), [80, 81]
    memory = attach(loaded.model, MemoryConfig(), tokenizer=loaded.tokenizer)
    memory.write(ITEM["context"], document="d")
    cache, tokens, total = DynamicCache(config=loaded.model.config), [*prompt, *answer], 0.0
    with torch.no_grad():
        with memory.using(topk=low):
            loaded.model(torch.tensor([prompt[:-1]]), past_key_values=cache)
        for at in range(len(prompt) - 1, len(tokens) - 1):
            with memory.using(topk=high):
                logits = loaded.model(torch.tensor([[tokens[at]]]), past_key_values=cache).logits
            total += float(torch.log_softmax(logits[0, -1], -1)[tokens[at + 1]])
    detach(loaded.model)
    assert results.items[f"a/{condition}"]["original_log_prob"] == pytest.approx(
        total / 2, abs=1e-4
    )


def test_answers_are_those_of_generate_and_rows_are_counted(loaded, items, tmp_path):
    results = run_interpretability(settings_of(items), loaded, tmp_path / "r.jsonl")
    assert list(results.items) == [
        f"{item}/{name}" for item in "abc" for name in ("topk 2", "topk 9", "always")
    ]
    memory = attach(loaded.model, MemoryConfig(), tokenizer=loaded.tokenizer)
    memory.write(ITEM["context"], document="d")
    prompt = torch.tensor([prompt_of(loaded)])
    for name, options in settings_of(items).conditions().items():
        with memory.using(**options):
            output = loaded.model.generate(prompt, max_new_tokens=5, do_sample=False)
        expected = output[0, prompt.shape[1] :].tolist()
        found = results.items[f"a/{name}"]
        assert found["token_ids"] == expected
        text = loaded.tokenizer.decode(expected, skip_special_tokens=True)
        assert (found["text"], found["right"]) == (text, "w33" in text)
    detach(loaded.model)
    memories = {name: memories_a_query(results.items[f"a/{name}"]) for name in ("topk 2", "always")}
    assert memories == {"topk 2": 2, "always": 2 + 9}
    always = results.items["a/always"]
    assert always["num_redone"] == len(always["token_ids"])
    assert results.items["b/topk 2"]["original_log_prob"] is None


def test_a_run_goes_on_and_refuses_other_settings(loaded, items, tmp_path):
    run_interpretability(settings_of(items, limit=1), loaded, tmp_path / "all.jsonl")
    lines = (tmp_path / "all.jsonl").read_text().splitlines(keepends=True)
    assert [json.loads(line)["item"] for line in lines[1:]] == ["a"] * 3 + ["c"] * 3
    (tmp_path / "some.jsonl").write_text("".join(lines[:3]) + lines[3][:50])
    run_interpretability(settings_of(items, limit=1), loaded, tmp_path / "some.jsonl")
    again = (tmp_path / "some.jsonl").read_text().splitlines(keepends=True)
    assert again[:3] == lines[:3]
    timed = ("seconds", "remember_seconds")
    for one, other in zip(again[3:], lines[3:], strict=True):
        one, other = json.loads(one), json.loads(other)
        assert {**one, **dict.fromkeys(timed)} == {**other, **dict.fromkeys(timed)}
    with pytest.raises(ConfigError, match="are of other settings: seed 0 \\(now 1\\)"):
        run_interpretability(settings_of(items, seed=1), loaded, tmp_path / "some.jsonl")
    more = run_interpretability(settings_of(items, limit=2), loaded, tmp_path / "some.jsonl")
    assert list(more.items)[6:] == [f"b/{name}" for name in settings_of(items).conditions()]


# -- attention ----------------------------------------------------------------------------------


def test_attention_mass_is_the_sum_of_the_weights_over_rows(loaded):
    memory = attach(loaded.model, MemoryConfig(topk=9), tokenizer=loaded.tokenizer)
    memory.write(ITEM["context"], document="d")
    prompt = torch.tensor([[5, 9, 33]])
    with memory.recording() as recording:
        loaded.model.generate(prompt, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    document = memory.backend.catalog.document("d")
    detach(loaded.model)
    words = [
        "<bos>",
        *ITEM["context"].split(),
    ]  # rows are tokens without the first, which is special
    found = attention_mass(recording, document, "w33")
    for layer in range(LAYERS):
        for head in range(HEADS):
            sums = {"memory": 0.0, "content": 0.0, "answer": 0.0}
            for step in recording:
                ids, weights = (part[0, head, 0] for part in (step[layer].ids, step[layer].weights))
                for row, weight in zip(ids.tolist(), weights.tolist(), strict=True):
                    sums["memory"] += weight
                    sums["content"] += weight * (row + 1 > 3)  # the first four tokens are sinks
                    sums["answer"] += weight * (words[row + 1] == "w33")
            for name, total in sums.items():
                assert getattr(found, name)[layer, head] == pytest.approx(total / 3, abs=1e-5)
    assert found.answer.max() > 0.01
    assert (found.content < found.memory).any()


def test_an_answer_is_found_wherever_it_is_said(loaded):
    memory = attach(loaded.model, tokenizer=loaded.tokenizer)
    memory.write("w5 w33 w7\nw33 w8\nW33 w333 w9\nw10 w11", document="d")
    memory.write([5, 6, 7], document="ids")
    document, ids = (memory.backend.catalog.document(name) for name in ("d", "ids"))
    detach(loaded.model)
    assert tokens_of(document, "w33").tolist() == [2, 4, 6]
    assert tokens_of(document, "w33 w7").tolist() == [2, 3]
    assert tokens_of(document, "w1").tolist() == []
    assert tokens_of(ids, "w5").tolist() == []
    assert share_of_passages_with(document, "w33") == 3 / 4
    assert share_of_passages_with(document, "w10") == 1 / 4


# -- the report ---------------------------------------------------------------------------------


def record(item, condition, **changes):
    mass = np.zeros((2, 2))
    mass[1, 0] = 0.25
    maps = dict.fromkeys(("memory", "content", "answer"), mass.tolist())
    return {
        **{"item": item, "condition": condition, "text": "w1", "token_ids": [1, 2, 3, 4]},
        **{"right": False, "log_prob": -2.0, "original_log_prob": -1.0, "num_redone": 0},
        **{"num_retrieved": 4 * 4 * 5, "cited_answer": False, "chance": 0.25, "layers": [3, 7]},
        **{"mass": maps, **changes},
    }


HEADER = {
    "settings": {
        **{"model": "tiny", "items": "x/items.jsonl", "memory": {"sinks": "one"}, "seed": 0},
        **{"topk": [5, 10], "heat_map": "topk 5"},
    },
    "machine": "a machine",
    "revision": "abc",
}
ITEMS = {
    "a/topk 5": record("a", "topk 5", right=True, log_prob=-0.5, cited_answer=True),
    "b/topk 5": record("b", "topk 5", token_ids=[1, 2, 9, 4]),
    "a/topk 10": record("a", "topk 10", text="W1", num_retrieved=4 * 4 * 10),
    "b/topk 10": record("b", "topk 10", text="w2", num_redone=2, num_retrieved=4 * 4 * 10),
}


def test_the_summary_has_what_was_found():
    text = summary(HEADER, ITEMS)
    assert "tiny; 2 items of `items.jsonl`" in text
    assert "Memory settings: sinks one." in text
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    answers = [row for row in cells if row[:1] in (["topk 5"], ["topk 10"])]
    interval = "50 (0 to 100)"
    assert answers[0] == [
        *("topk 5", interval, interval, "-1.25 (-2.00 to -0.50)", "5.0", "0", "10.00", "10.00")
    ]
    assert answers[1][4:] == ["10.0", "25", "0.00", "0.00"]
    assert answers[2] == ["topk 5", interval, "25.0", "25 (-25 to 75)"]
    assert answers[4] == [
        *("topk 5", "topk 10", interval, "3.0 (2.0 to 4.0)", "-0.75 (-1.50 to 0.00)")
    ]
    assert ["7", "0", "25.0%"] in cells
    without = {key: {**row, "original_log_prob": None} for key, row in ITEMS.items()}
    assert "| topk 5 | 50 (0 to 100) |  | -1.25" in summary(HEADER, without)
    with pytest.raises(ConfigError, match="no results yet"):
        summary(HEADER, {})


def test_pictures_are_drawn(tmp_path):
    files = draw(HEADER, ITEMS, tmp_path / "made")
    assert [file.name for file in files] == ["stability.png", "attention_mass.png"]
    for file in files:
        assert file.read_bytes().startswith(b"\x89PNG")
    nothing = {"memory": [], "content": [], "answer": []}
    off = {"a/topk 5": record("a", "topk 5", mass=nothing, num_retrieved=0)}
    assert [file.name for file in draw(HEADER, off, tmp_path / "off")] == ["stability.png"]
    assert "-2.00 (-2.00 to -2.00) | 0.0 | 0 |  |  |" in summary(HEADER, off)


# -- settings and the command -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"items": None}, "items must name a file"),
        ({"topk": 3}, "topk must be a list; got 3"),
        ({"topk": [0]}, "topk must be a whole number"),
        ({"limit": 0}, "limit must be a whole number of at least 1; got 0"),
        ({"memory": {"top_k": 3}}, "Did you mean 'topk'"),
        ({"others": {"more": {"topk": 2, "uncertainty": {"entropy": 1}}}}, "keys entropy and topk"),
        ({"others": {"more": 3}}, "condition 'more' must be a mapping; got 3"),
        ({"heat_map": "topk 3"}, "heat_map must be one of the conditions topk 1, topk 2, topk 4"),
        ({"question": "why"}, "question must have {question} in it"),
    ],
)
def test_wrong_settings_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        InterpretabilitySettings(**{"items": "x.jsonl", **changes})


def test_a_split_that_is_not_there_and_a_template_that_is_not(loaded, items, tmp_path):
    with pytest.raises(ConfigError, match=r"no items of split '8k'\. The splits are 2k, 4k"):
        run_interpretability(settings_of(items, splits=["8k"]), loaded, tmp_path / "r.jsonl")
    with pytest.raises(ConfigError, match="no chat template"):
        run_interpretability(
            settings_of(items, chat=True), loaded, tmp_path / "chat" / "results.jsonl"
        )


def test_the_settings_that_ship_are_right():
    values = yaml.safe_load(
        (ROOT / "configs" / "experiments" / "interpretability.yaml").read_text(encoding="utf-8")
    )
    presets = values.pop("presets")
    assert set(presets) == {"smoke", "full"}
    for preset in ({}, *presets.values()):
        InterpretabilitySettings(**{**values, **preset, "items": "x.jsonl"})


def test_the_command(items, tmp_path):
    base = ROOT / "configs" / "experiments" / "interpretability.yaml"
    output = tmp_path / "found"
    asked = ["--base", base, "--preset", "smoke", "--model", make_model(tmp_path / "model")]
    # the model's words are numbers, and templates would be unknown to it
    asked += ["--set", f"items={items}", "--set", "question='{question}'", "--output", output]
    done = run_script("run_interpretability", *asked)
    assert done.returncode == 0, done.stderr
    header, found = read_results(output / "results.jsonl")
    assert (header["experiment"], header["settings"]["max_new_tokens"]) == ("interpretability", 12)
    assert len(found) == 2 * 4
    assert done.stdout.startswith((output / "summary.md").read_text(encoding="utf-8"))
    assert {file.name for file in output.glob("*.png")} == {"stability.png", "attention_mass.png"}
    items.write_text(items.read_text() + '{"id": "z"}\n')
    done = run_script("run_interpretability", *asked)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "line 4: no field 'title'" in done.stderr
