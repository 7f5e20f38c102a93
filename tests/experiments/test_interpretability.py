"""The interpretability experiment, on a tiny model that has no idea what it is asked."""

import json

import torch
import numpy as np
import pytest
from experiments.interpretability.attention_mass import (
    attention_mass,
    share_of_passages_with,
    tokens_of,
)
from experiments.interpretability.report import draw, memories_a_query, summary
from experiments.interpretability.run import run_interpretability
from experiments.interpretability.settings import InterpretabilitySettings
from transformers import DynamicCache

from emt import MemoryConfig, attach, detach
from emt.errors import ConfigError
from tests.emt.marked_sinks import first_rows_are_sinks
from tests.experiments.fakes import tiny_of_words, write_rows

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
    return tiny_of_words()


@pytest.fixture
def items(tmp_path):
    rows = [ITEM, {**ITEM, "id": "b", "original_answer": None}, {**ITEM, "id": "c", "split": "4k"}]
    return write_rows(tmp_path / "items.jsonl", rows)


def settings_of(items, **changes):
    changes = {"topk": [2, 9], "others": {"always": UNCERTAIN}, "heat_map": "topk 9", **changes}
    given = {"items": str(items), "question": "{question}", "max_new_tokens": 5}
    return InterpretabilitySettings(**{**given, **changes})


def run(asked, loaded, folder):
    return run_interpretability(asked, folder, lambda: loaded)


def prompt_of(loaded):
    return loaded.tokenizer(f"{ITEM['question']}\nAnswer:").input_ids


@pytest.mark.parametrize(("condition", "low", "high"), [("topk 9", 9, 9), ("always", 2, 9)])
def test_log_probabilities_are_those_of_the_answer_given_the_prompt(
    loaded, items, tmp_path, condition, low, high
):
    results = run(settings_of(items), loaded, tmp_path)
    prompt, answer = prompt_of(loaded), [80, 81]
    memory = attach(loaded.model, MemoryConfig.published(), tokenizer=loaded.tokenizer)
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
    results = run(settings_of(items), loaded, tmp_path)
    assert list(results.items) == [
        f"{item}/{name}" for item in "abc" for name in ("topk 2", "topk 9", "always")
    ]
    memory = attach(loaded.model, MemoryConfig.published(), tokenizer=loaded.tokenizer)
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
    path = run(settings_of(items, limit=1), loaded, tmp_path).path
    lines = path.read_text().splitlines(keepends=True)
    assert [json.loads(line)["item"] for line in lines[1:]] == ["a"] * 3 + ["c"] * 3
    path.write_text("".join(lines[:3]) + lines[3][:50])
    run(settings_of(items, limit=1), loaded, tmp_path)
    again = path.read_text().splitlines(keepends=True)
    assert again[:3] == lines[:3]
    timed = dict.fromkeys(("seconds", "remember_seconds"))
    for line, before in zip(again[3:], lines[3:], strict=True):
        assert {**json.loads(line), **timed} == {**json.loads(before), **timed}
    with pytest.raises(ConfigError, match="are of other settings: max_new_tokens 5 \\(now 6\\)"):
        run(settings_of(items, max_new_tokens=6), loaded, tmp_path)
    more = run(settings_of(items, limit=2), loaded, tmp_path)
    assert list(more.items)[6:] == [f"b/{name}" for name in settings_of(items).conditions()]


@first_rows_are_sinks(3)
def test_attention_mass_is_the_sum_of_the_weights_over_rows(loaded):
    memory = attach(loaded.model, MemoryConfig.published(topk=9), tokenizer=loaded.tokenizer)
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
                    sums["content"] += weight * (row >= 3)
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
        **{"model": "tiny", "items": "x/items.jsonl", "memory": {"sinks": "one"}},
        **{"topk": [5, 10], "heat_map": "topk 5"},
    },
    **{"machine": "a machine", "revision": "abc", "versions": {}},
}
ITEMS = {
    "a/topk 5": record("a", "topk 5", right=True, log_prob=-0.5, cited_answer=True),
    "b/topk 5": record("b", "topk 5", token_ids=[1, 2, 9, 4]),
    "a/topk 10": record("a", "topk 10", text="W1", num_retrieved=4 * 4 * 10),
    "b/topk 10": record("b", "topk 10", text="w2", num_redone=2, num_retrieved=4 * 4 * 10),
}


def test_the_summary_has_answers_citations_stability_and_heads():
    text = summary(HEADER, ITEMS)
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    answers = [row for row in cells if row[:1] in (["topk 5"], ["topk 10"])]
    interval = "50 [0, 100]"
    assert answers[0] == [*("topk 5", interval, interval, "-1.25 [-2.00, -0.50]", "5.0", "0")]
    assert answers[1][4:] == ["10.0", "25"]
    assert answers[2] == ["topk 5", interval, "25.0", "25 [-25, 75]"]
    assert answers[4] == ["topk 5", "topk 10", interval, "3.0 [2.0, 4.0]", "-0.75 [-1.50, 0.00]"]
    assert ["7", "0", "25.0%"] in cells
    without = {key: {**row, "original_log_prob": None} for key, row in ITEMS.items()}
    assert "| topk 5 | 50 [0, 100] |  | -1.25" in summary(HEADER, without)


def test_pictures_are_drawn(tmp_path):
    files = draw(HEADER, ITEMS, tmp_path / "made")
    assert [file.name for file in files] == ["stability.png", "attention_mass.png"]
    for file in files:
        assert file.read_bytes().startswith(b"\x89PNG")
    nothing = {"memory": [], "content": [], "answer": []}
    off = {"a/topk 5": record("a", "topk 5", mass=nothing, num_retrieved=0)}
    assert [file.name for file in draw(HEADER, off, tmp_path / "off")] == ["stability.png"]
    assert "-2.00 [-2.00, -2.00] | 0.0 | 0 |" in summary(HEADER, off)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"topk": [0]}, r"topk\.0: Input should be greater than 0"),
        ({"others": {"more": {"topk": 2, "uncertainty": {"entropy": 1}}}}, "keys entropy and topk"),
        ({"heat_map": "topk 3"}, "heat_map must be one of the conditions topk 2, topk 9, always"),
        ({"question": "why"}, "question: expected a template with {question} in it"),
    ],
)
def test_wrong_settings_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        settings_of("x.jsonl", **changes)


def test_a_template_that_is_not_there(loaded, items, tmp_path):
    with pytest.raises(ConfigError, match="no chat template"):
        run(settings_of(items, chat=True), loaded, tmp_path)
