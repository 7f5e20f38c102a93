"""A tokenizer of words whose template marks who speaks."""

from tokenizers import AddedToken

from tests.emt.words import word_tokenizer

CHAT = (
    "{% for message in messages %}{{ '<' + message['role'] + '> ' + message['content'] + ' <end> ' "
    "}}{% endfor %}{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)


def chat_tokenizer(template=CHAT):
    tokenizer = word_tokenizer()
    marks = ["<user>", "<assistant>", "<end>"]
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken(mark, special=True) for mark in marks]}
    )
    tokenizer.chat_template = template
    return tokenizer
