"""Where a prompt asks, in the chat templates of several families; prompts without padding."""

import functools
from types import SimpleNamespace

import torch
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from emt.modes.passage.batch import same_runs, unpadded
from emt.passage import Question
from emt.routing.question import Asking, has_message, question_of

LOOP = "{% for message in messages %}"
TEMPLATES = {
    "chatml": (
        "{% if messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
        + LOOP
        + "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama3": (
        "{{ '<bos>' }}"
        + LOOP
        + "{{ '<|start|>' + message['role'] + '<|end|>\n\n' + message['content'] + '<|eot|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
    ),
    "gemma": (
        "{{ '<bos>' }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}"
        + LOOP
        + "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else 'user') + '\n' + "
        "message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "mistral": (
        "{{ '<bos>' }}"
        + LOOP
        + "{% if message['role'] == 'assistant' %}{{ ' ' + message['content'] + '<eos>' }}"
        "{% else %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
    ),
    "no marks that are special": (
        LOOP + "{{ '### ' + message['role'] + ':\n' + message['content'] + '\n\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
    ),
}
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|eot|>", "<bos>", "<eos>"]
SPECIAL += ["<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]"]
MESSAGES = [
    "Who wrote the book?",
    "who wrote the book?",
    "\n\nAfter two lines",
    "  spaces before",
    "1066 was when?",
    "élan vital",
    "文 字",
    "user",
]


@functools.cache
def trained(kind):
    """Return a tokenizer whose words join with the space or line before them."""
    tokenizer = Tokenizer(models.BPE(unk_token=None, byte_fallback=False))
    if kind == "bytes":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=SPECIAL,
        show_progress=False,
        initial_alphabet=alphabet if kind == "bytes" else [chr(code) for code in range(32, 127)],
    )
    text = "\n\nuser\n\n assistant\n who wrote the book ### user:\n\n A \n\nAfter " * 20
    tokenizer.train_from_iterator([text, *MESSAGES * 3, "Xylophone. Quokka. Zeppelin."], trainer)
    return tokenizer


def tokenizer_of(template, kind="bytes"):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained(kind), bos_token="<bos>", eos_token="<eos>"
    )
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken(name, special=True) for name in SPECIAL]}
    )
    tokenizer.chat_template = template
    return tokenizer


def ids_of(tokenizer, chat, prompt=True):
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=prompt, tokenize=False)
    return text, torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])


def as_chat(messages, system=None):
    roles = ("user", "assistant")
    chat = [{"role": roles[i % 2], "content": text} for i, text in enumerate(messages)]
    return [{"role": "system", "content": system}, *chat] if system else chat


@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, "bytes") for name in TEMPLATES), ("mistral", "spaces"), ("llama3", "spaces")],
)
def test_the_last_message_asks(name, kind):
    tokenizer = tokenizer_of(TEMPLATES[name], kind)
    systems = [None] if name in ("gemma", "mistral") else [None, "You are a pirate."]
    for system in systems:
        for message in MESSAGES:
            for before in ([], ["Who are you?", "A book."], ["a", "b", "who wrote?", "c"]):
                text, ids = ids_of(tokenizer, as_chat([*before, message], system))
                question = question_of(ids, tokenizer)
                assert has_message(ids, tokenizer)
                assert question.at > 0
                if name.startswith("no marks") and "\n" in message:
                    continue  # such a message ends at its first line
                asked = tokenizer.decode(ids[question.first : question.stop])
                assert asked.strip() == message.strip()
                assert question.at == question.first
                begin = text.rindex(message.strip())
                ahead = tokenizer.decode(ids[: question.at])
                assert len(ahead.rstrip()) >= len(text[:begin].rstrip()) - 1


def test_passages_stand_right_before_the_message():
    tokenizer = tokenizer_of(TEMPLATES["chatml"])
    _, ids = ids_of(tokenizer, as_chat(["Who wrote the book?"]))
    question = question_of(ids, tokenizer)
    assert tokenizer.decode(ids[: question.at]).endswith("<|im_start|>user\n")


def test_a_long_message_asks_at_its_end():
    tokenizer = tokenizer_of(TEMPLATES["llama3"])
    _, ids = ids_of(tokenizer, as_chat(["who wrote the book " * 40]))
    question = question_of(ids, tokenizer)
    assert question.stop - question.first == 64
    assert ids[question.stop] == tokenizer.convert_tokens_to_ids("<|eot|>")
    assert tokenizer.decode(ids[: question.at]).rstrip().endswith("<|start|>user<|end|>")


