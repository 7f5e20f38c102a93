import itertools

import torch
import pytest
from experiments.responder import LocalModel
from transformers import DynamicCache

from emt import MemoryConfig, attach, detach
from emt.errors import ConfigError
from tests.emt.bytes import byte_tokenizer
from tests.experiments.fakes import tiny
from tests.families import build

MESSAGE = "Who wrote this?"
PROMPT = MESSAGE + "\nAnswer:"


def ids_of(text):
    """Return <bos> and the bytes of a text, without the <eos> that the tokenizer adds."""
    return byte_tokenizer()(text).input_ids[:-1]


@torch.no_grad()
def mean_log_prob(model, prompt, suffix):
    """Score a suffix by one forward over everything, without a cache."""
    log_probs = model(torch.tensor([prompt + suffix])).logits[0].log_softmax(-1)
    at = range(len(prompt) - 1, len(prompt) + len(suffix) - 1)
    return sum(float(log_probs[i, t]) for i, t in zip(at, suffix, strict=True)) / len(suffix)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma3_text", "mpt"])
def test_text_and_log_probs_are_those_of_plain_calls(model_type):
    responder = tiny(model_type, max_new_tokens=12)
    said = responder.respond(MESSAGE, ["Anna", "B", "Zoë"])
    assert responder.log_probs(MESSAGE, ["Anna", "B", "Zoë"]) == pytest.approx(said.log_probs)
    prompt = ids_of(PROMPT)
    generated = responder.model.generate(
        torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=0
    )[0, len(prompt) :]
    expected = byte_tokenizer().decode(generated, skip_special_tokens=True).strip()
    assert said.text == expected
    assert said.num_prompt_tokens == len(prompt) == responder.count(MESSAGE)
    for log_prob, answer in zip(said.log_probs, [" Anna", " B", " Zoë"], strict=True):
        suffix = ids_of(answer)[1:]
        assert log_prob == pytest.approx(mean_log_prob(responder.model, prompt, suffix), abs=2e-5)


def test_an_attached_memory_is_read_by_text_and_candidates():
    responder = tiny(max_new_tokens=8)
    before = responder.respond(MESSAGE, ["Anna"])
    memory = attach(responder.model, MemoryConfig.published(topk=3), tokenizer=responder.tokenizer)
    memory.write("Anna wrote it, and Bert read it aloud.", document="a")
    said = responder.respond(MESSAGE, ["Anna"])
    expected = mean_log_prob(responder.model, ids_of(PROMPT), ids_of(" Anna")[1:])
    detach(responder.model)
    assert said.log_probs[0] == pytest.approx(expected, abs=2e-5)
    assert abs(said.log_probs[0] - before.log_probs[0]) > 1e-3
    assert responder.respond(MESSAGE, ["Anna"]).log_probs == before.log_probs


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_uncertain_steps_are_redone_as_in_generate(model_type):
    responder = tiny(model_type, max_new_tokens=8)
    active = {"entropy": 0.0, "topk": 20}
    config = MemoryConfig.published(topk=1, uncertainty=active)
    memory = attach(responder.model, config, tokenizer=responder.tokenizer)
    memory.write("Anna wrote it, and Bert read it aloud to all of them.", document="a")
    prompt, answer = ids_of(PROMPT), ids_of(" Anna")[1:]
    lengths = []
    counting = responder.model.register_forward_pre_hook(
        lambda module, args, options: lengths.append((args or [options["input_ids"]])[0].shape[1]),
        with_kwargs=True,
    )
    with memory.recording() as recording:
        said = responder.respond(MESSAGE, ["Anna"])
    counting.remove()
    assert recording.num_redone == 8  # candidates are beside the text
    assert lengths == [len(prompt)] + (len(answer) - 1 + 7) * [1]  # the prompt is read once
    generated = responder.model.generate(
        torch.tensor([prompt]), max_new_tokens=8, do_sample=False, pad_token_id=0
    )[0, len(prompt) :]
    assert said.text == byte_tokenizer().decode(generated, skip_special_tokens=True).strip()
    expected = redone_log_prob(responder.model, memory, prompt, answer)
    with memory.using(uncertainty=None):
        plain = responder.respond(MESSAGE, ["Anna"])
    detach(responder.model)
    assert said.log_probs[0] == pytest.approx(expected, abs=2e-5)
    assert abs(said.log_probs[0] - plain.log_probs[0]) > 1e-4


