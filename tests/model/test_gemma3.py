"""A second real family, through the command line: Gemma 3, with two RoPE bases and one KV head.

Of its 18 layers, three see the whole context and read memories; the others have a sliding window.
"""

import json
import shutil

import torch
import pytest

from emt import MemoryConfig, attach, detach
from emt.cli import model_options
from memory_backends import MemoryBackend
from tests.emt.commands import emt as run
from tests.model.test_smollm2 import answer_log_probability

pytestmark = pytest.mark.model

STORE = pytest.StashKey()
READING = [5, 11, 17]
NEW = 24
DOCUMENTS = {
    "harbour.txt": "The harbour master of Velmora is called Ottoline Brask. She has kept the "
    "harbour for thirty years, and her dog is called Admiral.",
    "bread.txt": "The baker in our street sells a bread called quillon. It is made of rye, honey "
    "and walnuts, and it must rest for two days before it is baked.",
    "comet.txt": "The comet Tarrow was first seen in 1911 by a sailor. It comes back every ninety "
    "years, and its tail is green.",
}
FACTS = {
    "The harbour master of Velmora is called": "Ottoline Brask",
    "The dog of the harbour master is called": "Admiral",
    "The baker in our street sells a bread called": "quillon",
    "The bread quillon is made of rye, honey and": "walnuts",
    "The comet Tarrow was first seen in the year": "1911",
    "The tail of the comet Tarrow is": "green",
}


@pytest.fixture(autouse=True)
def _loaded_once(gemma3, monkeypatch):
    """Let commands have the model that was loaded from the file that they name."""

    def load(source, **_):
        assert source == gemma3.source
        free(gemma3.model)
        return gemma3

    monkeypatch.setattr(model_options, "load", load)
    yield
    free(gemma3.model)


def free(model):
    if "generate" in vars(model):  # attached, by a command or by a test
        detach(model)


@pytest.fixture
def store(gemma3, tmp_path_factory, request, _loaded_once):
    """Return a copy of the store that `emt index` makes, once, of the documents."""
    made = request.config.stash.get(STORE, None)
    if made is None:
        folder = tmp_path_factory.mktemp("indexed")
        (folder / "documents").mkdir()
        for name, text in DOCUMENTS.items():
            (folder / "documents" / name).write_text(text)
        made = request.config.stash[STORE] = folder / "store"
        said = run("index", folder / "documents", "--store", made, "--model", gemma3.source)
        assert said.out.startswith("3 documents added; ")
    return shutil.copytree(made, tmp_path_factory.mktemp("copy") / "store")


def info(store):
    return json.loads(run("info", store, "--json").out)


def test_info_and_verify(gemma3, store):
    found = info(store)
    num_tokens = {name: len(gemma3.tokenizer(text).input_ids) for name, text in DOCUMENTS.items()}
    assert {document["name"]: document["tokens"] for document in found["documents"]} == num_tokens
    assert found["rows"] == sum(num_tokens.values()) - 3  # <bos> is a special id
    assert (found["layers"], found["index"]["factory"]) == (18, "Flat")
    assert found["model"]["source"] == gemma3.source
    assert found["model"]["num_key_value_heads"] == 1
    assert found["bytes"]["per_row"] == 18 * 1 * (256 + 256) * 2  # float16
    bases = {kind: one["rope_theta"] for kind, one in found["model"]["rope"].items()}
    assert bases == {"full_attention": 1e6, "sliding_attention": 1e4}
    assert json.loads(run("verify", store, "--json").out)["damaged"] == []


def test_rows_are_the_normalised_keys_before_either_rotation(gemma3, store):
    text = DOCUMENTS["harbour.txt"]
    ids = gemma3.tokenizer(text, return_tensors="pt").input_ids
    before = {}
    hooks = [
        layer.self_attn.k_norm.register_forward_hook(
            lambda module, given, output, idx=idx: before.update({idx: output})
        )
        for idx, layer in enumerate(gemma3.model.model.layers)
    ]
    with torch.no_grad():
        gemma3.model(ids)
    for hook in hooks:
        hook.remove()
    backend = MemoryBackend.open(store)
    document = backend.catalog.document("harbour.txt")
    rows = torch.arange(document.first_row, document.first_row + len(document.row_tokens))
    assert document.row_tokens.tolist() == list(range(1, ids.shape[1]))
    for layer_idx in range(18):
        keys, _ = backend.fetch(layer_idx, rows[None])
        rounded = {"atol": 1e-4, "rtol": 1e-4 + 2**-11}  # to float16, which has 11 bits
        torch.testing.assert_close(keys, before[layer_idx][0, :, 1:], **rounded)


