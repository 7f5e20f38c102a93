"""A chat in one cache is one that is read anew each time; turns are remembered as they were run."""

import itertools

import torch
import pytest

from emt import MemoryConfig, attach
from emt.answer import answer_to
from emt.conversation import conversation as module
from emt.conversation.conversation import Conversation
from emt.conversation.turns import only_asks, turns_of
from emt.errors import ConfigError, MemoryUseError
from emt.model.chat import chat_ids
from tests.emt.chats import CHAT, chat_tokenizer
from tests.emt.memory.test_from_cache import rows_in
from tests.emt.words import word_tokenizer
from tests.families import build

MESSAGES = ["w5 w6 w7", "w20 w21", "w5 w6 w30 w31"]
BOOK = " ".join(f"w{number}" for number in range(5, 60))
NEW = 6
# Of earlier answers it has the end only, as templates leave out what was thought.
REWRITING = CHAT.replace(
    "message['content']",
    "(message['content'] if message['role'] == 'user' else message['content'][-7:])",
)


def chatting(family="llama", template=CHAT, *, relevance=None, book=BOOK, **options):
    """Return a tiny model that chats, and its memory, which finds every message relevant."""
    tokenizer = chat_tokenizer(template)
    model = build(family, vocab_size=len(tokenizer), **options)
    model.generation_config.suppress_tokens = [*range(3), *range(97, len(tokenizer))]
    config = MemoryConfig(relevance=relevance, routing="words", passage_rows=20)
    memory = attach(model, config, tokenizer=tokenizer)
    if book:
        memory.write(book, document="book")
    return model, memory


def read_anew(model, memory, messages):
    """Return what the model answers to a whole chat that is read from its start."""
    ids = chat_ids(memory.tokenizer, messages)[None]
    return answer_to(model, memory, ids, "", max_new_tokens=NEW, do_sample=False)[0]


