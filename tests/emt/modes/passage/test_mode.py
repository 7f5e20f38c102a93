"""Passage mode: what a prompt is routed to is recalled by the forward that reads it.

Expected is an explicit `recalling` block with the same passages, or the plain model.
"""

import copy
import threading

import torch
import pytest

from emt import MemoryConfig, attach, detach
from emt.errors import ConfigError, MemoryUseError
from emt.routing import router
from tests.emt.routing.worlds import (
    BACKENDS,
    NAMES,
    ROWS,
    asked,
    build,
    chosen,
    document,
    left_padded,
    profile_of,
    put,
    routing,
    tokens,
)
from tests.emt.words import word_tokenizer

FAMILIES = {
    "llama": {},
    "gemma3_text": {"sliding_window": 16},
    "gpt2": {},
    "mpt": {},
    "falcon": {},
    "gptj": {},
}
FULL = {"gemma3_text": ((1, 1), (1, 3))}


@torch.no_grad()
@pytest.mark.parametrize("memory_type", BACKENDS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_forward_is_that_of_a_block_with_the_same_passages(model_type, memory_type):
    model = build(model_type, **FAMILIES[model_type])
    plain = [model(asked(number)[None]).logits for number in range(3)]
    heads = FULL.get(model_type, ((0, 1), (2, 3)))
    memory = routing(model, memory_type, heads=heads)
    for number in range(3):
        prompt = asked(number)[None]
        with memory.recording() as recording:
            found = model(prompt).logits
        (routed,) = recording.routed
        assert routed == memory.route(prompt[0])
        assert routed.passages
        with memory.recalling(put(routed)):
            assert torch.equal(model(prompt).logits, found)
        assert (found - plain[number]).abs().max() > 1e-2
        with memory.using(enabled=False):
            assert torch.equal(model(prompt).logits, plain[number])


@torch.no_grad()
def test_a_batch_is_routed_prompt_by_prompt():
    model = build("llama")
    memory = routing(model)
    prompts = [asked(2, length=12), asked(0, length=5), tokens(4, 9)]
    ids, mask = left_padded(prompts)
    routed = [memory.route(prompt) for prompt in prompts]
    found = model(ids, attention_mask=mask).logits
    with memory.recalling([put(one) for one in routed], at=[0, 0, 0]):
        assert torch.equal(model(ids, attention_mask=mask).logits, found)
    right_ids, right_mask = ids.clone(), mask.clone()
    for row, prompt in enumerate(prompts):
        right_ids[row, : len(prompt)], right_mask[row] = prompt, 0
        right_mask[row, : len(prompt)] = 1
    right = model(right_ids, attention_mask=right_mask).logits
    for row, prompt in enumerate(prompts):
        error = right[row, : len(prompt)] - found[row, ids.shape[1] - len(prompt) :]
        assert error.abs().max() <= 2e-5


@torch.no_grad()
def test_what_is_not_relevant_is_the_plain_model(monkeypatch):
    monkeypatch.setattr(router, "SURE", 0.0)  # gains of a random model are over no passage
    model = build("llama")
    relevant, other = document(0)[10:30], tokens(20, 99)
    plain = model(other[None]).logits
    memory = routing(model, remove_special_ids=False)
    gains = [memory.route(prompt).relevance for prompt in (relevant, other)]
    assert gains[0] > gains[1]
    memory.config = memory.config.replace(relevance=sum(gains) / 2)
    assert torch.equal(model(other[None]).logits, plain)
    routed = memory.route(other)
    assert (routed.relevance, routed.passages) == (gains[1], ())
    mixed = model(torch.stack([relevant, other])).logits
    assert torch.equal(model(relevant[None]).logits[0], mixed[0])
    assert (mixed[1] - plain[0]).abs().max() <= 2e-5
    prompts = [relevant, other]
    alone = [chosen(model, [prompt])[0] for prompt in prompts]
    assert chosen(model, prompts) == alone
    with memory.using(enabled=False):
        assert chosen(model, [other])[0] == alone[1]
        assert chosen(model, [relevant])[0] != alone[0]


@torch.no_grad()
def test_an_empty_memory_is_the_plain_model():
    model = build("llama")
    profile = profile_of(model)
    prompt = asked(0)[None]
    plain = model(prompt).logits
    memory = attach(model, MemoryConfig.published(mode="passage"))
    assert torch.equal(model(prompt).logits, plain)
    memory.keep_profile(profile)
    assert memory.route(prompt[0]).passages == ()
    assert torch.equal(model(prompt).logits, plain)


@torch.no_grad()
@pytest.mark.parametrize("memory_type", BACKENDS)
def test_documents_narrow_what_is_recalled(memory_type):
    model = build("llama")
    memory = routing(model, memory_type)
    prompt = asked(0)
    fetched = []
    own = memory.backend.fetch_layers

    def fetch_layers(ids):
        fetched.extend(ids[ids >= 0].tolist())
        return own(ids)

    memory.backend.fetch_layers = fetch_layers
    spans = {}
    for name in NAMES:
        stored = memory.backend.catalog.document(name)
        spans[name] = range(stored.first_row, stored.first_row + len(stored.row_tokens))
    memory.route(prompt)  # the means of all values are computed once
    fetched.clear()
    with memory.using(documents=["two"]), memory.recording() as recording:
        model(prompt[None])
    assert {one.passage.document for one in recording.routed[0].passages} == {"two"}
    assert fetched
    assert set(fetched) <= set(spans["two"])
    fetched.clear()
    with memory.using(documents=[["two"], ["three"]]), memory.recording() as recording:
        both = model(torch.stack([prompt, prompt])).logits
    first, second = recording.routed
    assert {one.passage.document for one in first.passages} == {"two"}
    assert {one.passage.document for one in second.passages} == {"three"}
    with memory.recalling([put(first), put(second)], at=[0, 0]):
        assert torch.equal(model(torch.stack([prompt, prompt])).logits, both)
    with (
        memory.using(documents=[["two"], ["three"]]),
        pytest.raises(MemoryUseError, match=r"for 2 prompts; got"),
    ):
        model(prompt[None])


@torch.no_grad()
def test_evidence_at_a_border_stays_inside_of_the_scope():
    model = build("llama")
    memory = routing(model)
    for number, name in enumerate(NAMES):
        for start in (0, len(document(number)) - 6):
            with memory.using(documents=[name]):
                routed = memory.route(document(number)[start : start + 6])
            assert routed.passages
            assert {one.passage.document for one in routed.passages} == {name}


@torch.no_grad()
def test_an_empty_scope_is_the_plain_model():
    model = build("llama")
    prompt = asked(0)[None]
    plain = model(prompt).logits
    memory = routing(model)
    with memory.using(documents=[]):
        assert torch.equal(model(prompt).logits, plain)
    with memory.using(documents=[[], ["one"]]), memory.recording() as recording:
        both = model(prompt.repeat(2, 1)).logits
    assert [len(one.passages) > 0 for one in recording.routed] == [False, True]
    assert (both[0] - plain[0]).abs().max() <= 2e-5


@torch.no_grad()
def test_removed_rows_are_not_recalled():
    model = build("llama")
    memory = routing(model)
    gone = [1, *range(17, 27)]
    memory.backend.remove(gone)
    for start in (10, 15, 22):
        with memory.recording() as recording:
            model(document(0)[start : start + 10][None])
        (routed,) = recording.routed
        assert routed.passages
        for one in routed.passages:
            if one.passage.document == "one":
                assert not set(range(one.passage.first, one.passage.stop)) & set(gone)


@torch.no_grad()
def test_the_mode_is_changed_for_a_while():
    model = build("llama")
    memory = routing(model, mode="token")
    prompt = asked(1)[None]
    token = model(prompt).logits
    with memory.using(mode="passage"):
        passage = model(prompt).logits
        with memory.using(mode="token"):
            assert torch.equal(model(prompt).logits, token)
        with memory.recalling(put(memory.route(prompt[0]))):
            assert torch.equal(model(prompt).logits, passage)
    assert torch.equal(model(prompt).logits, token)
    assert (token - passage).abs().max() > 1e-3


@torch.no_grad()
def test_a_block_retrieves_single_memories_where_it_says_so():
    model = build("llama")
    memory = routing(model)
    prompt = asked(1)[None]
    found = {}
    for mode in ("token", "passage"):
        with memory.using(mode=mode), memory.recalling([], retrieve=True):
            found[mode] = model(prompt).logits
    assert torch.equal(found["token"], found["passage"])


@torch.no_grad()
def test_a_model_without_a_profile_says_so():
    model = build("llama")
    memory = attach(model, MemoryConfig.published(mode="passage", remove_special_ids=False))
    memory.write(document(0), document="one")
    missing = {
        "heads": r"needs a head profile .*`emt profile",
        "words": r"'words' needs a tokenizer, and",
        "both": r"'both' needs a tokenizer or a head profile, and",
    }
    for kind, message in missing.items():
        with memory.using(routing=kind), pytest.raises(ConfigError, match=message):
            model(asked(0)[None])
    with memory.using(mode="token"):
        model(asked(0)[None])


@torch.no_grad()
def test_a_bad_profile_leaves_the_model_as_it_was(tmp_path):
    model = build("llama")
    profile = profile_of(build("llama", hidden_size=32))
    profile.write(tmp_path / "p.json")
    plain = model(asked(0)[None]).logits
    settings = MemoryConfig.published(
        mode="passage", profile=tmp_path / "p.json", memory_type="vector_db", path=tmp_path / "m"
    )
    with pytest.raises(ConfigError, match="dims"):
        attach(model, settings)
    assert torch.equal(model(asked(0)[None]).logits, plain)
    memory = attach(model)
    with pytest.raises(ConfigError, match="dims"):
        memory.keep_profile(profile)


@torch.no_grad()
def test_sentences_and_sinks_within_the_budget():
    model = build("llama")
    memory = routing(model)
    for rows, count in ((ROWS, 2), (17, 3), (5, 5), (1, 1)):
        with memory.using(passage_rows=rows, max_passages=count):
            passages = [one.passage for one in memory.route(document(1)[20:40]).passages]
        lengths = [passage.stop - passage.first for passage in passages]
        assert 1 <= len(lengths) <= count
        assert sum(lengths) <= rows
        assert min(lengths) > 0


@torch.no_grad()
def test_long_prompts_leave_room_for_the_answer():
    model = build("llama", max_position_embeddings=64)
    profile = profile_of(model)
    memory = attach(
        model,
        MemoryConfig.published(
            mode="passage",
            max_length=64,
            stride=64,
            passage_rows=40,
            max_passages=30,
            relevance=None,
        ),
    )
    memory.write(document(0)[:60], document="one")
    memory.keep_profile(profile)
    for length, most in ((20, 22), (31, 16), (33, 0), (64, 0)):
        routed = memory.route(document(0)[:length])
        rows = sum(one.passage.stop - one.passage.first for one in routed.passages)
        assert rows <= most
        assert (rows > 0) == (most > 0)
        model(document(0)[:length][None])


@torch.no_grad()
def test_two_models_and_a_copy():
    one, other = build("llama"), build("qwen3")
    prompt = asked(0)[None]
    plain = other(prompt).logits, one(prompt).logits
    mine, yours = routing(one), routing(other, mode="token")
    found = one(prompt).logits
    with yours.using(enabled=False):
        assert torch.equal(other(prompt).logits, plain[0])
    with yours.using(mode="passage"):
        assert torch.equal(one(prompt).logits, found)
        assert (other(prompt).logits - plain[0]).abs().max() > 1e-3
    assert torch.equal(copy.deepcopy(one)(prompt).logits, plain[1])
    assert torch.equal(one(prompt).logits, found)
    detach(one)
    assert torch.equal(one(prompt).logits, plain[1])
    with pytest.raises(MemoryUseError, match="detached"):
        mine.route(prompt[0])


@torch.no_grad()
def test_closing_and_opening(tmp_path):
    model = build("llama")
    prompt = asked(0)[None]
    plain = model(prompt).logits
    memory = routing(model, "vector_db", path=tmp_path / "m")
    memory.save()
    found = model(prompt).logits
    memory.close()
    assert torch.equal(model(prompt).logits, plain)
    memory.open(tmp_path / "m")
    assert torch.equal(model(prompt).logits, found)
    detach(model)
    memory = attach(
        model,
        MemoryConfig.published(
            path=tmp_path / "m", mode="passage", passage_rows=24, max_passages=2, relevance=None
        ),
    )
    assert torch.equal(model(prompt).logits, found)


@torch.no_grad()
@pytest.mark.parametrize("memory_type", BACKENDS)
def test_auto_is_passage_where_there_is_a_profile(memory_type, tmp_path):
    model, reader = build("llama"), build("llama")
    profile, prompt = profile_of(model), asked(0)[None]
    config = MemoryConfig(
        memory_type=memory_type,
        path=tmp_path / "m",
        remove_special_ids=False,
        relevance=None,
        **BACKENDS[memory_type],
    )
    memory = attach(model, config)
    memory.write(document(0), document="one")
    memory.write(document(1), document="two")
    memory.save()
    other = attach(reader, config)
    assert (memory.mode, other.mode) == ("token", "token")  # and no tokenizer to read words with
    found = model(prompt).logits
    with memory.using(mode="token"):
        assert torch.equal(model(prompt).logits, found)
    memory.keep_profile(profile)
    assert memory.mode == "passage"
    assert not torch.equal(model(prompt).logits, found)
    found = model(prompt).logits
    with memory.recalling(put(memory.route(prompt[0]))):
        assert torch.equal(model(prompt).logits, found)
    assert other.mode == "token"
    other.refresh()
    assert other.mode == "passage"
    assert torch.equal(reader(prompt).logits, found)
    detach(reader)
    later = attach(reader, config)
    assert later.mode == "passage"
    assert torch.equal(reader(prompt).logits, found)


@torch.no_grad()
@pytest.mark.parametrize(
    ("routing", "mode"), [("both", "passage"), ("words", "passage"), ("heads", "token")]
)
def test_auto_is_passage_where_words_can_be_read(routing, mode):
    model, prompt = build("llama"), asked(0)[None]
    config = MemoryConfig(routing=routing, remove_special_ids=False)
    memory = attach(model, config, tokenizer=word_tokenizer())
    assert memory.mode == mode  # of an empty memory, too
    for number, name in enumerate(NAMES):
        memory.write(document(number), document=name)
    assert memory.mode == mode
    found = model(prompt).logits
    with memory.using(mode=mode):
        assert torch.equal(model(prompt).logits, found)
    with memory.using(mode="token"):
        assert torch.equal(model(prompt).logits, found) == (mode == "token")


@torch.no_grad()
def test_only_the_routing_heads_are_indexed(tmp_path):
    model = build("llama")
    memory = routing(model, "vector_db", path=tmp_path / "m")
    memory.save()
    files = sorted(file.name for file in (tmp_path / "m").rglob("*.faiss"))
    assert files == ["layer-000-head-000.faiss", "layer-002-head-001.faiss"]
    detach(model)
    memory = attach(
        model, MemoryConfig.published(path=str(tmp_path / "m"), memory_type="vector_db")
    )
    memory.save()
    assert len(list((tmp_path / "m").rglob("*.faiss"))) == 6


@torch.no_grad()
def test_what_cannot_be_routed():
    model = build("llama")
    memory = routing(model)
    embeddings = model.get_input_embeddings()(asked(0)[None])
    with pytest.raises(MemoryUseError, match="inputs_embeds"):
        model(inputs_embeds=embeddings)
    with memory.using(mode="token"):
        model(inputs_embeds=embeddings)
    model.train()
    with pytest.raises(MemoryUseError, match="training mode"):
        model(asked(0)[None])


def test_a_forward_that_outlives_its_block_leaves_nothing_behind():
    """The hooks of a block are gone when the forward of another thread ends."""
    model = build("llama")
    memory = routing(model, mode="token")  # nobody watches but the block
    prompt = asked(0)[None]
    passages = put(memory.route(prompt[0]))
    inside, go_on, found = threading.Event(), threading.Event(), []

    def wait(module, args):
        if threading.current_thread() is thread and not inside.is_set():
            inside.set()
            go_on.wait(60)

    def run():
        with torch.no_grad():
            found.extend(model(prompt).logits for _ in range(2))

    thread = threading.Thread(target=run)
    hook = model.model.layers[1].register_forward_pre_hook(wait)
    with torch.no_grad():
        with memory.recalling(passages):
            expected = model(prompt).logits
            thread.start()
            inside.wait(60)
        token = model(prompt).logits
        go_on.set()
        thread.join()
    hook.remove()
    assert torch.equal(found[1], token)
    assert not torch.equal(expected, token)