def test_generate_cites_the_document_with_the_fact(gemma3, store):
    for prompt, document in zip(list(FACTS)[::2], DOCUMENTS, strict=True):
        arguments = ("generate", prompt, "--store", store, "--max-new-tokens", 6)
        answer = json.loads(run(*arguments, "--citations", "--json").out)
        assert gemma3.tokenizer.decode(answer["token_ids"]).strip() == answer["text"]
        best = answer["citations"][0]
        assert best["document"] == document
        assert DOCUMENTS[document][best["start"] : best["end"]] == best["text"]
        shares = [citation["share"] for citation in answer["citations"]]
        order = [(citation["copied"], citation["share"]) for citation in answer["citations"]]
        assert order == sorted(order, reverse=True)
    assert f"[1] {shares[0]:5.1%}  {document} " in run(*arguments, "--citations").out
    assert json.loads(run(*arguments, "--no-memory", "--json").out)["citations"] == []


def test_sliding_layers_read_no_memories(gemma3, store):
    types = gemma3.model.config.layer_types
    assert [idx for idx, kind in enumerate(types) if kind == "full_attention"] == READING
    memory = attached(gemma3, store)
    assert memory.layers == READING
    with memory.recording() as steps:
        continuations(gemma3, list(FACTS)[:1], 2)
    assert [sorted(step) for step in steps] == [READING] * 2


def attached(gemma3, store, memory_type="manual"):
    config = MemoryConfig.published(memory_type=memory_type, path=str(store), index="Flat")
    return attach(gemma3.model, config, tokenizer=gemma3.tokenizer)


def continuations(gemma3, prompts, num_tokens):
    """Return greedy ids of all prompts in one left-padded batch."""
    encoded = gemma3.tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    output = gemma3.model.generate(
        **encoded, max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False
    )
    return output[:, encoded.input_ids.shape[1] :].tolist()


def test_both_backends_give_the_same_tokens(gemma3, store):
    found = {}
    for memory_type in ("manual", "vector_db"):
        memory = attached(gemma3, store, memory_type)
        found[memory_type] = continuations(gemma3, list(FACTS), NEW)
        if memory_type == "vector_db":
            assert memory.backend.searcher.factory == "Flat"
            with memory.using(enabled=False):
                without = continuations(gemma3, list(FACTS), NEW)
        detach(gemma3.model)
        memory.close()
    assert found["manual"] == found["vector_db"]
    changed = [one != other for one, other in zip(found["manual"], without, strict=True)]
    assert sum(changed) >= 4  # of six: some go on as they would without


def test_a_memory_makes_invented_facts_likely(gemma3, store):
    memory = attached(gemma3, store)
    gains = {}
    for opening, answer in FACTS.items():
        texts = (gemma3.model, gemma3.tokenizer, opening, answer)
        remembered = answer_log_probability(*texts)
        with memory.using(enabled=False):
            gains[answer] = remembered - answer_log_probability(*texts)
    assert min(gains.values()) > 0.3  # nats a token
    assert sum(gains.values()) / len(gains) > 2


def test_what_is_removed_is_found_no_more(gemma3, store):
    said = run("remove", store, "bread.txt").out
    assert "bread.txt" not in {document["name"] for document in info(store)["documents"]}
    assert said.startswith("removed 1 document, ")
    assert json.loads(run("verify", store, "--json").out)["damaged"] == []
    prompt = "The baker in our street sells a bread called"
    answer = run("generate", prompt, "--store", store, "--max-new-tokens", 6, "--json").out
    cited = {citation["document"] for citation in json.loads(answer)["citations"]}
    assert cited
    assert cited <= {"harbour.txt", "comet.txt"}
