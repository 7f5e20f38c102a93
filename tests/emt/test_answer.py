"""One prompt, one answer: against `model.generate` called by hand."""

import json

import torch
import pytest

from emt import MemoryConfig, attach
from emt.answer import answer
from emt.errors import ConfigError, MemoryUseError
from tests.emt.bytes import BYTES_VOCAB_SIZE, byte_tokenizer
from tests.emt.words import word_tokenizer
from tests.families import build

TEXT = " ".join(f"w{number}" for number in range(10, 60))
TEMPLATE = "{% for m in messages %}<bos> w90 {{ m.content }} w91 {% endfor %}"
PROMPT = "w5 w9 w33"


@pytest.fixture
def remembering():
    model = build("llama")
    memory = attach(model, MemoryConfig.published(topk=4), tokenizer=word_tokenizer())
    memory.write(TEXT, document="d")
    return model, memory


def by_hand(model, input_ids, max_new_tokens=7):
    input_ids = torch.tensor([input_ids])
    output = model.generate(input_ids, max_new_tokens=max_new_tokens, do_sample=False)
    return output[0, input_ids.shape[1] :].tolist()


def test_an_answer_is_what_the_model_generates(remembering):
    model, memory = remembering
    answered = answer(model, memory, PROMPT, max_new_tokens=7)
    assert answered.prompt == PROMPT
    assert answered.token_ids == by_hand(model, [1, 5, 9, 33])
    assert "".join(answered.tokens) == answered.text
    assert answered.text == memory.tokenizer.decode(answered.token_ids, skip_special_tokens=True)
    assert answered.timings["generate_seconds"] > 0
    with memory.recording() as recording:
        by_hand(model, [1, 5, 9, 33])
    assert answered.citations == recording.citations()
    assert answered.token_citations == recording.token_citations()
    assert len(answered.token_citations) == len(answered.token_ids)


def test_topk_and_no_memory(remembering):
    model, memory = remembering
    ids = [1, 5, 9, 33]
    with memory.using(topk=1):
        one = by_hand(model, ids)
    with memory.using(enabled=False):
        none = by_hand(model, ids)
    assert one != none
    assert answer(model, memory, PROMPT, max_new_tokens=7, topk=1).token_ids == one
    plain = answer(model, memory, PROMPT, max_new_tokens=7, enabled=False)
    assert plain.token_ids == none
    assert (plain.citations, plain.token_citations) == ([], [])
    assert [token["rows"] for token in plain.to_json()["tokens"]] == [[] for _ in none]
    assert memory.config.topk == 4


def test_an_uncertain_answer_is_redone_and_says_what_it_cost(remembering):
    model, memory = remembering
    always = {"entropy": 0, "topk": 9}
    with memory.using(uncertainty=always):
        expected = by_hand(model, [1, 5, 9, 33])
    answered = answer(model, memory, PROMPT, max_new_tokens=7, uncertainty=always)
    assert answered.token_ids == expected != by_hand(model, [1, 5, 9, 33])
    assert (answered.num_redone, answered.num_retrieved) == (
        7,
        7 * 3 * 4 * (4 + 9),
    )  # layers, heads
    plain = answer(model, memory, PROMPT, max_new_tokens=7)
    assert (plain.num_redone, plain.num_retrieved) == (0, 7 * 3 * 4 * 4)
    with pytest.raises(ConfigError, match=r"uncertainty's topk \(4\) .* topk \(4\)"):
        answer(model, memory, PROMPT, uncertainty={"entropy": 1.0, "topk": 4})


def test_json_has_it_all_in_plain_types(remembering):
    model, memory = remembering
    answered = answer(model, memory, PROMPT, max_new_tokens=3)
    as_json = json.loads(json.dumps(answered.to_json()))
    assert list(as_json) == [
        *("prompt", "text", "token_ids", "timings", "num_redone", "num_retrieved"),
        *("citations", "passages", "tokens"),
    ]
    assert (
        as_json["token_ids"] == answered.token_ids == [token["id"] for token in as_json["tokens"]]
    )
    assert set(as_json["citations"][0]) == {
        *("document", "start", "end", "text"),
        *("copied", "share", "attention", "token_attention", "score"),
    }
    assert set(as_json["tokens"][0]["rows"][0]) == {"row", "document", "token", "share"}
    assert as_json["citations"][0]["share"] == answered.citations[0].share


