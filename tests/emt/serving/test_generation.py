"""Batches of prompts: what each of them is answered alone, or by `emt.answer`, in another way."""

import itertools

import torch
import pytest

from emt.answer import answer
from emt.serving.access import Access
from emt.serving.generation import Generator, padded
from emt.serving.limits import Limits
from emt.serving.prompt import Answered, Failed, PendingPrompt, Piece, Prompt
from emt.serving.sampling import Sampling
from tests.emt.serving.tiny_server import TEXTS, make_memory

QUESTIONS = ("w10 w11", "w33 w34 w35 w36 w37 w38 w39", "w62", "w70 w71 w72 w8")


@pytest.fixture(scope="module")
def remembering():
    return make_memory(chat=False)


class Run:
    """Answers prompts as one batch, and keeps what each is told."""

    def __init__(self, model, memory, prompts, limits=None):
        self.batches = []
        self.generator = Generator(model, memory, limits or Limits(), self.batches.append)
        self.told = [[] for _ in prompts]
        self.pending = [
            PendingPrompt(prompt, events.append)
            for prompt, events in zip(prompts, self.told, strict=True)
        ]
        self.generator.answer(self.pending)

    def answers(self, number=0):
        last = self.told[number][-1]
        assert isinstance(last, Answered), last
        return last.answers

    def texts(self):
        return [[answer.text for answer in self.answers(i)] for i in range(len(self.told))]


def prompt(memory, text, max_new_tokens=8, **options):
    ids = memory.tokenizer(text)["input_ids"]
    return Prompt(token_ids=ids, max_new_tokens=max_new_tokens, **options)


@pytest.mark.parametrize("mode", ["passage", "token"])
def test_an_answer_of_a_batch_is_the_answer_alone(remembering, mode):
    model, memory = remembering
    settings = {"mode": mode}
    prompts = [
        prompt(memory, text, length, settings=settings)
        for text, length in zip(QUESTIONS, (8, 3, 12, 8), strict=True)
    ]
    run = Run(model, memory, prompts)
    assert run.batches == [4]
    for number, text in enumerate(QUESTIONS):
        (got,) = run.answers(number)
        expected = answer(
            model,
            memory,
            text,
            chat=False,
            max_new_tokens=prompts[number].max_new_tokens,
            mode=mode,
        )
        assert got.text == expected.text
        assert got.num_tokens == len(expected.token_ids)
        cited, right = got.sources.citations, expected.citations
        assert len(cited) == len(right) > 0
        for each, one in zip(cited, right, strict=True):
            assert each == {
                "document": one.document,
                "start": one.start,
                "end": one.end,
                "quote": one.text,
                "score": None,
                "share": pytest.approx(one.share, abs=1e-4),
                "copied": pytest.approx(one.copied, abs=1e-4),
            }
        assert [(each["document"], each["text"]) for each in got.sources.passages] == [
            (each.document, each.text) for each in expected.passages
        ]
        assert bool(got.sources.passages) == (mode == "passage")


def test_rows_of_different_scopes_are_answered_together(remembering):
    model, memory = remembering
    wanted = [
        {"documents": ["a"]},
        {"documents": ["b", "c"]},
        {},
        {"where": {"user": "c"}},
        {"documents": ["a", "b"], "where": {"user": ["b", "c"]}},
        {"documents": []},
    ]
    prompts = [prompt(memory, "w10 w33 w62", n=1 + i % 2, **w) for i, w in enumerate(wanted)]
    run = Run(model, memory, prompts, Limits(max_batch=16))
    assert run.batches == [9]
    allowed = [{"a"}, {"b", "c"}, set("abc"), {"c"}, {"b"}, set()]
    for number, (settings, names) in enumerate(zip(wanted, allowed, strict=True)):
        expected = answer(model, memory, "w10 w33 w62", chat=False, max_new_tokens=8, **settings)
        for got in run.answers(number):
            assert got.text == expected.text
            assert {each["document"] for each in got.sources.citations} <= names
            assert [each["document"] for each in got.sources.passages] == [
                each.document for each in expected.passages
            ]
            assert bool(got.sources.passages) == bool(names)


def test_pieces_are_the_texts(remembering):
    prompts = [prompt(remembering[1], text, n=2, stop=("w5",)) for text in QUESTIONS]
    run = Run(*remembering, prompts)
    for number, events in enumerate(run.told):
        *pieces, last = events
        assert isinstance(last, Answered)
        for of_answer, got in enumerate(last.answers):
            own = [piece.text for piece in pieces if piece.number == of_answer]
            assert "".join(own) == got.text == run.answers(number)[of_answer].text


