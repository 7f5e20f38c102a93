"""A user's message as a prompt; `tests/emt/routing/test_question.py` finds it again."""

import pytest

from emt.errors import ConfigError
from emt.model.chat import chat_ids, in_template, last_message, prompt_ids
from tests.emt.words import word_tokenizer

TEMPLATE = "{% for m in messages %}<bos> w90 {{ m.content }} w91 {% endfor %}"
PLAIN, CHAT = [1, 5, 9], [1, 90, 5, 9, 91]  # <bos> is added once


def tokenizer_with(template):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def test_the_template_is_used_if_there_is_one():
    tokenizer = tokenizer_with(TEMPLATE)
    assert in_template(tokenizer, "w5 w9").split() == ["<bos>", "w90", "w5", "w9", "w91"]
    assert in_template(tokenizer, "w5 w9", chat=False) is None
    for chat, expected in ((None, CHAT), (True, CHAT), (False, PLAIN)):
        assert prompt_ids(tokenizer, "w5 w9", chat).tolist() == expected


EACH = "{% for m in messages %}"
NO_TEMPLATES = [
    (None, "tokenizer has no chat template"),
    ("", "tokenizer has no chat template"),
    ("{{ raise_exception('no') }}", "chat template does not take a user's message: no"),
    ("{{ '' }}", "leaves the message out"),
    ("<bos> w90 w91", "leaves the message out"),
    (EACH + "{{ m.content }", "does not take a user's message: unexpected '}'"),
    (
        EACH + "{{ m.parts[0].name }}{{ m.content }}{% endfor %}",
        "does not take .* no attribute 'parts'",
    ),
    ({"tools": EACH + "{{ m.content }}{% endfor %}", "search": "{{ 1 }}"}, "does not take "),
    (
        EACH + "{% if m.content != 'Xylophone.' %}{{ raise_exception('odd') }}{% endif %}"
        "{{ m.content }}{% endfor %}",
        "does not take a user's message: odd",
    ),
]


@pytest.mark.parametrize(("template", "message"), NO_TEMPLATES)
def test_without_a_template_for_a_message_alone_it_is_a_plain_text(template, message):
    tokenizer = tokenizer_with(template)
    assert in_template(tokenizer, "w5 w9") is None
    assert prompt_ids(tokenizer, "w5 w9").tolist() == PLAIN
    with pytest.raises(ConfigError, match=f"{message}.* Use --no-chat"):
        prompt_ids(tokenizer, "w5 w9", chat=True)
    assert last_message(PLAIN, tokenizer) is None


def test_a_whole_chat_becomes_the_prompt_for_the_next_message():
    tokenizer = word_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<bos> {{ 'w90' if m.role == 'user' else 'w91' }} {{ m.content }} "
        "{% endfor %}{% if add_generation_prompt %}w92{% endif %}"
    )
    ids = chat_ids(tokenizer, [("user", "w3"), ("assistant", "w4 w5"), ("user", "w6")])
    assert ids.tolist() == [1, 90, 3, 1, 91, 4, 5, 1, 90, 6, 92]
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="no chat template"):
        chat_ids(tokenizer, [("user", "w3")])


def test_a_template_may_want_contents_in_parts():
    part = "{% for c in m.content %}{{ c.text }}{% endfor %}"
    tokenizer = tokenizer_with(f"{EACH}<bos> w90 {part} w91 {{% endfor %}}")
    assert prompt_ids(tokenizer, "w5 w9").tolist() == CHAT
