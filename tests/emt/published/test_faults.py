"""Faults of the published implementation, each with what is right instead."""

import torch
import numpy as np
import pytest
from transformers import AutoModelForCausalLM, LlamaForCausalLM, MptForCausalLM

import emt
from emt.errors import ConfigError
from tests.emt.reference_fixtures import REFERENCE, case, published_folder
from tests.families import VOCAB_SIZE

BOTH = pytest.mark.parametrize("memory_type", ["manual", "vector_db"])
MODELS = pytest.mark.parametrize("name", ["llama_mha", "llama_gqa", "mpt"])
EXTENDED = {"llama_mha": emt.ExtendedLlamaForCausalLM, "mpt": emt.ExtendedMptForCausalLM}
EXTENDED["llama_gqa"] = EXTENDED["llama_mha"]
STOCK = {"llama_mha": LlamaForCausalLM, "llama_gqa": LlamaForCausalLM, "mpt": MptForCausalLM}


def load(name, expected=None, memory_type="manual", **more):
    """Load a stock checkpoint with memories."""
    settings = {**expected.memory_settings} if expected else {"stride": 64, "max_length": 128}
    settings["memory_type"] = memory_type
    if memory_type == "vector_db":
        settings["index"] = "Flat"
    memory = expected.tensor("memory_ids") if expected else None
    options = {"external_memories": memory, **settings, **more}
    return EXTENDED[name].from_pretrained(REFERENCE / name, **options)


@torch.no_grad()
def logits(model, ids, **options):
    return model(ids, **options).logits


@MODELS
def test_faiss_names_the_right_memories_after_several_windows(name):
    expected = case(name, "e_windows")
    manual = load(name, expected)
    faiss = load(name, expected, "vector_db")
    ids = expected.tensor("input_ids")
    found = [m(ids, output_retrieved_memory_idx=True).attentions[1] for m in (manual, faiss)]
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@MODELS
@BOTH
def test_special_ids_leave_no_memories_after_several_windows(name, memory_type):
    expected = case(name, "e_windows")
    special = [0, 1, 2, 250]
    model = load(
        name,
        expected,
        memory_type,
        remove_special_ids=True,
        tokenizer_all_special_ids=special,
    )
    memory_ids = expected.tensor("memory_ids")
    outputs = model(expected.tensor("input_ids"), output_retrieved_memory_idx=True)
    kept = ~np.isin(memory_ids[0].numpy(), special)
    assert 0 < kept.sum() < len(kept)
    assert len(model.memory) == kept.sum()
    for idx in outputs.attentions[1]:
        assert kept[idx.numpy()].all()


@MODELS
@BOTH
def test_a_batch_computes_what_its_rows_do(name, memory_type):
    expected = case(name, "b_memory")
    model = load(name, expected, memory_type)
    one = expected.tensor("input_ids")
    both = torch.cat([one, one.flip(1)])
    torch.testing.assert_close(
        logits(model, both),
        torch.cat([logits(model, both[:1]), logits(model, both[1:])]),
        atol=2e-5,
        rtol=0,
    )
    indices = model(both, output_retrieved_memory_idx=True).attentions[1]
    assert indices[0].shape[:1] == (2,)
    assert torch.equal(
        indices[2][1:], model(both[1:], output_retrieved_memory_idx=True).attentions[1][2]
    )


@MODELS
@BOTH
def test_switches_are_heeded(name, memory_type):
    expected = case(name, "d_by_layer")
    model = load(name, expected, memory_type)
    ids = expected.tensor("input_ids")
    np.testing.assert_allclose(logits(model, ids), expected.arrays["logits"], atol=1e-4)
    plain = case(name, "a_no_memory").arrays["logits"]
    off = logits(model, ids, use_external_mind=False)
    np.testing.assert_allclose(off, plain, atol=1e-4)
    stock = STOCK[name].from_pretrained(REFERENCE / name)
    assert torch.equal(off, logits(stock, ids))
    assert torch.equal(logits(model, ids, topk=0), off)


