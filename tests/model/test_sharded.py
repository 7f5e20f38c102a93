"""Sharded stores of 64k tokens of a real model answer what one store does."""

import shutil

import pytest

from emt import MemoryConfig, attach, detach
from emt.cli import quiet
from memory_backends.sharded import split
from tests.model.conftest import ROOT

pytestmark = pytest.mark.model

QUESTIONS = ("What was built of stone?", "Who founded the town?", "When did the war end?")


def texts(num_tokens, tokenizer):
    """Yield named texts, so many tokens in all."""
    for path in sorted((ROOT / "scripts" / "demo" / "documents").glob("*.txt")) * 20:
        ids = tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
        for first in range(0, len(ids), 500):
            part = ids[first : first + 500][:num_tokens]
            num_tokens -= len(part)
            if not part:
                return
            yield f"{num_tokens:06d} {path.name}", tokenizer.decode(part)


def answers(model, memory, tokenizer, questions):
    results = []
    for question in questions:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt"
        )
        ids = prompt if hasattr(prompt, "shape") else prompt["input_ids"]
        if memory.mode == "passage":
            routed = memory.route(ids[0])
            results.append([(each.passage, round(each.score, 4)) for each in routed.passages])
        results.append(model.generate(ids, max_new_tokens=12, do_sample=False).tolist())
    return results


@pytest.mark.parametrize(
    ("num_tokens", "shards", "questions"),
    [
        (1500, (2,), QUESTIONS[:1]),
        pytest.param(65536, (1, 2, 5), QUESTIONS, marks=pytest.mark.slow),
    ],
    ids=["1.5k", "64k"],
)
def test_answers_are_those_of_one_store(smollm2, tmp_path, num_tokens, shards, questions):
    """Over 1, 2 and 5 shards, in both modes, after a removal and a replacement."""
    model, tokenizer = smollm2.model, smollm2.tokenizer
    config = MemoryConfig(memory_type="vector_db", path=str(tmp_path / "one"), index="Flat")
    with quiet():
        memory = attach(model, config, tokenizer=tokenizer)
        memory.write_all(texts(num_tokens, tokenizer))
        detach(model)
        memory.close()
        expected = {}
        for num_shards in (*shards, 0):  # the store itself comes last: it is changed
            path = tmp_path / "many" if num_shards else tmp_path / "one"
            if num_shards:
                split(tmp_path / "one", path, num_shards)
            for mode in ("passage", "token"):
                memory = attach(
                    model, config.replace(path=str(path), mode=mode), tokenizer=tokenizer
                )
                if mode == "passage":
                    removed, replaced, *_ = memory.documents
                    before = memory.backend.catalog.document(replaced).text
                    memory.remove(removed)
                    memory.write(before[:900], document=replaced, replace=True)
                    memory.save()
                found = answers(model, memory, tokenizer, questions)
                detach(model)
                memory.close()
                assert found == expected.setdefault(mode, found)
            shutil.rmtree(path)