def test_padding_counts_in_the_size_of_a_batch(remembering):
    """A long prompt with a short answer, and the other way round, are longer together."""
    _, memory = remembering
    prompts = [prompt(memory, "w10 " * 60, 2), prompt(memory, "w33", 60)]
    pending = [PendingPrompt(each, lambda _: None) for each in prompts]
    for max_batch_tokens, num_together in ((242, 2), (241, 1)):
        limits = Limits(max_batch_tokens=max_batch_tokens)
        batch = Generator(*remembering, limits, lambda _: None).together(pending)
        assert batch == pending[:num_together]


def test_a_short_answer_does_not_wait_for_a_long_one(remembering):
    _, memory = remembering
    order = []
    prompts = [prompt(memory, "w10", 40), prompt(memory, "w33", 2)]
    pending = [
        PendingPrompt(each, lambda event, number=number: order.append((number, type(event))))
        for number, each in enumerate(prompts)
    ]
    Generator(*remembering, Limits(), lambda _: None).answer(pending)
    short = order.index((1, Answered))
    assert order[-1] == (0, Answered)
    assert sum(kind == (0, Piece) for kind in order[short:]) > 30


def test_sampled_answers_do_not_depend_on_their_batch(remembering):
    model, memory = remembering
    sampled = [
        prompt(memory, text, n=2, sampling=Sampling(1.3, 0.95, seed))
        for seed, text in enumerate(QUESTIONS, start=3)
    ]
    together = Run(model, memory, sampled, Limits(max_batch=8)).texts()
    alone = [Run(model, memory, [each]).texts()[0] for each in sampled]
    assert together == alone
    assert len(set(itertools.chain(*together))) == 8


def test_what_one_prompt_does_wrong_harms_no_other(remembering):
    model, memory = remembering
    prompts = [
        prompt(memory, "w10"),
        prompt(memory, "w10", documents=["a", "z"]),
        prompt(memory, "w10", where={"user": None}),
    ]
    run = Run(model, memory, prompts)
    (right,), (unknown,), (filtered,) = run.told[0][-1:], run.told[1], run.told[2]
    assert isinstance(right, Answered)
    assert "no document 'z'" in unknown.error.message
    assert (unknown.error.status, filtered.error.status) == (400, 400)


def test_a_batch_that_fails_is_answered_one_by_one(remembering, monkeypatch):
    model, memory = remembering
    generate = type(model).generate

    def failing(self, input_ids, **options):
        if 62 in input_ids:
            raise RuntimeError("out of memory, say")
        return generate(self, input_ids, **options)

    monkeypatch.setattr(type(model), "generate", failing)
    run = Run(model, memory, [prompt(memory, text) for text in QUESTIONS])
    assert [type(events[-1]) for events in run.told] == [Answered, Answered, Failed, Answered]
    failed = run.told[2][-1].error
    assert failed.status == 500
    assert "memory" not in failed.message


def test_names_that_may_not_be_seen_are_as_unknown(remembering):
    _, memory = remembering
    hidden, unknown = (
        prompt(memory, "w10", documents=[name], access=Access({"user": "a"})) for name in "bz"
    )
    run = Run(*remembering, [hidden, unknown])
    messages = [events[-1].error.message for events in run.told]
    assert messages[0].replace("'b'", "'z'") == messages[1]


def test_documents_are_called_as_whoever_asks_calls_them():
    model, memory = make_memory(texts={}, chat=False)
    memory.write(TEXTS["a"], document="user=ann/notes", metadata={"user": "ann"})
    run = Run(
        model,
        memory,
        [prompt(memory, "w10", access=Access({"user": "ann"}), by_token=True)],
    )
    (got,) = run.answers()
    sources = [source for token in got.sources.tokens for source in token["sources"]]
    cited = [*got.sources.citations, *got.sources.passages, *sources]
    assert {each["document"] for each in cited} == {"notes"}


def test_cancelled_rows_stop_and_the_others_go_on(remembering):
    _, memory = remembering
    told = []
    first = PendingPrompt(prompt(memory, "w10", 50), lambda _: first.cancel())
    second = PendingPrompt(prompt(memory, "w33", 5), told.append)
    gone = PendingPrompt(prompt(memory, "w62", 5), lambda _: pytest.fail("nobody listens"))
    gone.cancel()
    widths = []
    handle = remembering[0].register_forward_pre_hook(
        lambda *call: widths.append(call[2]["input_ids"].shape), with_kwargs=True
    )
    Generator(*remembering, Limits(), lambda _: None).answer([first, second, gone])
    handle.remove()
    assert isinstance(told[-1], Answered)
    assert not first.is_settled
    assert widths[-4:] == [(2, 1)] * 4  # after the prompt; what comes before judges passages
    assert widths[-5] == (2, 2)


