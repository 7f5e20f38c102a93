"""One prompt, one answer: against `model.generate` called by hand."""

import json

import torch
import pytest

from emt import MemoryConfig, attach
from emt.answer import generate
from emt.citations.citing import cite, cite_tokens, content_layers
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
    memory = attach(model, MemoryConfig(topk=4), tokenizer=word_tokenizer())
    memory.write(TEXT, document="d")
    return model, memory


def by_hand(model, input_ids, max_new_tokens=7):
    input_ids = torch.tensor([input_ids])
    output = model.generate(input_ids, max_new_tokens=max_new_tokens, do_sample=False)
    return output[0, input_ids.shape[1] :].tolist()


def test_an_answer_is_what_the_model_generates(remembering):
    model, memory = remembering
    answer = generate(model, memory, PROMPT, max_new_tokens=7)
    assert answer.prompt == PROMPT
    assert answer.token_ids == by_hand(model, [1, 5, 9, 33])
    assert answer.tokens == [memory.tokenizer.decode([token]) for token in answer.token_ids]
    assert answer.text == memory.tokenizer.decode(answer.token_ids, skip_special_tokens=True)
    assert answer.timings["generate_seconds"] > 0
    with memory.recording() as recording:
        by_hand(model, [1, 5, 9, 33])
    assert answer.citations == cite(memory, recording, layers=content_layers(memory))
    assert answer.token_citations == cite_tokens(memory, recording, layers=content_layers(memory))
    assert len(answer.token_citations) == len(answer.token_ids)


def test_topk_and_no_memory(remembering):
    model, memory = remembering
    ids = [1, 5, 9, 33]
    with memory.using(topk=1):
        one = by_hand(model, ids)
    with memory.using(enabled=False):
        none = by_hand(model, ids)
    assert one != none
    assert generate(model, memory, PROMPT, max_new_tokens=7, topk=1).token_ids == one
    plain = generate(model, memory, PROMPT, max_new_tokens=7, use_memory=False)
    assert plain.token_ids == none
    assert (plain.citations, plain.token_citations) == ([], [])
    assert [token["rows"] for token in plain.to_json()["tokens"]] == [[] for _ in none]
    assert memory.config.topk == 4


def test_an_uncertain_answer_is_redone_and_says_what_it_cost(remembering):
    model, memory = remembering
    always = {"entropy": 0, "topk": 9}
    with memory.using(uncertainty=always):
        expected = by_hand(model, [1, 5, 9, 33])
    answer = generate(model, memory, PROMPT, max_new_tokens=7, uncertainty=always)
    assert answer.token_ids == expected != by_hand(model, [1, 5, 9, 33])
    assert (answer.num_redone, answer.num_retrieved) == (7, 7 * 3 * 4 * (4 + 9))  # layers, heads
    plain = generate(model, memory, PROMPT, max_new_tokens=7)
    assert (plain.num_redone, plain.num_retrieved) == (0, 7 * 3 * 4 * 4)
    with pytest.raises(ConfigError, match=r"uncertainty's topk \(4\) must be above topk \(4\)"):
        generate(model, memory, PROMPT, uncertainty={"entropy": 1.0, "topk": 4})


def test_json_has_it_all_in_plain_types(remembering):
    model, memory = remembering
    answer = generate(model, memory, PROMPT, max_new_tokens=3)
    found = json.loads(json.dumps(answer.to_json()))
    assert list(found) == [
        *("prompt", "text", "token_ids", "timings", "num_redone", "num_retrieved"),
        *("citations", "passages", "tokens"),
    ]
    assert found["token_ids"] == answer.token_ids == [token["id"] for token in found["tokens"]]
    assert set(found["citations"][0]) == {"document", "start", "end", "text", "share"}
    assert set(found["tokens"][0]["rows"][0]) == {"row", "document", "token", "share"}
    assert found["citations"][0]["share"] == answer.citations[0].share


def test_chat_templates_are_used_if_there_is_one(remembering):
    model, memory = remembering
    bare, chat = [1, 5, 9, 33], [1, 90, 5, 9, 33, 91]
    expected = {False: by_hand(model, bare), True: by_hand(model, chat)}
    assert expected[False] != expected[True]
    with pytest.raises(ConfigError, match="tokenizer has no chat template"):
        generate(model, memory, PROMPT, chat=True)
    memory.tokenizer.chat_template = TEMPLATE
    for option, used in ((None, True), (True, True), (False, False)):
        answer = generate(model, memory, PROMPT, chat=option, max_new_tokens=7)
        assert answer.token_ids == expected[used]
        assert answer.prompt == PROMPT


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "the prompt is empty. Ask something."),
        (" \n", {}, "the prompt is empty. Ask something."),
        ("w5 \udce9", {}, "the prompt is not UTF-8. Convert it."),
        (PROMPT, {"max_new_tokens": 0}, "max_new_tokens must be at least 1; got 0."),
        (
            PROMPT,
            {"topk": 0, "max_new_tokens": 5},
            "topk must be a whole number of at least 1, or 'auto'; got 0.",
        ),
        (PROMPT, {"max_new_tokens": 29}, "the prompt's 4 tokens and 29 new ones must fit the "),
        ("w5 " * 40, {"max_new_tokens": 1}, "the prompt's 41 tokens and 1 new ones must fit the "),
    ],
)
def test_prompts_that_cannot_be_answered(prompt, options, message):
    model = build("llama", max_position_embeddings=32)
    memory = attach(model, tokenizer=word_tokenizer())
    with pytest.raises(ConfigError) as caught:
        generate(model, memory, prompt, **options)
    assert str(caught.value).startswith(message)
    assert generate(model, memory, PROMPT, max_new_tokens=28).token_ids


def test_text_needs_a_tokenizer():
    model = build("llama")
    with pytest.raises(MemoryUseError, match="needs a tokenizer"):
        generate(model, attach(model), PROMPT)


def test_an_empty_memory_answers_without_citations():
    model = build("llama")
    memory = attach(model, tokenizer=word_tokenizer())
    answer = generate(model, memory, PROMPT, max_new_tokens=3)
    assert answer.token_ids == by_hand(model, [1, 5, 9, 33], 3)
    assert answer.citations == []


def test_generation_is_greedy_whatever_the_checkpoint_says(remembering):
    model, memory = remembering
    expected = generate(model, memory, PROMPT, max_new_tokens=7).token_ids
    model.generation_config.num_beams = 3
    answer = generate(model, memory, PROMPT, max_new_tokens=7)
    assert answer.token_ids == expected
    assert len(answer.token_citations) == len(expected)


def test_half_a_character_is_shown_as_the_replacement_character():
    model = build("llama", vocab_size=BYTES_VOCAB_SIZE)
    memory = attach(model, tokenizer=byte_tokenizer())
    memory.write("日本語のテキスト。\U0001f600", document="d")
    answer = generate(model, memory, "é", max_new_tokens=20)
    assert len(answer.tokens) == len(answer.token_ids)
    answer.text.encode()
    json.dumps(answer.to_json(), ensure_ascii=False).encode()