def test_an_answer_that_has_begun_does_not_ask():
    tokenizer = tokenizer_of(TEMPLATES["chatml"])
    _, ids = ids_of(tokenizer, as_chat(["who wrote the book?", "the user wrote"]), prompt=False)
    question = question_of(ids, tokenizer)
    assert tokenizer.decode(ids[question.first : question.stop]) == "who wrote the book?"


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{{ raise_exception('never') }}",
        "{{ 'the same whatever is said' }}",
        LOOP + "{{ message['content'] }}{% endfor %}",
        LOOP + "{{ ' ' + message['content'] + ' ' }}{% endfor %}",
    ],
)
def test_without_marks_a_prompt_is_a_plain_text(template):
    tokenizer = tokenizer_of(template)
    ids = torch.tensor(tokenizer("who wrote the book? " * 20)["input_ids"])
    assert question_of(ids, tokenizer) == Question(0, len(ids) - 64, len(ids))
    assert not has_message(ids, tokenizer)


def test_plain_texts():
    assert question_of(torch.arange(10), None) == Question(0, 0, 10)
    assert question_of(torch.arange(100), None) == Question(0, 36, 100)
    assert question_of(torch.arange(0), None) == Question(0, 0, 0)
    tokenizer = tokenizer_of(TEMPLATES["chatml"])
    ids = torch.tensor(tokenizer("who wrote the book?")["input_ids"])
    assert question_of(ids, tokenizer) == Question(0, 0, len(ids))


def new_tokens(index, num_tokens, padding=None):
    return SimpleNamespace(index=torch.tensor(index), num_tokens=num_tokens, padding=padding)


def test_padding_is_left_out():
    ids = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10], [0, 0, 0, 4]])
    expected = [[5, 6], [7, 8, 9, 10], [4]]
    mask = (ids != 0).long()
    found = unpadded(ids, new_tokens([[0] * 4] * 3, 4, mask))
    assert [row.tolist() for row in found] == expected
    for fill in (0, 1):  # what generate gives positions of padding, which only they tell then
        index = [[fill, fill, 0, 1], [0, 1, 2, 3], [fill, fill, fill, 0]]
        found = unpadded(ids, new_tokens(index, 4))
        assert [row.tolist() for row in found] == expected
    found = unpadded(ids, new_tokens([[0, 1, 2, 3]], 4))
    assert [row.tolist() for row in found] == ids.tolist()
    right = torch.tensor([[5, 6, 0], [7, 8, 9]])
    found = unpadded(right, new_tokens([[0, 1, 1], [0, 1, 2]], 3, (right != 0).long()))
    assert [row.tolist() for row in found] == [[5, 6], [7, 8, 9]]
    # Drafted tokens may follow the prompt.
    found = unpadded(ids[:, :3], new_tokens([[0, 0, 0, 1], [0, 1, 2, 3], [0, 0, 0, 0]], 4))
    assert [row.tolist() for row in found] == [[5], [7, 8, 9], []]


@pytest.mark.parametrize(
    ("prompts", "times"),
    [("a", 1), ("aa", 2), ("ab", 1), ("aabb", 2), ("aaab", 1), ("aaabbb", 3), ("aaaa", 4), ("", 1)],
)
def test_equal_prompts_in_a_row(prompts, times):
    found = [torch.tensor([ord(letter)] * (1 + ord(letter) % 2)) for letter in prompts]
    assert same_runs(found) == times


def test_of_a_long_prompt_64_tokens_before_the_message_and_what_asks_are_read():
    prompt = torch.arange(500)
    asking = Asking.of(prompt, Question(200, 436, 500), 0)
    assert torch.equal(asking.token_ids, torch.cat([prompt[136:200], prompt[436:]]))
    assert (asking.at, asking.tokens) == (64, list(range(64, 128)))
    asking = Asking.of(prompt, Question(9, 9, 12), 0)
    assert torch.equal(asking.token_ids, prompt[:12])
    assert (asking.at, asking.tokens) == (9, [9, 10, 11])


@pytest.mark.parametrize("num_generated", [1, 32, 33, 480])
def test_the_last_32_generated_tokens_ask_after_all_that_stands_before_them(num_generated):
    prompt = torch.arange(500)
    question = Question(5, 8, 15)  # 5 tokens end the prompt
    asking = Asking.of(prompt[: 20 + num_generated], question, num_generated)
    expected = torch.cat([prompt[:5], prompt[8 : 20 + num_generated]])
    assert torch.equal(asking.token_ids, expected)
    asked = asking.token_ids[asking.tokens].tolist()
    newest = range(20 + num_generated - min(num_generated, 32), 20 + num_generated)
    assert asked == [*range(8, 15), *newest]