def test_chat_templates_are_used_if_there_is_one(remembering):
    model, memory = remembering
    bare, chat = [1, 5, 9, 33], [1, 90, 5, 9, 33, 91]
    expected = {False: by_hand(model, bare), True: by_hand(model, chat)}
    assert expected[False] != expected[True]
    with pytest.raises(ConfigError, match="tokenizer has no chat template"):
        answer(model, memory, PROMPT, chat=True)
    memory.tokenizer.chat_template = TEMPLATE
    for option, used in ((None, True), (True, True), (False, False)):
        answered = answer(model, memory, PROMPT, chat=option, max_new_tokens=7)
        assert answered.token_ids == expected[used]
        assert answered.prompt == PROMPT


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "prompt is empty"),
        (" \n", {}, "prompt is empty"),
        ("w5 \udce9", {}, "prompt is not UTF-8"),
        (PROMPT, {"max_new_tokens": 0}, "max_new_tokens .* got 0"),
        (PROMPT, {"topk": 0, "max_new_tokens": 5}, "topk .* got 0"),
        (PROMPT, {"top_k": 3, "max_new_tokens": 5}, "top_k"),
        (PROMPT, {"max_new_tokens": 29}, "4 tokens and 29 new .* 32 positions"),
        ("w5 " * 40, {"max_new_tokens": 1}, "41 tokens and 1 new .* 32 positions"),
    ],
)
def test_prompts_that_cannot_be_answered(prompt, options, message):
    model = build("llama", max_position_embeddings=32)
    memory = attach(model, tokenizer=word_tokenizer())
    with pytest.raises(ConfigError, match=message):
        answer(model, memory, prompt, **options)
    assert answer(model, memory, PROMPT, max_new_tokens=28).token_ids


# -- sampling and streaming -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"temperature": 0.7}, {"top_p": 0.5}, {"temperature": 2.5, "top_p": 0.9}]
)
def test_sampling_is_that_of_generate_from_a_seed(remembering, options):
    model, memory = remembering
    drawn = {}
    for seed in (3, 4):
        torch.manual_seed(seed)
        ids = torch.tensor([[1, 5, 9, 33]])
        output = model.generate(ids, max_new_tokens=7, do_sample=True, **options)
        drawn[seed] = output[0, 4:].tolist()
    state = torch.get_rng_state()
    for seed in (3, 4, 3):
        answered = answer(model, memory, PROMPT, max_new_tokens=7, seed=seed, **options)
        assert answered.token_ids == drawn[seed]
    assert torch.equal(torch.get_rng_state(), state)
    assert drawn[3] != drawn[4]


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 0.0, "top_p": 0.5}, {}])
def test_without_a_temperature_it_is_greedy(remembering, options):
    model, memory = remembering
    model.generation_config.do_sample = True
    model.generation_config.temperature = 9.0
    expected = by_hand(model, [1, 5, 9, 33])
    assert answer(model, memory, PROMPT, max_new_tokens=7, seed=1, **options).token_ids == expected


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("temperature", value) for value in (-0.1, float("nan"), float("inf"), "1", True)),
        *(("top_p", value) for value in (0, 1.01, -1, float("nan"), "0.5")),
        *(("seed", value) for value in (-1, 2**63, 1.0, "3", True)),
    ],
)
def test_numbers_out_of_range_are_refused(remembering, option, value):
    with pytest.raises(ConfigError, match=f"^{option} must be .*; got {value!r}.$"):
        answer(*remembering, PROMPT, **{option: value})


def test_the_text_comes_in_pieces(remembering):
    pieces = []
    answered = answer(*remembering, PROMPT, max_new_tokens=7, on_text=pieces.append)
    assert "".join(pieces) == answered.text
    assert len(pieces) == 7


def test_text_needs_a_tokenizer():
    model = build("llama")
    with pytest.raises(MemoryUseError, match="needs a tokenizer"):
        answer(model, attach(model), PROMPT)


def test_an_empty_memory_answers_without_citations():
    model = build("llama")
    memory = attach(model, tokenizer=word_tokenizer())
    answered = answer(model, memory, PROMPT, max_new_tokens=3)
    assert answered.token_ids == by_hand(model, [1, 5, 9, 33], 3)
    assert answered.citations == []


def test_generation_is_greedy_whatever_the_checkpoint_says(remembering):
    model, memory = remembering
    expected = answer(model, memory, PROMPT, max_new_tokens=7).token_ids
    model.generation_config.num_beams = 3
    answered = answer(model, memory, PROMPT, max_new_tokens=7)
    assert answered.token_ids == expected
    assert len(answered.token_citations) == len(expected)


def test_half_a_character_is_shown_as_the_replacement_character():
    model = build("llama", vocab_size=BYTES_VOCAB_SIZE)
    memory = attach(model, tokenizer=byte_tokenizer())
    memory.write("日本語のテキスト。\U0001f600", document="d")
    answered = answer(model, memory, "é", max_new_tokens=20)
    assert len(answered.tokens) == len(answered.token_ids)
    assert "".join(answered.tokens).strip() == answered.text
    answered.text.encode()
    json.dumps(answered.to_json(), ensure_ascii=False).encode()
