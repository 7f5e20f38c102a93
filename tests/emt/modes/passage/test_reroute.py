"""Passages found anew: while an answer is generated, and for a message added to a cached chat.

Expected is a run whose rows were swapped by hand, through `Recall` alone.
"""

import copy
from dataclasses import replace

import torch
import pytest

from emt.errors import ConfigError
from emt.modes.passage.exchange import exchanged
from emt.modes.passage.locate import locate
from emt.modes.passage.rows import PlacedRows
from emt.passage import Passage, Question, Routed, RoutedPassage
from emt.routing.head_search import HeadSearch
from emt.routing.question import question_of
from emt.routing.router import Router
from tests.emt.chats import chat_tokenizer
from tests.emt.routing.worlds import (
    GREEDY,
    HEADS,
    NAMES,
    ROWS,
    asked,
    build,
    chosen,
    document,
    put,
    routing,
    tokens,
)


def steps_of(model, prompt, answer, recall=None, swaps=None):
    """Feed a prompt and then an answer token by token, swapping rows by hand on the way."""
    output = model(prompt[None], use_cache=True)
    found = [output.logits[0, -1]]
    for count, token in enumerate(answer, 1):
        if swaps and count in swaps:
            recall.state = replace(recall.state, rows=swaps[count])
        output = model(token[None, None], past_key_values=output.past_key_values, use_cache=True)
        found.append(output.logits[0, -1])
    return torch.stack(found)


def read(memory, passages, at=0):
    model = memory._attached("test")
    (place,) = locate(memory.backend, [passages], [at])
    return PlacedRows.read(model, memory.backend, [place])


@pytest.fixture
def _by_last_token(monkeypatch):
    """Route by a prompt's last token, as random models move on only now and then."""

    def route(self, token_ids, backend, config, *, num_rows, num_generated=0, **_):
        question = question_of(token_ids[: len(token_ids) - num_generated], self._tokenizer)
        last = int(token_ids[-1] if num_generated else token_ids[question.stop - 1])
        found = [Passage(NAMES[last % 3], last % 40, last % 40 + 12)] if num_rows else []
        return Routed(question, tuple(RoutedPassage(one, 0.5) for one in found), 0.5)

    monkeypatch.setattr(Router, "route", route)


@torch.no_grad()
@pytest.mark.usefixtures("_by_last_token")
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "mpt"])
def test_an_answer_that_moves_on_is_given_other_rows(model_type):
    more = {"sliding_window": 16} if model_type == "gemma3_text" else {}
    model = build(model_type, **more)
    memory = routing(model, reroute=4, heads=((1, 1), (1, 3)) if more else HEADS)
    prompt = asked(0)
    answer = torch.cat([document(2)[30:36], document(1)[40:50]])
    with memory.recording() as recording:
        found = steps_of(model, prompt, answer)
    first, *later = recording.routed
    with memory.using(reroute=None):
        kept = steps_of(model, prompt, answer)
    assert torch.equal(kept[:4], found[:4])
    assert (kept - found).abs().max() > 1e-3
    rows, taken, swapped = read(memory, put(first)), iter(later), {}
    count = rows.ids.shape[1]
    for step in range(4, len(answer) + 1, 4):
        last = int(answer[step - 1])
        document_name, start = NAMES[last % 3], last % 40
        stored = memory.backend.catalog.document(document_name)
        best = range(stored.first_row + start, stored.first_row + start + 12)
        if 2 * len(set(best) & set(rows.ids[0].tolist())) >= len(best):
            continue
        passages = put(next(taken))
        assert [one.document for one in passages] == [document_name]
        assert passages[0].first <= start
        rows = swapped[step] = read(memory, passages)
        assert rows.ids.shape == (1, count)
        assert len(set(best) & set(rows.ids[0].tolist())) >= count - 4
    assert swapped
    assert next(taken, None) is None
    with memory.recalling(put(first)) as recall:
        by_hand = steps_of(model, prompt, answer, recall, swapped)
    assert torch.equal(by_hand, found)


