"""The two backends, and what a memory is good for, on a real model and the demo's documents."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import torch
import pytest

from emt import MemoryConfig, attach, detach
from tests.model.conftest import DEMO
from tests.model.continuing import SETTINGS, continuations

pytestmark = pytest.mark.model

ROOT = Path(__file__).parent.parent.parent
PROMPTS = [
    "The Right Whale is an animal that",
    "On the old ferry we",
    "Breeders of pigeons say that",
    "My field of beans was",
    "The Nautilus was built",
    "In the printing-house there was",
    "When we drove over the moor, we",
    "The astronomers who watch Mars have",
    "The map of the island showed",
    "From the lighthouse in the harbour",
]


@pytest.fixture
def attached(smollm2):
    """Return a function that attaches the shared model; it is detached at the end."""

    def make(**settings):
        config = MemoryConfig.published(**{**SETTINGS, **settings})
        return attach(smollm2.model, config, tokenizer=smollm2.tokenizer)

    yield make
    detach(smollm2.model)


@pytest.mark.parametrize(
    ("prompts", "num_tokens"),
    [(PROMPTS[:3], 16), pytest.param(PROMPTS, 40, marks=pytest.mark.slow)],
)
def test_a_store_reopened_in_a_new_process_and_tensors_give_the_same_tokens(
    smollm2, store, attached, prompts, num_tokens
):
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.model.continuing", str(store), str(num_tokens)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:  # meanwhile, here
        process.stdin.write(json.dumps(prompts))
        process.stdin.close()
        memory = attached(memory_type="manual", path=store)
        here = continuations(smollm2.model, smollm2.tokenizer, prompts, num_tokens)
        there = json.load(process.stdout)
    assert process.returncode == 0
    assert there["rows"] == len(memory)
    assert there["index"] == "Flat"
    assert [len(tokens) for tokens in here] == [num_tokens] * len(prompts)
    assert there["tokens"] == here
    with memory.using(enabled=False):
        without = continuations(smollm2.model, smollm2.tokenizer, prompts, num_tokens)
    assert all(one != other for one, other in zip(here, without, strict=True))


@torch.no_grad()
def answer_log_probability(model, tokenizer, opening, answer):
    """Return the mean log-probability of an answer's tokens after its opening, in nats."""
    before = tokenizer(opening).input_ids
    tokens = tokenizer(f" {answer}").input_ids
    log_probs = model(torch.tensor([before + tokens])).logits[0].log_softmax(-1)
    at = torch.arange(len(before) - 1, len(before) + len(tokens) - 1)
    return float(log_probs[at, torch.tensor(tokens)].mean())


def test_a_memory_makes_the_answers_likely(smollm2, store, attached):
    memory = attached(memory_type="manual", path=store)
    lines = (DEMO / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    gains = []
    for question in map(json.loads, lines):
        answer = question["answer"]
        opening = question["fact"].partition(answer)[0].rstrip()
        texts = (smollm2.model, smollm2.tokenizer, opening, answer)
        remembered = answer_log_probability(*texts)
        with memory.using(enabled=False):
            gains.append(remembered - answer_log_probability(*texts))
    assert len(gains) >= 8
    assert sum(gains) / len(gains) > 2


@pytest.mark.parametrize(
    ("dtype", "prompts", "num_tokens"),
    [
        (torch.bfloat16, PROMPTS[:4], 12),
        pytest.param(torch.bfloat16, PROMPTS, 40, marks=pytest.mark.slow),
        pytest.param(torch.float16, PROMPTS, 40, marks=pytest.mark.slow),
    ],
)
def test_both_backends_give_the_same_tokens_in_half_precision(
    smollm2, dtype, prompts, num_tokens, tmp_path
):
    model = copy.deepcopy(smollm2.model).to(dtype)
    found = []
    for memory_type in ("vector_db", "manual"):
        config = MemoryConfig.published(
            memory_type=memory_type, path=tmp_path / "store", **SETTINGS
        )
        memory = attach(model, config, tokenizer=smollm2.tokenizer)
        if not memory.documents:
            names = ("beans.txt", "whale.txt")
            memory.write_all((name, (DEMO / "documents" / name).read_text()) for name in names)
        assert memory.backend.layout.dtype == dtype
        batch = continuations(model, smollm2.tokenizer, prompts, num_tokens)
        alone = continuations(
            model, smollm2.tokenizer, prompts[3:4], num_tokens
        )  # no padding, so no mask
        found.append(batch + alone)
        detach(model)
        memory.close()
    assert found[0] == found[1]
    without = continuations(model, smollm2.tokenizer, prompts, num_tokens)
    assert all(one != other for one, other in zip(found[0], without, strict=False))


def test_sinks_are_the_first_token_and_words_that_say_little(smollm2, attached):
    memory, text = attached(), (DEMO / "documents" / "beans.txt").read_text()
    memory.write(text[:1500], document="beans")
    document = memory.backend.catalog.document("beans")
    tokens = document.token_ids[document.row_tokens[document.sink_rows]].tolist()
    first, *others = [smollm2.tokenizer.decode([token]) for token in tokens]
    assert document.sink_rows[:2].tolist() == [0, 1]
    assert first == "From"
    assert set(others) == {" the", "."}
    assert len(others) < 15  # of 365 rows
