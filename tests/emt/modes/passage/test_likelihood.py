"""How likely a question is after passages: as after their text, and as in a block of each."""

import threading

import torch
import pytest

from emt import Passage
from emt.errors import DocumentError
from emt.modes.passage.likelihood import QuestionLikelihood
from emt.routing.question import Asking
from tests.emt.modes.passage.recalled import (
    BACKENDS,
    NUM_ROWS,
    SCALED,
    SMALL_WINDOWS,
    remembering,
    tokens,
)
from tests.families import FAMILIES, build
from tests.tiny_models import build_tiny
from tests.verdicts import attach_everywhere

TOLERANCE = 2e-5
AT = 9  # tokens of a chat template before the message
PROMPT = tokens(30, 2)
PASSAGES = [Passage("d", 4, 20), Passage("d", 0, 5), Passage("d", 31, 40)]


def log_probs(logits, token_ids):
    """Return the log-probability of each token but the first, (T - 1,), by hand."""
    shares = logits.float().softmax(-1)[:-1]
    return torch.stack(
        [share[token] for share, token in zip(shares, token_ids[1:], strict=True)]
    ).log()


def asking(memory):
    likelihood = QuestionLikelihood(memory._attached("test"))

    def ask(at=AT, tokens=None, passages=PASSAGES, prompt=PROMPT):
        tokens = range(at, len(prompt)) if tokens is None else tokens
        asking = Asking(prompt[: tokens[-1] + 1], at, list(tokens))
        return likelihood(asking, passages, memory.backend)

    return ask


@torch.no_grad()
def in_blocks(model, memory, at, passages=PASSAGES, prompt=PROMPT):
    """Return the same from the logits of blocks that recall a passage each, and of none."""
    found = []
    for passage in passages:
        with memory.recalling([passage], at=at):
            found.append(log_probs(model(input_ids=prompt[None]).logits[0], prompt)[at:])
    with memory.using(enabled=False):
        found.append(log_probs(model(input_ids=prompt[None]).logits[0], prompt)[at:])
    return torch.stack(found)


@torch.no_grad()
@pytest.mark.parametrize("memory_type", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_after_the_beginning_of_a_text_it_is_that_of_a_forward_over_both(family, memory_type):
    model = family.build()
    text = tokens(NUM_ROWS, 1)
    plain = [
        log_probs(model(torch.cat([text[:stop], PROMPT])[None]).logits[0, stop:], PROMPT)
        for stop in (8, NUM_ROWS, 0)
    ]
    memory = remembering(model, text, memory_type)
    found = asking(memory)(0, passages=[Passage("d", 0, 8), Passage("d", 0, NUM_ROWS)])
    assert (found - torch.stack(plain)).abs().max() <= TOLERANCE
    assert (plain[0] - plain[2]).abs().max() > 1e-2


@pytest.mark.parametrize("at", [0, AT])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_it_is_that_of_a_block_with_the_passage(family, at):
    model = family.build()
    memory = remembering(model, tokens(NUM_ROWS, 1))
    assert (asking(memory)(at) - in_blocks(model, memory, at)).abs().max() <= TOLERANCE


@pytest.mark.parametrize(("model_type", "options"), SMALL_WINDOWS)
def test_it_is_that_of_a_block_where_windows_are_small(model_type, options):
    model = build(model_type, **options)
    memory = remembering(model, tokens(NUM_ROWS, 1))
    assert (asking(memory)() - in_blocks(model, memory, AT)).abs().max() <= TOLERANCE


@pytest.mark.parametrize("scaling", SCALED)
def test_it_is_that_of_a_block_where_positions_are_scaled(scaling):
    model = build("llama", rope_parameters={**SCALED[scaling], "rope_theta": 10_000.0})
    memory = remembering(model, tokens(NUM_ROWS, 1))
    assert (asking(memory)() - in_blocks(model, memory, AT)).abs().max() <= TOLERANCE


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["bamba", "falcon_h1", "qwen3_next", "recurrent_gemma", "bert"])
def test_it_is_that_of_a_block_where_the_cache_is_of_another_kind(family):
    model = build_tiny(family)
    memory = attach_everywhere(model)
    memory.write(tokens(NUM_ROWS, 1), document="d")
    assert (asking(memory)() - in_blocks(model, memory, AT)).abs().max() <= 1e-4