@pytest.mark.parametrize("template", [CHAT, REWRITING], ids=["as said", "rewritten"])
@pytest.mark.parametrize("enabled", [False, True], ids=["plain", "recalling"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_answers_are_those_to_the_whole_chat_read_anew(family, enabled, template):
    model, memory = chatting(family, template)
    conversation, messages = Conversation(model, memory, name="c"), []
    for message in MESSAGES:
        messages.append(("user", message))
        with memory.using(enabled=enabled):
            expected = read_anew(model, memory, messages)
        answered = conversation.ask(message, max_new_tokens=NEW, enabled=enabled)
        assert answered.token_ids == expected.token_ids
        assert [each.text for each in answered.passages] == [
            each.text for each in expected.passages
        ]
        assert bool(answered.passages) == enabled
        messages.append(("assistant", answered.text))
        assert conversation.messages == messages


def test_what_was_said_before_is_not_read_again():
    model, memory = chatting(book=None)
    conversation = Conversation(model, memory, name="c")
    widths = []
    model.register_forward_pre_hook(
        lambda module, args, given: widths.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    first = conversation.ask(MESSAGES[0], max_new_tokens=NEW)
    before = len(widths)
    conversation.ask(MESSAGES[1], max_new_tokens=NEW)
    assert len(first.token_ids) == NEW
    assert widths[0] == 6  # <user> w5 w6 w7 <end> <assistant>
    # the last token of the answer was not run; then <end> <user> w20 w21 <end> <assistant>
    assert widths[before] == 7


def test_turns_are_documents_of_what_was_run():
    model, memory = chatting(book=None)
    conversation = Conversation(model, memory, name="c", remembers=True, metadata={"user": "ann"})
    answers = [conversation.ask(message, max_new_tokens=NEW).text for message in MESSAGES]
    assert memory.documents == ["c/0001", "c/0002", "c/0003"]
    messages = []
    for turn, (message, text) in enumerate(zip(MESSAGES, answers, strict=True), 1):
        document = memory.backend.catalog.document(f"c/{turn:04d}")
        assert document.text == f"{message}\n{text}"
        about = dict(document.metadata)
        assert about.pop("time") > 1.7e9
        assert about == {"conversation": "c", "turn": turn, "user": "ann"}
        ids = chat_ids(memory.tokenizer, [*messages, ("user", message)]).tolist()
        whole = [*ids, *memory.tokenizer(text, add_special_tokens=False)["input_ids"]]
        (expected,) = memory.read(whole)
        length = len(message.split())
        kept = [*range(len(ids) - 2 - length, len(ids) - 2), *range(len(ids), len(whole) - 1)]
        for idx, rows in rows_in(memory, document.name).items():
            both = torch.cat([expected.keys[idx], expected.values[idx]], dim=-1)[:, kept]
            torch.testing.assert_close(rows, both, rtol=0, atol=2e-5)
        messages += [("user", message), ("assistant", text)]


def test_a_later_conversation_recalls_what_this_one_does_not():
    model, memory = chatting(book=None)
    conversation = Conversation(model, memory, name="one", remembers=True)
    for message in MESSAGES:
        assert not conversation.ask(message, max_new_tokens=NEW).passages
    later = Conversation(model, memory, name="two")
    recalled = later.ask("w20 w21", max_new_tokens=NEW).passages
    assert recalled[0].document == "one/0002"
    chosen = later.ask("w5 w20", max_new_tokens=NEW, documents=["one/0001"]).passages
    assert {each.document for each in chosen} == {"one/0001"}


def test_a_conversation_goes_on_and_is_forgotten():
    model, memory = chatting()
    Conversation(model, memory, name="c", remembers=True).ask(MESSAGES[0], max_new_tokens=NEW)
    other = Conversation(model, memory, name="other", remembers=True)
    other.ask(MESSAGES[0], max_new_tokens=NEW)
    again = Conversation(model, memory, name="c", remembers=True)
    again.ask(MESSAGES[1], max_new_tokens=NEW)
    assert turns_of(memory, "c") == {1: "c/0001", 2: "c/0002"}
    assert again.forget() == 2
    assert memory.documents == ["book", "other/0001"]
    assert again.messages == []
    again.ask(MESSAGES[2], max_new_tokens=NEW)
    assert turns_of(memory, "c") == {1: "c/0001"}


def test_the_oldest_turns_leave_a_full_window_and_can_be_recalled():
    model, memory = chatting(book=None, max_position_embeddings=128)
    conversation = Conversation(model, memory, name="c", remembers=True)
    for number in range(10):
        conversation.ask(f"w{20 + number} w{30 + number}", max_new_tokens=NEW)
        assert conversation.messages[0][0] == "user"
    numbers = [int(text[1:3]) for role, text in conversation.messages if role == "user"]
    assert numbers == list(range(numbers[0], 30))
    assert numbers[0] > 20
    recalled = conversation.ask("w20 w30", max_new_tokens=NEW).passages
    assert recalled[0].document == "c/0001"
    with pytest.raises(ConfigError, match="must fit the model's 128 positions"):
        conversation.ask("w5 " * 125, max_new_tokens=NEW)


def test_an_answer_stops_when_somebody_says_so_and_one_that_fails_leaves_no_trace():
    model, memory = chatting()
    conversation, expected = (Conversation(model, memory, name="c") for _ in range(2))
    pieces, steps = [], itertools.count(1)
    answered = conversation.ask(
        MESSAGES[0],
        max_new_tokens=NEW,
        on_text=pieces.append,
        should_stop=lambda: next(steps) == 2,
    )
    assert len(answered.token_ids) == 2
    assert "".join(pieces) == answered.text

    def fail(text):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conversation.ask(MESSAGES[1], max_new_tokens=NEW, on_text=fail)
    expected.ask(MESSAGES[0], max_new_tokens=2)
    last = [each.ask(MESSAGES[2], max_new_tokens=NEW) for each in (conversation, expected)]
    assert last[0].token_ids == last[1].token_ids


def test_a_turn_whose_cache_keeps_something_else_is_read():
    model, memory = chatting("deepseek_v3", book=None)
    conversation = Conversation(model, memory, name="c", remembers=True)
    answered = conversation.ask(MESSAGES[0], max_new_tokens=NEW)
    assert memory.backend.catalog.document("c/0001").text == f"{MESSAGES[0]}\n{answered.text}"


def test_a_model_that_does_not_chat_is_refused():
    model = build("llama")
    with pytest.raises(ConfigError, match="no chat template"):
        Conversation(model, attach(model, tokenizer=word_tokenizer()), name="c")
    model = build("llama")
    with pytest.raises(MemoryUseError, match="needs a tokenizer"):
        Conversation(model, attach(model), name="c")


@pytest.mark.parametrize(
    ("message", "complaint"), [(" ", "the prompt is empty"), ("\udce9", "not UTF-8")]
)
def test_a_message_that_says_nothing_is_refused(message, complaint):
    model, memory = chatting()
    with pytest.raises(ConfigError, match=complaint):
        Conversation(model, memory, name="c").ask(message)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("Where do I live?", True),
        ("Who? And when?", True),
        ("\u8c01\uff1f", True),
        ("I moved to Ostley. Do you know it?", False),
        ("Do you know Ostley? I moved there.", False),
        ("I live in Ostley", False),
        ("?", True),
    ],
)
def test_a_message_only_asks_if_each_sentence_does(message, expected):
    assert only_asks(message) == expected


def test_a_question_that_the_memory_answers_is_not_remembered(monkeypatch):
    monkeypatch.setattr(module, "only_asks", lambda message: message == MESSAGES[1])
    model, memory = chatting(book=None)
    conversation = Conversation(model, memory, name="c", remembers=True)
    conversation.ask(MESSAGES[1], max_new_tokens=NEW)  # nothing is there to answer it
    later = Conversation(model, memory, name="d", remembers=True)
    assert later.ask(MESSAGES[1], max_new_tokens=NEW).passages
    later.ask(MESSAGES[2], max_new_tokens=NEW)
    assert memory.documents == ["c/0001", "d/0002"]