@torch.no_grad()
def redone_log_prob(model, memory, prompt, suffix):
    """Score a suffix with one memory for the prompt's first tokens, and 20 for all that choose."""
    cache, total = DynamicCache(config=model.config), 0.0
    with memory.using(uncertainty=None):
        model(torch.tensor([prompt[:-1]]), past_key_values=cache)
        with memory.using(topk=20):
            for last, following in itertools.pairwise([prompt[-1], *suffix]):
                logits = model(torch.tensor([[last]]), past_key_values=cache).logits
                total += float(logits[0, -1].log_softmax(-1)[following])
    return total / len(suffix)


def test_it_stops_at_the_end_token():
    responder = tiny(max_new_tokens=12)
    ids = responder.respond(MESSAGE).token_ids
    assert len(ids) == 12
    end = next(at for at in range(1, 12) if ids[at] not in ids[:at])
    responder.model.generation_config.eos_token_id = [1, ids[end]]
    assert responder.respond(MESSAGE).token_ids == ids[: end + 1]
    responder.model.generation_config.eos_token_id = ids[0]
    assert responder.respond(MESSAGE).token_ids == ids[:1]


def test_a_chat_template_is_used_if_there_is_one():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<me>{% endif %}"
    )
    model = build("llama", vocab_size=259)
    said = LocalModel(model, tokenizer, max_new_tokens=4).respond("Hi", ["Yes"])
    prompt = ids_of("<user>Hi<me>")[1:]  # a template writes its own <bos>
    assert said.num_prompt_tokens == len(prompt)
    expected = mean_log_prob(model, prompt, ids_of("Yes")[1:])
    assert said.log_probs[0] == pytest.approx(expected, abs=2e-5)
    plain = LocalModel(model, tokenizer, chat=False, max_new_tokens=4).respond("Hi")
    assert plain.num_prompt_tokens == len(ids_of("Hi\nAnswer:"))
    with pytest.raises(ConfigError, match="no chat template"):
        tiny(chat=True)


@pytest.mark.parametrize("num_tokens", [1, 4, 7, 1000])
def test_pieces_have_so_many_tokens_and_nothing_is_lost(num_tokens):
    text = "  Snow fell on Leeds.\n\nTwice. "
    pieces = tiny().split(text, num_tokens)
    assert "".join(pieces) == text
    assert {len(piece) for piece in pieces[:-1]} <= {num_tokens}
    assert 0 < len(pieces[-1]) <= num_tokens
    assert tiny().split("", 3) == []


def test_a_character_of_several_tokens_is_not_cut():
    text = "Zoë é ππ"
    pieces = tiny().split(text, 2)
    assert "".join(pieces) == text
    assert max(len(piece.encode()) for piece in pieces) <= 3


def test_what_does_not_fit_the_positions_is_refused():
    responder = tiny(max_new_tokens=10, window=40)
    assert responder.room == 30
    assert len(ids_of(PROMPT)) == 24
    responder.respond(MESSAGE, ["x" * 15])
    with pytest.raises(ConfigError, match="24 tokens and an answer of 17 must fit 40 positions"):
        responder.respond(MESSAGE, ["x" * 16])
    with pytest.raises(ConfigError, match="window must have room"):
        tiny(max_new_tokens=10, window=10)


@pytest.mark.parametrize(
    ("model_type", "window", "room"),
    [("llama", None, 4066), ("llama", 9999, 4066), ("gpt2", None, 4066), ("mpt", 100, 70)],
)
def test_the_room_is_the_model_s_or_less(model_type, window, room):
    assert tiny(model_type, window=window).room == room
