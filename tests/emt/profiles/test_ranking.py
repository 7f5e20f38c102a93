"""Making a profile: of a tiny model, from made and given questions."""

import json

import torch
import pytest

from emt import MemoryConfig, attach
from emt.errors import ConfigError, MemoryUseError
from emt.profiles.examples import Example, made_from, read_examples
from emt.profiles.ranking import _apart, profile_heads
from tests.emt.routing.worlds import tokens
from tests.emt.words import word_tokenizer
from tests.families import build


def examples(count=4, each=4):
    """Return questions in the words of the sentence that answers them."""
    found = []
    for number in range(count):
        names = [f"w{token}" for token in tokens(120, 40 + number).tolist()]
        text = " ".join(names)
        for question in range(each):
            at = 10 + 25 * question
            start = len(" ".join(names[:at])) + 1
            asked = " ".join(names[at - 4 : at] + names[at + 1 : at + 4])
            found.append(Example(text, asked, start, start + len(names[at])))
    return found


def memory_of(model=None, **settings):
    model = model or build("llama")
    memory = attach(model, MemoryConfig(**settings), tokenizer=word_tokenizer())
    memory.model_in_use = model  # a memory itself does not keep its model from being collected
    return memory


def test_a_profile_is_made_and_fits():
    memory = memory_of()
    steps = []
    ranked = profile_heads(memory, examples(), name="tiny", source="words", on_step=steps.append)
    profile, model = ranked.profile, memory._attached("test")
    profile.check(model.query_heads, model.layout)
    assert profile.weights == model.identity["weights"]
    assert (profile.model, profile.source) == ("tiny", "words")
    assert len(ranked.hit_rates) == 12
    rates = list(ranked.hit_rates.values())
    assert rates == sorted(rates, reverse=True)
    # of three layers, each gives its best head, and then the best of the others are chosen
    good = [head for head, rate in ranked.hit_rates.items() if rate >= rates[0] / 4]
    of_layer = {layer: (layer, head) for layer, head in reversed(good)}
    chosen = [(head.layer, head.head) for head in profile.heads]
    assert set(of_layer.values()) <= set(chosen)
    assert len(of_layer) > 1
    assert len(chosen) == min(5, len(good)) > len(of_layer)
    assert [head.hit_rate for head in profile.heads] == [ranked.hit_rates[one] for one in chosen]
    assert chosen == [head for head in good if head in chosen]
    assert 1 <= len(profile.heads) <= 5
    assert min(head.hit_rate for head in profile.heads) >= 0.25 * rates[0] > 0
    assert 0 <= ranked.agreement <= 1
    assert (ranked.num_questions, ranked.num_rows) == (16, 4 * 120)
    assert steps
    assert len(memory) == 0  # nothing is written
    memory.write(torch.arange(3, 60), document="d")
    memory.keep_profile(profile)
    with memory.using(mode="passage"):
        memory.route(torch.arange(3, 20))


def test_it_is_the_same_each_time():
    first, second, other = (
        profile_heads(memory_of(), examples(6), name="tiny", num_questions=12, num_texts=4, seed=s)
        for s in (0, 0, 1)
    )
    assert first.profile.to_json() == second.profile.to_json()
    assert first.hit_rates == second.hit_rates
    assert first.num_questions == 12
    assert other.profile.to_json() != first.profile.to_json()


def test_only_full_attention_layers_route():
    model = build("gemma3_text", sliding_window=16)
    ranked = profile_heads(memory_of(model), examples(), name="tiny")
    assert {layer for layer, _ in ranked.hit_rates} == {1}


