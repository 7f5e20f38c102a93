"""Turns that clients ask to be remembered: written as they were run, and recalled later."""

import json

import torch
import openai
import pytest

from emt.model.chat import chat_ids
from emt.serving.keys import Keys
from emt.serving.limits import Limits
from emt.serving.prompt import Prompt
from emt.serving.remembering import ConversationRequest
from tests.emt.conversation.test_conversation import chatting
from tests.emt.memory.test_from_cache import read, rows_in
from tests.emt.serving.test_generation import Run
from tests.emt.serving.tiny_server import official_client

SAID = ["w5 w6 w7", "w20 w21 w22", "w5 w40"]


@pytest.fixture
def memory():
    return chatting(book=None)


@pytest.fixture
def client(memory):
    with official_client(*memory, limits=Limits(max_new_tokens=50)) as client:
        yield client


def say(client, *messages, conversation="one", stream=False, remember=True):
    """Say the last of some messages, user and assistant in turn; return the answer's text."""
    roles = ("user", "assistant")
    given = client.chat.completions.create(
        model="tiny",
        max_tokens=6,
        messages=[{"role": roles[i % 2], "content": text} for i, text in enumerate(messages)],
        stream=stream,
        extra_body={"memory": {"remember": remember, "conversation": conversation}},
    )
    if stream:
        return "".join(part.choices[0].delta.content or "" for part in given if part.choices)
    return given.choices[0].message.content


def test_turns_are_remembered_and_recalled_by_others(memory, client):
    _, memory = memory
    first = say(client, SAID[0])
    second = say(client, SAID[0], first, SAID[1], stream=True)
    assert memory.documents == ["one/0001", "one/0002"]
    catalog = memory.backend.catalog
    for number, (message, text) in enumerate(((SAID[0], first), (SAID[1], second)), 1):
        document = catalog.document(f"one/{number:04d}")
        assert document.text == f"{message}\n{text}"
        about = dict(document.metadata)
        assert about.pop("time") > 1.7e9
        assert about == {"conversation": "one", "turn": number}
    given = client.chat.completions.create(
        model="tiny", max_tokens=4, messages=[{"role": "user", "content": SAID[1]}]
    )
    assert given.choices[0].passages[0]["document"] == "one/0002"


def test_a_turn_takes_the_place_of_no_other_document(memory, client):
    _, memory = memory
    memory.write("w70 w71", document="one/0001")
    first = say(client, SAID[0])
    assert memory.backend.catalog.document("one/0001").text == "w70 w71"
    assert memory.backend.catalog.document("one/0002").text == f"{SAID[0]}\n{first}"


def test_turns_of_one_batch_are_read_each_from_its_row(memory):
    """Prompts are padded on the left, and end at different steps."""
    model, memory = memory
    memory.write(" ".join(f"w{number}" for number in range(5, 40)), document="book")
    prompts = [
        Prompt(
            token_ids=chat_ids(memory.tokenizer, [("user", text)]).tolist(),
            max_new_tokens=length,
            settings={"enabled": False},
            conversation=ConversationRequest("c", [text]),
        )
        for text, length in zip(("w5 w6 w7 w8 w9", "w50 w51"), (3, 6), strict=True)
    ]
    run = Run(model, memory, prompts)
    assert run.batches == [2]
    for number, prompt in enumerate(prompts):
        (answered,) = run.answers(number)
        document, rows = answered.turn.read
        assert document.text == f"{prompt.conversation.messages[0]}\n{answered.text}"
        new = memory.tokenizer(answered.text, add_special_tokens=False)["input_ids"]
        assert len(new) == prompt.max_new_tokens
        expected = read(memory, [*prompt.token_ids, *new])
        length = len(prompt.token_ids)  # <user> ... <end> <assistant>
        kept = [*range(1, length - 2), *range(length, length + len(new) - 1)]
        for idx, key in rows.keys.items():
            both = torch.cat([key, rows.values[idx]], dim=-1)
            torch.testing.assert_close(both, expected[idx][:, kept], rtol=0, atol=2e-5)