@torch.no_grad()
def test_the_question_and_what_was_generated_ask(monkeypatch):
    model = build("llama")
    memory = routing(model)
    prompt, answer = tokens(90, 8), tokens(50, 9)
    own, seen = HeadSearch.hits, []

    def hits(self, token_ids, asking, backend, **options):
        seen.append(token_ids[asking].tolist())
        return own(self, token_ids, asking, backend, **options)

    monkeypatch.setattr(HeadSearch, "hits", hits)
    both = torch.cat([prompt, answer])
    for count in (0, 1, 50):
        memory._modes.routing.route(memory.new_turn(), [both[: 90 + count]], num_generated=count)
    question = prompt[26:].tolist()
    new = answer.tolist()
    assert seen == [question, [*question, new[0]], [*question, *new[-32:]]]


def test_nothing_changes_while_the_passage_stays_the_same(monkeypatch):
    model = build("llama")
    memory = routing(model, candidates=0)
    expected = chosen(model, [asked(0), asked(1)])
    own, asked_anew = Router.route, []

    def same(self, token_ids, backend, config, **options):
        generated = options.pop("num_generated", 0)
        asked_anew.append(generated)
        return own(self, token_ids[: len(token_ids) - generated], backend, config, **options)

    monkeypatch.setattr(Router, "route", same)
    with memory.using(reroute=2), memory.recording() as recording:
        assert chosen(model, [asked(0), asked(1)]) == expected
    assert asked_anew == [0, 0, 2, 2, 4, 4, 6, 6]
    assert len(recording.routed) == 2


@pytest.mark.usefixtures("_by_last_token")
def test_a_batch_swaps_prompt_by_prompt():
    model = build("llama")
    memory = routing(model, reroute=1)
    prompts = [asked(0, length=12), asked(1, length=4), asked(2)]
    alone = []
    for prompt in prompts:
        alone += chosen(model, [prompt], max_new_tokens=12)
    with memory.recording() as recording:
        assert chosen(model, prompts, max_new_tokens=12) == alone
    assert len(recording.routed) > 3
    with memory.using(reroute=None):
        assert chosen(model, prompts, max_new_tokens=12) != alone
    assert chosen(model, prompts, max_new_tokens=12, cache_implementation="static") == alone


@torch.no_grad()
@pytest.mark.usefixtures("_by_last_token")
def test_equal_prompts_go_their_own_ways():
    model = build("llama")
    memory = routing(model, reroute=2)
    prompt = asked(0)
    answers = torch.stack([document(1)[30:40], document(2)[20:30]])
    alone = [steps_of(model, prompt, answer) for answer in answers]
    output = model(prompt.repeat(2, 1), use_cache=True)
    for step, pair in enumerate(answers.T):
        output = model(pair[:, None], past_key_values=output.past_key_values, use_cache=True)
        for row in range(2):
            assert (output.logits[row, -1] - alone[row][step + 1]).abs().max() <= 2e-5
    assert memory.route(prompt).passages


@torch.no_grad()
@pytest.mark.usefixtures("_by_last_token")
def test_copies_of_a_cache_go_their_own_ways():
    model = build("llama")
    routing(model, reroute=2)
    prompt = asked(0)
    answers = [document(1)[30:40], document(2)[20:30]]
    alone = [steps_of(model, prompt, answer)[1:] for answer in answers]
    caches = [model(prompt[None], use_cache=True).past_key_values]
    caches.append(copy.deepcopy(caches[0]))
    for step in range(10):
        for row in range(2):
            token = answers[row][step]
            logits = model(token[None, None], past_key_values=caches[row]).logits[0, -1]
            assert torch.equal(logits, alone[row][step])


