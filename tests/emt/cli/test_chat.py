"""`emt chat`: lines in, answers out; what is said is in the store for the next process."""

import io
import signal

import pytest

from emt.cli import chat
from emt.routing import router
from tests.emt.chats import chat_tokenizer
from tests.emt.commands import emt, emt_process, refused
from tests.families import build

NEW = ("--max-new-tokens", 5)


@pytest.fixture(autouse=True)
def _all_is_relevant(monkeypatch):
    judged = router.judged
    monkeypatch.setattr(router, "judged", lambda *given: judged(*given)._replace(gain=None))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model that chats, in words, and ends no answer early."""
    folder = tmp_path_factory.mktemp("chatting")
    tokenizer = chat_tokenizer()
    tiny = build("llama", vocab_size=len(tokenizer))
    tiny.generation_config.suppress_tokens = [*range(3), *range(97, len(tokenizer))]
    tiny.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def talk(tmp_path, model, monkeypatch):
    """Return a function that says lines to `emt chat`, and returns what it printed."""

    def said(*lines, options=("--remember",)):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        given = ("--store", tmp_path / "store", "--model", model, *NEW, *options)
        return emt("chat", *given)

    return said


def test_turns_become_documents_that_later_ones_recall(talk):
    first = talk("w5 w6 w7", "", "w20 w21 w22", options=("--remember", "--conversation", "one"))
    answers = first.out.splitlines()
    assert [len(answer.split()) for answer in answers] == [5, 5]
    assert "0 documents" in first.err
    done = talk("w20 w21 w22", "/sources", "/documents", "/search w5 w6", options=())
    _, *printed = done.out.splitlines()
    assert "recalled:" in done.out
    assert any(line.strip().startswith("one/0002 ") for line in printed)
    documents = [line for line in printed if '"conversation": "one"' in line]
    assert [line.split()[0] for line in documents] == ["one/0001", "one/0002"]
    assert "[1] score" in done.out
    read = answers[0].rpartition(" ")[0]  # the last token was chosen, and not run
    assert f"w5 w6 w7\n      {read}\n" in done.out


def test_a_name_goes_on_and_is_forgotten(talk):
    one = ("--remember", "--conversation", "one")
    talk("w5 w6", options=one)
    assert "one/0002" in talk("w7 w8", "/documents", options=one).out
    done = talk("/forget", "/documents", options=one)
    assert done.out == "2 turns of 'one' forgotten.\n"


def test_where_is_what_is_recalled_and_what_turns_have(talk):
    ann = ("--remember", "--where", "user=ann", "--where", "year=1999")
    talk("w5 w6 w7", options=ann)
    done = talk("w5 w6 w7", "/documents", "/search w5 w6", options=ann)
    assert '"user": "ann"' in done.out
    assert '"year": 1999' in done.out
    assert "[1] score" in done.out
    other = talk("/search w5 w6", options=("--where", "user=bob"))
    assert "relevant to the query" in other.out


def test_without_remember_nothing_is_written(talk, tmp_path):
    talk("w5 w6")
    before = talk("/documents", options=()).out
    talk("w7 w8", options=())
    assert talk("/documents", options=()).out == before


def test_mistakes_are_told_and_the_chat_goes_on(talk):
    done = talk("/nothing", "/sources", "/search", "\udce9", "/help", "w5", "/quit", "w6")
    told = [line for line in done.err.splitlines() if line.startswith("emt: ")][1:]
    expected = ("no command '/nothing'", "no answer yet", "query is empty", "not UTF-8")
    assert len(told) == len(expected)
    assert all(each in line for each, line in zip(expected, told, strict=True))
    assert "/forget" in done.out
    assert len(done.out.splitlines()) == len(chat._HELP.splitlines()) + 1


def test_an_interrupt_ends_an_answer_and_a_second_one_drops_it(talk, monkeypatch):
    show, said = chat.show, []

    def interrupting(text):
        show(text)
        said.append(text)
        for _ in range({1: 1, 3: 2}.get(len(said), 0)):  # the third begins the second answer
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(chat, "show", interrupting)
    handler = signal.getsignal(signal.SIGINT)
    done = talk("w5 w6", "w7 w8", "w9 w10", "/documents")
    answers = [line for line in done.out.splitlines() if not line.startswith("chat-")]
    assert [len(answer.split()) for answer in answers] == [2, 1, 5]
    documents = [line.split()[0][-4:] for line in done.out.splitlines() if "rows" in line]
    assert documents == ["0001", "0002"]  # the turn that was dropped has no number
    assert signal.getsignal(signal.SIGINT) is handler


def test_another_process_finds_what_was_said_in_a_sound_store(talk, tmp_path):
    talk("w5 w6 w7", options=("--remember", "--conversation", "one"))
    store = tmp_path / "store"
    done = emt_process(("verify", store), ("list", store))
    assert "one/0001" in done.out
    assert "one/0001" in emt("search", "w5 w6", "--store", store).out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--remember", "--where", "a=1", "--where", "a=2"), "one value of 'a'"),
        (("--temperature", -1), "temperature must be"),
        (("--max-new-tokens", 0), "whole number of at least 1"),
        (("--documents", "nothing"), "nothing"),
    ],
)
def test_mistakes_in_options_are_told_at_once(talk, tmp_path, model, options, message):
    talk("w5")
    refused("chat", "--store", tmp_path / "store", "--model", model, *options, message=message)


def test_a_store_that_is_not_there_is_only_made_to_remember(tmp_path, model):
    refused("chat", "--store", tmp_path / "no", "--model", model, message="there is none")