@pytest.mark.parametrize("text", ["w10 w11 w12", "w33"])
def test_sources_of_each_token(remembering, text):
    model, memory = remembering
    (got,) = Run(model, memory, [prompt(memory, text, by_token=True)]).answers()
    expected = answer(model, memory, text, chat=False, max_new_tokens=8)
    tokens = got.sources.tokens
    assert "".join(token["text"] for token in tokens) == got.text
    assert len(tokens) == len(expected.token_citations) == got.num_tokens
    for token, rows in zip(tokens, expected.token_citations, strict=True):
        assert len(token["sources"]) == len(rows) > 0
        for source, row in zip(token["sources"], rows, strict=True):
            word = memory.tokenizer.convert_ids_to_tokens(
                int(memory.backend.catalog.document(row.document).token_ids[row.token])
            )
            assert TEXTS[source["document"]][source["start"] : source["end"]] == word
            assert source["share"] == pytest.approx(row.share, abs=1e-4)


def test_the_plain_model_has_no_sources(remembering):
    model, memory = remembering
    settings = {"enabled": False}
    run = Run(model, memory, [prompt(memory, "w10", settings=settings, by_token=True)])
    (got,) = run.answers()
    assert (
        got.text == answer(model, memory, "w10", chat=False, max_new_tokens=8, enabled=False).text
    )
    assert (got.sources.citations, got.sources.passages) == ([], [])
    assert "".join(token["text"] for token in got.sources.tokens) == got.text


def test_an_answer_ends_at_an_end_id_or_a_stop_string_or_its_length(remembering):
    model, memory = remembering
    whole = Run(model, memory, [prompt(memory, "w10", 20)]).answers()[0]
    words = whole.text.split()
    (stopped,) = Run(model, memory, [prompt(memory, "w10", 20, stop=(words[3],))]).answers()
    assert stopped.text == " ".join(words[: words.index(words[3])])
    assert (stopped.reason, whole.reason, whole.num_tokens) == ("stop", "length", 20)
    end = memory.tokenizer.convert_tokens_to_ids(words[4])
    model.generation_config.eos_token_id = [end, 2]
    try:
        (ended,) = Run(model, memory, [prompt(memory, "w10", 20)]).answers()
    finally:
        model.generation_config.eos_token_id = 2
    assert ended.reason == "stop"
    assert ended.num_tokens == words.index(words[4]) + 1


def test_rows_end_before_the_last_position():
    """Recalled rows stand on positions, too."""
    model, memory = make_memory(chat=False, passage_rows=16)
    model.config.max_position_embeddings = 40
    model.config.get_text_config().max_position_embeddings = 40
    run = Run(model, memory, [prompt(memory, "w10 w11", 37), prompt(memory, "w33", 5)])
    (got,), (other,) = run.answers(0), run.answers(1)
    assert got.reason == "length"
    assert 3 + 16 < 40 - got.num_tokens <= 3 + 16 + 4 + 1
    assert other.num_tokens == 5


def test_which_prompts_are_answered_together():
    generator = Generator(None, None, Limits(max_batch=4, max_batch_tokens=100), None)

    def pending(length=2, new=3, is_cancelled=False, **options):
        one = PendingPrompt(Prompt([5] * length, new, **options), print)
        one.is_cancelled = is_cancelled
        return one

    def numbers(*waiting):
        batch = generator.together(waiting)
        return [number for number, one in enumerate(waiting) if one in batch]

    other = {"settings": {"mode": "token"}}
    assert numbers(pending(), pending(), pending()) == [0, 1, 2]
    assert numbers(*[pending() for _ in range(6)]) == [0, 1, 2, 3]
    assert numbers(pending(n=3), pending(n=2), pending()) == [0, 2]
    assert numbers(pending(), pending(**other), pending()) == [0, 2]
    assert numbers(pending(**other), pending(), pending(**other)) == [0, 2]
    assert numbers(pending(), pending(40, 30), pending(20, 10), pending()) == [0, 2, 3]
    assert numbers(pending(200), pending()) == [0]  # what is too wide is answered alone
    gone = pending(is_cancelled=True, **other)
    assert numbers(gone, pending(), pending(is_cancelled=True), pending()) == [0, 1, 2, 3]


def test_padding_is_masked_and_adds_no_token():
    ids, mask = padded([[5, 6, 7], [8], [9, 4]])
    assert ids.tolist() == [[5, 6, 7], [8, 8, 8], [9, 9, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1], [0, 1, 1]]
    assert ids.dtype == mask.dtype == torch.int64


def test_errors_of_settings_are_told(remembering):
    model, memory = remembering
    run = Run(model, memory, [prompt(memory, "w10", settings={"mode": "sideways"})])
    error = run.told[0][-1].error
    assert error.status == 400
    assert "sideways" in error.message