@torch.no_grad()
@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize("count", [5, ROWS, 40, 69, 70, 72])
def test_rows_are_swapped_for_exactly_as_many(count, at):
    memory = routing(build("llama"))
    rows = read(memory, [Passage("three", 0, count)], at)
    size = len(document(0))
    for found in (
        [Passage("one", 0, 3)],
        [Passage("one", 66, size), Passage("two", 10, 20)],
        [Passage("one", 30, 40), Passage("one", 50, 60)],
        [Passage("two", 2, 40), Passage("one", 0, 8), Passage("one", 40, 44)],
    ):
        routed = Routed(
            Question(at, at, at + 1), tuple(RoutedPassage(one, 0.5) for one in found), 0.5
        )
        swapped = exchanged(rows, 0, routed, memory.backend)
        if swapped is None:
            assert count > 66  # not enough rows around the passages
            continue
        place, taken = swapped
        assert len(place.ids) == len(set(place.ids)) == count
        assert place.at == at
        first = memory.backend.catalog.document(found[0].document).first_row
        best = set(range(first + found[0].first, first + found[0].stop))
        num_sinks = 0 if at else 4  # of them at most, before the passages
        assert len(best & set(place.ids)) >= min(len(best), count - num_sinks)
        assert locate(memory.backend, [put(taken)], [at]) == [place]
    same = Routed(Question(at, at, at + 1), (RoutedPassage(Passage("three", 2, 9), 0.5),), 0.5)
    assert exchanged(rows, 0, same, memory.backend) is None
    for first, is_kept in (
        (count - 5, True),
        (count - 2, False),
    ):  # half of it is recalled, or less
        beside = RoutedPassage(Passage("three", first, first + 10), 0.5)
        routed = Routed(Question(at, at, at + 1), (beside,), 0.5)
        assert (exchanged(rows, 0, routed, memory.backend) is None) == is_kept
    nothing = Routed(Question(at, at, at + 1), (), 0.1)
    assert exchanged(rows, 0, nothing, memory.backend) is None


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2},
        {"num_return_sequences": 2, "do_sample": True},
        {"use_cache": False},
        {"prompt_lookup_num_tokens": 3, "use_cache": True},
    ],
)
def test_ways_without_steps_of_one_token_are_refused(options):
    model = build("llama")
    memory = routing(model, reroute=2)
    with pytest.raises(ConfigError, match=f"reroute .* got {next(iter(options))}"):
        chosen(model, [asked(0)], **options)
    with memory.using(reroute=None):
        chosen(model, [asked(0)], **options)
    with memory.using(mode="token"):
        chosen(model, [asked(0)], **options)


def chat(tokenizer, *messages):
    roles = ["user", "assistant"]
    text = tokenizer.apply_chat_template(
        [{"role": roles[i % 2], "content": content} for i, content in enumerate(messages)],
        add_generation_prompt=True,
        tokenize=False,
    )
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])


def words(number, start=20):
    return " ".join(f"w{token}" for token in document(number)[start : start + 8].tolist())


def chatting(**settings):
    tokenizer = chat_tokenizer()
    model = build("llama", vocab_size=len(tokenizer))
    return model, tokenizer, routing(model, tokenizer=tokenizer, **settings)


def test_a_chat_is_routed_by_its_last_message():
    _, tokenizer, memory = chatting()
    ids = chat(tokenizer, words(0), "w5 w6", words(1))
    routed = memory.route(ids)
    header = tokenizer.convert_tokens_to_ids("<user>")
    at = int((ids == header).nonzero()[-1]) + 1
    assert (routed.question.at, routed.question.first) == (at, at)
    assert routed.question.stop == at + 8


@torch.no_grad()
@pytest.mark.usefixtures("_by_last_token")
def test_a_message_added_to_a_chat_swaps_its_rows():
    model, tokenizer, memory = chatting(max_passages=1)
    before, after = chat(tokenizer, words(0)), chat(tokenizer, words(0), "w5 w6", words(2, 40))
    new = after[len(before) :]
    with memory.recording() as recording:
        cache = model(before[None], use_cache=True).past_key_values
        found = model(new[None], past_key_values=cache, use_cache=True)
        last = model(tokens(1, 4)[None], past_key_values=found.past_key_values).logits
    first, second = recording.routed
    assert second.passages[0].passage.document == NAMES[int(document(2)[47]) % 3]
    assert not torch.equal(read(memory, put(first), 1).ids, read(memory, put(second), 1).ids)
    with memory.recalling(put(first), at=1) as recall:
        cache = model(before[None], use_cache=True).past_key_values
        recall.state = replace(recall.state, rows=read(memory, put(second), 1))
        expected = model(new[None], past_key_values=cache, use_cache=True)
        assert torch.equal(expected.logits, found.logits)
        step = model(tokens(1, 4)[None], past_key_values=expected.past_key_values).logits
    assert torch.equal(step, last)


