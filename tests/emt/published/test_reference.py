"""The numbers of the published implementation; see `tests/reference/README.md`."""

import torch
import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from emt.ingest.windows import Windows
from tests.emt.reference_fixtures import MODELS, case, published_folder

MEMORY_TYPES = {"manual": {}, "vector_db": {"index": "Flat"}}
FORWARDS = ("b_memory", "c_mask_by_sim", "d_by_layer", "e_windows", "g_topk_over")
ATOL = 1e-4


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


@pytest.fixture(params=MEMORY_TYPES)
def memory_type(request):
    return request.param


def load(tmp_path, expected, memory_type, **more):
    """Load a model in the published layout, with the settings of a case in its config."""
    settings = {**expected.memory_settings, "memory_type": memory_type}
    folder = published_folder(tmp_path / "model", expected.model, settings)
    return AutoModelForCausalLM.from_pretrained(
        folder,
        external_memories=expected.tensor("memory_ids")
        if "memory_ids" in expected.arrays
        else None,
        trust_remote_code=True,
        **MEMORY_TYPES[memory_type],
        **more,
    )


def assert_close(found, expected, atol=ATOL):
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=0, atol=atol)


def assert_indices(found, expected, idx, *, repeated=False):
    """Compare indices of all layers, (L, B, H, Q * k), with the reference's."""
    for layer, (mine, its) in enumerate(zip(found, idx, strict=True)):
        if (its == -1).all():
            assert mine is None
            continue
        positions = expected.positions[its]
        if repeated and layer == 0:  # equal keys: which of them is named is arbitrary
            ids = expected.arrays["memory_ids"][0]
            assert np.array_equal(ids[mine.numpy()], ids[positions])
        else:
            assert np.array_equal(mine.numpy(), positions)


@torch.no_grad()
def test_without_memory(name, memory_type, tmp_path):
    expected = case(name, "a_no_memory")
    settings = {"memory_type": memory_type}
    folder = published_folder(tmp_path / "model", name, settings)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert_close(model(expected.tensor("input_ids")).logits, expected.arrays["logits"])


@torch.no_grad()
@pytest.mark.parametrize("case_name", FORWARDS)
def test_logits_and_what_is_retrieved(name, case_name, memory_type, tmp_path):
    expected = case(name, case_name)
    model = load(tmp_path, expected, memory_type)
    outputs = model(expected.tensor("input_ids"), output_retrieved_memory_idx=True)
    assert_close(outputs.logits, expected.arrays["logits"])
    weights, indices = outputs.attentions
    assert weights is None
    assert_indices(
        indices, expected, expected.arrays["retrieved_idx"], repeated=case_name == "e_windows"
    )


@torch.no_grad()
@pytest.mark.parametrize("case_name", FORWARDS)
def test_similarities_and_which_are_masked(name, case_name, memory_type, tmp_path):
    expected = case(name, case_name)
    model = load(tmp_path, expected, memory_type)
    model(expected.tensor("input_ids"))
    with model.memory.recording(whole_prompt=True) as recording:
        model(expected.tensor("input_ids"))
    for layer, scores in enumerate(expected.arrays["retrieved_sim"]):
        if np.isnan(scores).all():
            assert layer not in recording[0]
            continue
        found = recording[0][layer]
        assert_close(found.scores, scores, atol=2e-5)
        if "retrieved_masked" in expected.arrays:
            masked = expected.arrays["retrieved_masked"][layer]
            assert masked.any()
            assert not masked.all()
            assert np.array_equal(found.weights.numpy() == 0, masked)


@pytest.mark.parametrize("case_name", ["b_memory", "e_windows", "g_topk_over"])
def test_keys_and_values_of_the_memories(name, case_name, memory_type, tmp_path):
    expected = case(name, case_name)
    model = load(tmp_path, expected, memory_type)
    model(expected.tensor("input_ids"))
    document = model.memory.backend.catalog.document("external_memories")
    assert np.array_equal(document.row_tokens, expected.positions)
    rows = document.first_row + torch.arange(len(document.row_tokens))
    cache = model.generate_cache(expected.tensor("memory_ids"))
    for layer, (keys, values) in enumerate(
        zip(expected.arrays["mem_keys"], expected.arrays["mem_values"], strict=True)
    ):
        ids = rows.expand(keys.shape[1], -1)[:, None]  # (Hkv, 1, S)
        stored_keys, stored_values = model.memory.backend.fetch(layer, ids)
        assert_close(stored_keys[:, 0][None], keys)
        assert_close(stored_values[:, 0][None], values)
        assert_close(cache[layer][0][:, :, expected.positions], keys)  # special ids have theirs
        assert_close(cache[layer][1][:, :, expected.positions], values)


def test_windows(name):
    expected = case(name, "e_windows")
    used = expected.settings["generate_cache"]
    cut = Windows(used["stride"], used["max_len"]).cut(expected.arrays["memory_ids"].shape[1])
    found = [(window.start, window.stop, window.stop - window.keep_from) for window in cut]
    assert found == [tuple(row) for row in expected.arrays["windows"].tolist()]


def test_generation_step_by_step(name, memory_type, tmp_path):
    expected = case(name, "f_generate")
    model = load(tmp_path, expected, memory_type)
    prompt = expected.tensor("input_ids")
    outputs = model.generate(
        prompt,
        max_new_tokens=16,
        do_sample=False,
        eos_token_id=None,
        output_retrieved_memory_idx=True,
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert np.array_equal(
        outputs.sequences[0, prompt.shape[1] :].numpy(), expected.arrays["generated_ids"]
    )
    assert_close(torch.cat(outputs.logits), expected.arrays["step_logits"])
    assert_indices(outputs.attentions[0][1], expected, expected.arrays["retrieved_idx_prefill"])
    for step, idx in enumerate(expected.arrays["retrieved_idx_decode"], start=1):
        assert_indices(outputs.attentions[step][1], expected, idx)
    assert len(outputs.attentions) == 16


@torch.no_grad()
@pytest.mark.parametrize("case_name", ["h_faiss", "h_faiss_windows"])
def test_the_reference_with_faiss(name, case_name, tmp_path):
    if name == "llama_gqa":
        case_name = case_name.replace("h_faiss_windows", "e_windows").replace("h_faiss", "b_memory")
        expected, logits = case(name, case_name), "logits"  # the reference cannot do it with faiss
    else:
        expected, logits = case(name, case_name), "faiss_logits"
    model = load(tmp_path, expected, "vector_db")
    outputs = model(expected.tensor("input_ids"), output_retrieved_memory_idx=True)
    assert_close(outputs.logits, expected.arrays[logits])
    if "faiss_idx_true" in expected.arrays:
        assert_indices(
            outputs.attentions[1], expected, expected.arrays["faiss_idx_true"], repeated=True
        )
        wrong = expected.arrays["faiss_idx_reference"]
        assert not np.array_equal(np.stack([idx.numpy() for idx in outputs.attentions[1]]), wrong)