def test_what_the_prompt_has_is_not_recalled(client):
    first = say(client, SAID[0])
    given = client.chat.completions.create(
        model="tiny",
        max_tokens=4,
        messages=[
            {"role": "user", "content": SAID[0]},
            {"role": "assistant", "content": first},
            {"role": "user", "content": SAID[2]},
        ],
        extra_body={"memory": {"remember": True, "conversation": "one"}},
    )
    assert given.choices[0].passages == []


def test_rows_are_those_of_the_whole_prompt(memory, client):
    _, memory = memory
    text = say(client, SAID[0])
    ids = memory.tokenizer(f"<user> {SAID[0]} <end> <assistant> {text}", add_special_tokens=False)
    expected = read(memory, ids["input_ids"])
    for idx, rows in rows_in(memory, "one/0001").items():
        kept = expected[idx][:, [1, 2, 3, *range(6, 11)]]
        assert (rows - kept).abs().max() < 2e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": {"remember": True}}, "belong together"),
        ({"memory": {"conversation": "one"}}, "belong together"),
        ({"memory": {"remember": True, "conversation": "one"}, "n": 2}, "Only one answer"),
        ({"memory": {"remember": True, "conversation": "a\nb"}}, "control characters"),
        ({"memory": {"remember": True, "conversation": ""}}, "1 to 512 characters"),
    ],
)
def test_what_cannot_be_remembered_is_refused(memory, client, options, message):
    with pytest.raises(openai.BadRequestError, match=message):
        client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "w5"}], extra_body=options
        )
    assert memory[1].documents == []


@pytest.mark.parametrize(
    ("where", "status"), [({"user": ["ann", "bob"]}, 400), ({"conversation": "other"}, 403)]
)
def test_a_turn_that_a_key_could_not_see_is_refused_before_it_is_answered(
    memory, tmp_path, where, status
):
    path = tmp_path / "keys.json"
    entry = {"name": "ann", "key": "ann-ann-ann-ann-ann", "where": where, "write": True}
    path.write_text(json.dumps([entry]))
    app_options = {"keys": Keys.read(path), "limits": Limits(max_new_tokens=50)}
    with official_client(*memory, **app_options) as client:
        client.api_key = "ann-ann-ann-ann-ann"
        with pytest.raises(openai.APIStatusError, match="his key writes") as told:
            say(client, SAID[0])
        assert told.value.status_code == status
        assert b"emt_batch_answers_sum 0.0\n" in client.app.state.served.metrics.text()


def test_turns_of_a_scoped_key_are_its_own(memory, tmp_path):
    path = tmp_path / "keys.json"
    path.write_text(
        '[{"name": "ann", "key": "ann-ann-ann-ann-ann", "where": {"user": "ann"}, "write": true},'
        ' {"name": "bob", "key": "bob-bob-bob-bob-bob", "where": {"user": "bob"}, "write": true},'
        ' {"name": "eve", "key": "eve-eve-eve-eve-eve", "where": {"user": "ann"}}]'
    )
    with official_client(*memory, keys=Keys.read(path)) as client:
        ann, bob, eve = (
            client.with_options(api_key="-".join([name] * 5)) for name in ("ann", "bob", "eve")
        )
        say(ann, SAID[0])
        say(bob, SAID[0])
        with pytest.raises(openai.PermissionDeniedError, match="may not write"):
            say(eve, SAID[0])
        given = bob.chat.completions.create(
            model="tiny", max_tokens=4, messages=[{"role": "user", "content": SAID[0]}]
        )
        assert {each["document"] for each in given.choices[0].passages} == {"one/0001"}
    abouts = memory[1].backend.catalog.all_metadata()
    assert {name: about["user"] for name, about in abouts.items()} == {
        "user=ann/one/0001": "ann",
        "user=bob/one/0001": "bob",
    }