@torch.no_grad()
def test_a_message_added_to_a_chat_without_rows_has_them_before_it():
    model, tokenizer, memory = chatting()
    before, after = chat(tokenizer, words(0)), chat(tokenizer, words(0), "w5 w6", words(2))
    new = after[len(before) :]
    with memory.using(documents=[]):
        plain = model(before[None], use_cache=True).past_key_values
    with memory.recording() as recording:
        cache = copy.deepcopy(plain)
        found = model(new[None], past_key_values=cache, use_cache=True)
        last = model(tokens(1, 4)[None], past_key_values=found.past_key_values).logits
    (routed,) = recording.routed
    at = len(before) + routed.question.at
    assert after[at - 1] == tokenizer.convert_tokens_to_ids("<user>")
    whole = torch.cat([after, tokens(1, 4)])
    with memory.recalling(put(routed), at=at):
        expected = model(whole[None]).logits[0, len(before) :]
    assert (torch.cat([found.logits[0], last[0]]) - expected).abs().max() <= 2e-5


@torch.no_grad()
def test_tokens_without_a_message_keep_the_rows():
    model, tokenizer, memory = chatting()
    before = chat(tokenizer, words(0))
    routed = memory.route(before)
    with memory.recalling(put(routed), at=routed.question.at):
        expected = model(torch.cat([before, tokens(6, 4)])[None]).logits[0, len(before) :]
    with memory.recording() as recording:
        cache = model(before[None], use_cache=True).past_key_values
        found = model(tokens(6, 4)[None], past_key_values=cache).logits[0]
    assert len(recording.routed) == 1
    assert (found - expected).abs().max() <= 2e-5


@torch.no_grad()
def test_a_message_about_nothing_in_the_memory_keeps_the_rows():
    model, tokenizer, memory = chatting(relevance=None)
    before, after = chat(tokenizer, words(0)), chat(tokenizer, words(0), "w5 w6", words(2))
    new = after[len(before) :]
    routed = memory.route(before)
    other = memory.route(new).passages[0].passage.document  # without a limit, it swaps them
    assert other not in [one.passage.document for one in routed.passages]
    cache = model(before[None], use_cache=True).past_key_values
    with memory.using(relevance=1e6):
        assert memory.route(new).relevance < 1e6
        found = model(new[None], past_key_values=cache).logits[0]
        empty = model(before[None], use_cache=True).past_key_values
        without = model(new[None], past_key_values=empty).logits[0]
    with memory.recalling(put(routed), at=routed.question.at):
        expected = model(after[None]).logits[0, len(before) :]
    assert (found - expected).abs().max() <= 2e-5
    with memory.using(enabled=False):
        cache = model(before[None], use_cache=True).past_key_values
        plain = model(new[None], past_key_values=cache).logits[0]
    assert torch.equal(without, plain)
    assert not torch.allclose(found, plain, atol=1e-3)


@pytest.mark.usefixtures("_by_last_token")
def test_a_chat_generated_turn_by_turn():
    model, tokenizer, memory = chatting()
    prompt = chat(tokenizer, words(0))[None]
    found = model.generate(prompt, return_dict_in_generate=True, **GREEDY)
    message = chat(tokenizer, words(0), "w5", words(1))[len(prompt[0]) + 1 :]  # from <end> on
    ids = torch.cat([found.sequences[0], message])[None]
    with memory.recording() as recording:
        cache = copy.deepcopy(found.past_key_values)
        again = model.generate(ids, past_key_values=cache, **GREEDY)
    assert len(recording.routed) == 1
    with torch.no_grad():
        cache = found.past_key_values
        logits = [model(ids[:, cache.get_seq_length() :], past_key_values=cache).logits[0, -1]]
        for token in again[0, ids.shape[1] : -1]:
            logits.append(model(token[None, None], past_key_values=cache).logits[0, -1])
    assert torch.stack(logits).argmax(-1).tolist() == again[0, ids.shape[1] :].tolist()


def test_first_rows_that_another_passage_has_are_put_once():
    model = build("llama")
    memory = routing(model)
    document = memory.backend.catalog.document("two")
    first_rows = list(range(document.first_row, document.first_row + 4))
    later, beginning = Passage("two", 20, 24), Passage("two", 2, 9)
    (alone,) = locate(memory.backend, [[later]], [0])
    assert list(alone.ids) == first_rows + list(
        range(document.first_row + 20, document.first_row + 24)
    )
    (both,) = locate(memory.backend, [[later, beginning]], [0])
    rows = [0, 1, *range(20, 24), *range(2, 9)]  # rows 2 and 3 come with their passage
    assert list(both.ids) == [document.first_row + row for row in rows]
    with memory.recalling([later, beginning]):
        model(asked(1)[None])