@MODELS
@BOTH
def test_no_switch_on_is_the_plain_model(name, memory_type):
    expected = case(name, "b_memory")
    model = load(name, expected, memory_type, use_external_mind_by_layer=[False] * 3)
    plain = case(name, "a_no_memory").arrays["logits"]
    np.testing.assert_allclose(logits(model, expected.tensor("input_ids")), plain, atol=1e-4)


@MODELS
@BOTH
def test_new_memory_ids_replace_the_old(name, memory_type):
    expected, other = case(name, "b_memory"), case(name, "g_topk_over")
    model = load(name, expected, memory_type, external_memories=other.tensor("memory_ids"))
    ids = expected.tensor("input_ids")
    before = logits(model, ids)
    model.memory_ids = expected.tensor("memory_ids")[0].tolist()
    found = logits(model, ids)
    assert (found - before).abs().max() > 1e-2
    np.testing.assert_allclose(found, expected.arrays["logits"], atol=1e-4)


def test_windows_that_would_leave_tokens_out_are_refused():
    model = load("llama_mha")
    ids = list(range(3, 131))
    with pytest.raises(ConfigError, match=r"max_length \(32\) .* stride \(64\)"):
        model.generate_cache(ids, stride=64, max_len=32)
    assert model.generate_cache(ids, stride=32, max_len=32)[0][0].shape == (1, 4, 128, 16)


@MODELS
@BOTH
def test_padding_does_not_move_memories(name, memory_type):
    expected = case(name, "b_memory")
    model = load(name, expected, memory_type)
    ids = expected.tensor("input_ids")
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(padded.shape[1]) >= 5).long()[None]
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    options = {} if name == "mpt" else {"position_ids": position_ids}
    found = logits(model, padded, attention_mask=mask, **options)[:, 5:]
    np.testing.assert_allclose(found, expected.arrays["logits"], atol=1e-4)


@MODELS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_works_with_faiss(name, dtype):
    expected = case(name, "b_memory")
    ids = expected.tensor("input_ids")
    manual = load(name, expected, "manual", dtype=dtype)
    faiss = load(name, expected, "vector_db", dtype=dtype)
    assert manual.dtype == faiss.dtype == dtype
    assert torch.equal(logits(manual, ids), logits(faiss, ids))


def test_a_number_of_heads_that_is_no_power_of_two_works(tmp_path):
    config = emt.published.ExtendedMptConfig(
        d_model=48, n_heads=6, n_layers=2, vocab_size=VOCAB_SIZE, max_seq_len=128
    )
    torch.manual_seed(0)
    model = emt.ExtendedMptForCausalLM(config, external_memories=list(range(3, 60))).eval()
    ids = torch.arange(3, 15)[None]
    assert (logits(model, ids) - logits(model, ids, topk=0)).abs().max() > 1e-4


@MODELS
def test_default_windows_fit_the_model(name, tmp_path):
    folder = published_folder(tmp_path / "model", name)
    model = AutoModelForCausalLM.from_pretrained(folder, external_memories=list(range(3, 250)) * 3)
    assert model.memory.config.max_length == 512  # of 3,072: the model has no more positions
    model(torch.arange(3, 15)[None])
    assert len(model.memory) == 3 * 247


@MODELS
def test_windows_that_were_asked_for_and_do_not_fit_are_refused(name):
    model = load(name, external_memories=list(range(3, 250)) * 3, max_length=600)
    with pytest.raises(ConfigError, match=r"max_length \(600\) .* 512 positions"):
        model(torch.arange(3, 15)[None])


@MODELS
def test_a_partial_memory_config_is_completed(name, tmp_path):
    folder = published_folder(tmp_path / "model", name, {"memory_config": {"topk": 3}})
    model = AutoModelForCausalLM.from_pretrained(folder, external_memories=list(range(3, 60)))
    idx = model(torch.arange(3, 8)[None], output_retrieved_memory_idx=True).attentions[1][0]
    assert idx.shape == (1, 4, 5 * 3)