def test_eager_attention_gives_the_same():
    found = []
    for implementation in ("eager", "sdpa"):
        model = build("mistral", attn_implementation=implementation, sliding_window=16)
        found.append(asking(remembering(model, tokens(NUM_ROWS, 1)))())
    assert (found[0] - found[1]).abs().max() <= TOLERANCE


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mpt"])
def test_what_does_not_depend_on_passages_is_computed_once(model_type):
    model = build(model_type)
    memory = remembering(model, tokens(NUM_ROWS, 1))
    expected = asking(memory)()
    likelihood = QuestionLikelihood(memory._attached("test"))
    question = Asking(PROMPT, AT, list(range(AT, len(PROMPT))))
    batches = []
    model.lm_head.register_forward_hook(lambda *call: batches.append(len(call[2])))
    first = likelihood(question, PASSAGES[:2], memory.backend)
    second = likelihood(question, PASSAGES[2:], memory.backend)
    assert batches == [3, 1]  # one more for no passage, the first time
    found = torch.cat([first[:2], second])
    assert (found - expected).abs().max() <= TOLERANCE
    assert torch.equal(first[2], second[1])
    assert torch.equal(likelihood(question, [], memory.backend), first[2:])


def test_prompts_of_one_template_read_it_once():
    model = build("llama")
    memory = remembering(model, tokens(NUM_ROWS, 1))
    prompts = [torch.cat([PROMPT[:AT], tokens(12, seed)]) for seed in (3, 4)]
    prompts.append(torch.cat([tokens(AT, 5), prompts[0][AT:]]))  # of another template
    questions = [Asking(prompt, AT, list(range(AT, len(prompt)))) for prompt in prompts]
    likelihood = QuestionLikelihood(memory._attached("test"))
    lengths = []
    model.model.embed_tokens.register_forward_hook(lambda *call: lengths.append(call[2].shape[1]))
    found = [likelihood(question, PASSAGES, memory.backend) for question in questions]
    lengths = [length for length in lengths if length > 1]  # one token shows how keys are turned
    assert lengths == [AT, 12, 12, AT, 12]
    for one, prompt in zip(found, prompts, strict=True):
        expected = asking(memory)(prompt=prompt)
        assert (one - expected).abs().max() <= TOLERANCE


def test_only_tokens_that_ask_are_returned():
    memory = remembering(build("llama"), tokens(NUM_ROWS, 1))
    ask = asking(memory)
    every = ask()
    asked = [*range(AT, AT + 6), *range(20, 26)]  # a question, and what was generated last
    chosen = [token - AT - 1 for token in asked[1:]]
    assert (ask(tokens=asked) - every[:, chosen]).abs().max() <= TOLERANCE
    assert ask(tokens=range(AT, AT + 2)).shape == (4, 1)
    assert ask(tokens=range(AT, AT + 1)).shape == (4, 0)


def test_vocabularies_are_computed_for_tokens_that_ask_only():
    model = build("llama")
    memory = remembering(model, tokens(NUM_ROWS, 1))
    shapes = []
    model.lm_head.register_forward_hook(lambda *call: shapes.append(tuple(call[2].shape)))
    asking(memory)(tokens=[AT, AT + 1, 25, 26])
    assert shapes == [(4, 3, 97)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision(dtype):
    text = tokens(NUM_ROWS, 1)
    expected = asking(remembering(build("llama").to(dtype).float(), text))()
    found = asking(remembering(build("llama", dtype=dtype), text))()
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() <= 0.3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model = build("llama").to(dtype).float()
        assert torch.equal(asking(remembering(model, text))(), expected)


def test_a_document_that_was_removed_is_named():
    memory = remembering(build("llama"), tokens(NUM_ROWS, 1))
    memory.remove("d")
    with pytest.raises(DocumentError, match="no document 'd'"):
        asking(memory)()


def test_threads_ask_at_once():
    memory = remembering(build("llama"), tokens(NUM_ROWS, 1))
    ask = asking(memory)
    prompts = [tokens(20 + number, 50 + number) for number in range(4)]
    alone = [ask(prompt=prompt) for prompt in prompts]
    found = [[] for _ in prompts]

    def run(number):
        for _ in range(5):
            found[number].append(ask(prompt=prompts[number]))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, several in zip(alone, found, strict=True):
        assert len(several) == 5
        assert all(torch.equal(each, one) for each in several)


def test_it_leaves_nothing_behind():
    model = build("llama")
    memory = remembering(model, tokens(NUM_ROWS, 1))
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    with memory.recording(whole_prompt=True) as recording:
        asking(memory)()
    assert recording.num_retrieved == 0
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert all(parameter.grad is None for parameter in model.parameters())