def test_a_head_that_copies_is_chosen():
    """Keys and queries of one head are the tokens' embeddings: it finds the same words."""
    model = build("llama")
    layer = model.model.layers[0].self_attn
    with torch.no_grad():
        projection = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
        layer.q_proj.weight[16:32] = projection
        layer.k_proj.weight[:16] = projection
    ranked = profile_heads(memory_of(model), examples(), name="tiny")
    assert (ranked.profile.heads[0].layer, ranked.profile.heads[0].head) == (0, 1)
    assert ranked.profile.heads[0].hit_rate > 0.6


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "at least 4 questions about 2 texts.*got 0"),
        (examples(4, 1)[:3], "got 3"),
        (examples(1, 4), "2 texts"),
        ([Example("w5 " * 4000, "w5", 9000, 9002)] * 9, "first 8000 characters; got 0"),
    ],
)
def test_too_few_questions(given, message):
    with pytest.raises(ConfigError, match=message):
        profile_heads(memory_of(), given, name="tiny")


def test_without_a_tokenizer():
    with pytest.raises(MemoryUseError, match="tokenizer"):
        profile_heads(attach(build("llama")), examples(), name="tiny")


def test_a_model_without_full_attention():
    layers = ["sliding_attention"] * 3
    model = build("gemma3_text", sliding_window=16, layer_types=layers)
    memory = memory_of(model, layers=(0,))
    with pytest.raises(ConfigError, match="see the whole context"):
        profile_heads(memory, examples(), name="tiny")


def test_questions_from_files(tmp_path):
    article = {
        "title": "A_town",
        "paragraphs": [
            {"context": "It has a mill.", "qas": []},
            {
                "context": "The mill was built in 1720.",
                "qas": [
                    {"question": " When? ", "answers": [{"text": "1720", "answer_start": 22}]},
                    {"question": "Why?", "answers": []},
                ],
            },
        ],
    }
    (tmp_path / "s.json").write_text(json.dumps({"data": [article]}))
    (only,) = read_examples(tmp_path / "s.json")
    assert only.question == "When?"
    assert only.document[only.start : only.end] == "1720"
    assert only.document.startswith("A town\n\nIt has")
    rows = [
        {"context": "Ann met Bob.", "question": "Who?", "answer": "Bob"},
        {"context": "Ann met Bob.", "question": "Who?", "answer": "Eve"},
    ]
    (tmp_path / "l.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert read_examples(tmp_path / "l.jsonl") == [Example("Ann met Bob.", "Who?", 8, 11)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", "cannot be read"),
        ("a.json", "[]", "none whose answer"),
        ("a.json", "[3]", "expected SQuAD"),
        ("a.json", '{"data": [{"title": "x"}]}', "expected SQuAD"),
        ("a.jsonl", '{"context": "c"}', "expected SQuAD"),
        ("a.jsonl", "3", "expected SQuAD"),
        ("a.jsonl", "{", "cannot be read"),
    ],
)
def test_files_without_questions(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_examples(tmp_path / name)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_examples(tmp_path / "none.json")


def test_made_questions_leave_the_answer_out():
    text = (
        "The castle above the river was built by Conrad of Wessen after the flood. It is old. "
        "Later owners repaired the tower and sold the western gardens in 1688."
    )
    found = made_from([text])
    assert [text[one.start : one.end] for one in found] == ["Wessen", "1688"]
    for one in found:
        assert text[one.start : one.end] not in one.question
        assert one.document == text
    assert "castle above river built" in found[0].question
    assert found[1].question.startswith("Which number")
    assert made_from([text]) == found


def test_heads_of_neighbouring_layers_are_not_both_chosen():
    heads = [(9, 0), (10, 0), (9, 1), (11, 1), (30, 0), (29, 0), (0, 1), (1, 1), (2, 1), (4, 1)]
    assert _apart(heads, 32) == [(9, 0), (11, 1), (30, 0), (0, 1), (2, 1)]
    assert _apart(heads, 16) == [(9, 0), (10, 0), (11, 1), (30, 0), (29, 0)]
    # Where too few are apart, the best of the others are chosen, too.
    assert _apart(heads[:6], 32) == [(9, 0), (10, 0), (9, 1), (11, 1), (30, 0)]
    assert _apart([(5, 1), (5, 0), (5, 2)], 32) == [(5, 1), (5, 0), (5, 2)]
    assert _apart([], 32) == []
