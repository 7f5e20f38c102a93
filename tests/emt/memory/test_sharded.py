"""A model with a sharded memory answers what it answers with one store."""

import shutil

import torch
import pytest

from emt import MemoryConfig, attach, detach
from emt.errors import StoreError
from memory_backends.sharded import shard_of
from tests.emt.modes.generation import GREEDY
from tests.emt.routing.worlds import asked, build, document, profile_of

NAMES = [f"document {number}" for number in range(5)]


def memory_of(model, path, **settings):
    options = {
        "path": str(path),
        "index": "Flat",
        "remove_special_ids": False,
        "passage_rows": 24,
        "max_passages": 2,
        "relevance": None,
        **settings,
    }
    return attach(model, MemoryConfig.published(**{"memory_type": "vector_db", **options}))


def write(memory):
    for number, name in enumerate(NAMES):
        memory.write(document(number), document=name)


def answers(model, memory):
    """Return passages and tokens for prompts about each document, of all and of some of them."""
    results = []
    for number in range(len(NAMES)):
        for settings in ({}, {"documents": NAMES[::2]}):
            with memory.using(**settings):
                prompt = asked(number)[None]
                if memory.mode == "passage":
                    routed = memory.route(prompt[0])
                    results.append([(each.passage, each.score) for each in routed.passages])
                results.append(model.generate(prompt, **GREEDY).tolist())
    return results


@pytest.mark.parametrize("mode", ["passage", "token"])
def test_answers_are_those_of_one_store(tmp_path, mode):
    """After removals and replacements, too; and of a store that is opened again."""
    model = build("llama")
    profile = profile_of(model)
    expected = None
    for num_shards in (0, 1, 2, 5):
        path = tmp_path / str(num_shards)
        kind = {"memory_type": "sharded", "num_shards": num_shards} if num_shards else {}
        memory = memory_of(model, path, mode=mode, **kind)
        write(memory)
        memory.keep_profile(profile)
        memory.save()
        first = answers(model, memory)
        memory.remove(NAMES[1])
        memory.write(document(7), document=NAMES[3], replace=True)
        memory.write(document(1), document=NAMES[1])
        second = answers(model, memory)
        detach(model)
        memory.close()
        memory = memory_of(model, path, mode=mode, memory_type="manual")  # how shards are searched
        assert memory.backend.memory_type == ("sharded" if num_shards else "manual")
        assert memory.profile.heads == profile.heads
        third = answers(model, memory)
        assert third == second != first
        detach(model)
        memory.close()
        if expected is None:
            expected = first, second
        assert (first, second) == expected


def test_a_prompt_is_a_constant_number_of_messages_a_shard(tmp_path):
    """However many heads, layers and passages there are."""
    model = build("llama")
    profile = profile_of(model)
    counts = []
    for num_shards in (1, 3):
        settings = {"routing": "heads", "candidates": 0, "num_shards": num_shards}
        path = tmp_path / str(num_shards)
        memory = memory_of(model, path, mode="passage", memory_type="sharded", **settings)
        write(memory)
        memory.keep_profile(profile)
        shards = memory.backend.store.shards
        before = shards.num_messages
        memory.route(asked(2))
        assert shards.num_messages - before == num_shards
        model(asked(2)[None])
        counts.append(shards.num_messages - before)
        detach(model)
        memory.close()
    assert counts[0] == 3  # two searches, and the rows of the passages
    assert counts[1] <= 9


def test_answers_without_a_shard_are_of_the_other_documents(tmp_path):
    """Words, which the memory has of all documents, find none of the missing ones either."""
    model = build("llama")
    memory = memory_of(model, tmp_path, mode="token", memory_type="sharded", num_shards=2)
    write(memory)
    detach(model)
    memory.close()
    shutil.move(tmp_path / "shards/00000", tmp_path / "away")
    with pytest.raises(StoreError, match="shard 0"):
        memory_of(model, tmp_path)
    memory = memory_of(model, tmp_path, mode="token", missing_shards="warn")
    assert memory.missing_shards == (0,)
    left = [name for name in NAMES if shard_of(name, 2) == 1]
    prompt = asked(2)[None]
    with_warning = model.generate(prompt, **GREEDY)
    with memory.using(documents=left):
        assert torch.equal(model.generate(prompt, **GREEDY), with_warning)
    detach(model)
