"""Every causal family of transformers: it works, or `attach` says why not; see `verdicts`."""

import dataclasses
import re
from pathlib import Path

import torch
import pytest
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel

import emt
from emt.errors import ConfigError, UnsupportedModelError
from tests.forgetting import NUM_PREFIX, forget, forget_and_remember
from tests.tiny_exceptions import NOT_BUILT
from tests.tiny_models import VOCAB_SIZE, build_tiny, causal_families
from tests.verdicts import TOLERANCE, attach_everywhere, verdict_on

TABLE = Path(__file__).parents[2] / "docs" / "families.md"

# Each for something that no other has; `tests/families.py` has the plain ones.
WORKING = {
    "axk2": "indexed latent attention",
    "bamba": "recurrent layers; no positions counted without position_ids",
    "bart": "a decoder that takes no position_ids",
    "bert": "an encoder as a decoder",
    "biogpt": "learned positions",
    "cohere2": "sliding windows rotated, full attention not",
    "deepseek_v2": "latent attention rotated by complex numbers",
    "deepseek_v32": "attention to what an indexer chose",
    "dots3_note_text": "layers of different shapes",
    "falcon_h1": "attention and recurrence in one layer",
    "gemma3n_text": "shared keys and values; rotations of one tensor",
    "granitemoehybrid": "recurrent layers, experts, no positions",
    "hunyuan_v1_moe": "norms with weights after the rotation",
    "hy_v4": "attention sinks beside latent attention",
    "jamba": "state-space layers",
    "lfm2": "convolutions",
    "llama4_text": "chunks, temperature by position",
    "longcat_flash": "two attentions a layer",
    "mimo_v2_flash": "values scaled; layers of different heads",
    "minimax_m3_vl_text": "blocks chosen by an index",
    "modernbert-decoder": "a model whose `decoder` is none",
    "nemotron_h": "layers of one kind each",
    "qwen3_5_text": "gated attention beside linear attention",
    "qwen3_next": "a quarter of each head rotated beside linear attention",
    "recurrent_gemma": "sliding windows only, and a cache that is not returned",
    "zaya": "convolved keys and values",
}
REFUSED = {
    "deepseek_v4": "its values depend on the position too",
    "diffllama": "attends twice in one forward",
    "doge": "adds a bias of its own to the logits",
    "hrm_text": "attends twice in one forward",
    "inkling_text": "'position_bias'",
    "mamba": "none of its layers has softmax attention",
    "moshi": "does not bring them back to position 0",
    "rwkv": "none of its 4 layers",
    "xlstm": "none of its 4 layers",
    "zamba2": "attends twice in one forward",
}


@pytest.mark.parametrize("family", WORKING)
def test_a_family_works(family):
    verdict = verdict_on(family)
    assert (verdict.outcome, verdict.detail) == ("works", "")


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_is_refused_for_a_reason(family):
    verdict = verdict_on(family)
    assert verdict.outcome == "refused"
    assert REFUSED[family] in verdict.detail


@pytest.mark.slow
@pytest.mark.parametrize("family", causal_families())
def test_no_family_is_silently_without_memory(family):
    if _is_of_this_version():
        assert verdict_on(family).outcome == _table()[family]
    else:
        assert verdict_on(family).outcome != "wrong"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", causal_families())
def test_eager_attention_works_where_the_other_does(family):
    if _table()[family] != "works":
        pytest.skip("not a family that works")
    memory = attach_everywhere(model := build_tiny(family, attn_implementation="eager"))
    assert forget_and_remember(model, memory, vocab_size=VOCAB_SIZE).error <= TOLERANCE


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", causal_families())
@torch.no_grad()
def test_extended_mind_loads_and_saves_what_the_stock_class_does(family, tmp_path):
    if _table()[family] != "works":
        pytest.skip("not a family that works")
    build_tiny(family).save_pretrained(tmp_path / "stock")
    try:
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    except ValueError as error:  # emu3
        pytest.skip(f"transformers does not load it either: {str(error)[:60]}")
    prompt, memory = torch.arange(5, 13)[None], list(range(20, 60))
    model = emt.ExtendedMindForCausalLM.from_pretrained(
        tmp_path / "stock", external_memories=memory, topk=4
    )
    plain = stock(prompt).logits
    try:
        assert torch.equal(model(prompt, topk=0).logits, plain)
    except ConfigError as error:
        pytest.skip(f"needs layers to be named: {error}")
    assert not torch.equal(model(prompt).logits, plain)
    model.save_pretrained(tmp_path / "saved")
    assert "extended_mind" not in (tmp_path / "saved" / "config.json").read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert type(again) is type(stock)
    assert torch.equal(again(prompt).logits, plain)


@pytest.mark.parametrize("family", ["jamba", "qwen3_next", "falcon_h1", "deepseek_v3"])
def test_generating_steps_as_a_forward_over_the_whole_would(family):
    memory = attach_everywhere(model := build_tiny(family))
    memory.write(list(range(20, 60)), document="d")
    prompt = torch.arange(5, 17)[None]
    new = model.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None)
    with torch.no_grad():
        whole = model(input_ids=new, use_cache=False).logits[0, 11:-1].argmax(-1)
    assert new[0, 12:].tolist() == whole.tolist()


def test_the_table_has_every_family():
    if not _is_of_this_version():
        pytest.skip("the table is of another version of transformers")
    assert list(_table()) == causal_families()
    assert set(_table().values()) <= {"works", "refused", "not built"}
    assert {family for family, outcome in _table().items() if outcome == "not built"} == set(
        NOT_BUILT
    )


def test_the_oracle_fails_if_memories_are_left_out():
    memory = attach_everywhere(model := build_tiny("llama"))
    found = forget_and_remember(model, memory, vocab_size=VOCAB_SIZE, topk=NUM_PREFIX - 1)
    assert found.error > 100 * TOLERANCE
    assert found.effect > found.error


def test_the_oracle_fails_if_keys_belong_to_other_tokens():
    memory = attach_everywhere(model := build_tiny("llama"))
    add = memory.backend.add

    def add_rolled(document, runs):
        rolled = (
            dataclasses.replace(run, keys={idx: key.roll(1, 1) for idx, key in run.keys.items()})
            for run in runs
        )
        return add(document, rolled)

    memory.backend.add = add_rolled
    found = forget_and_remember(model, memory, vocab_size=VOCAB_SIZE)
    assert found.error > 100 * TOLERANCE


def test_only_caches_can_forget():
    with pytest.raises(ValueError, match="expected a Cache of transformers; got tuple"):
        forget(())


def test_models_that_rotate_and_take_no_positions_are_refused():
    class Unplaced(LlamaModel):
        def forward(self, input_ids=None, **options):
            return super().forward(input_ids=input_ids, **options)

    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    model = LlamaForCausalLM(config).eval()
    model.model = Unplaced(config).eval()
    with pytest.raises(UnsupportedModelError, match="the model takes no position_ids"):
        emt.attach(model)


def _is_of_this_version():
    return f"with transformers {transformers.__version__}." in TABLE.read_text(encoding="utf-8")


def _table():
    rows = re.findall(
        r"^\| (\S+) \| (works|refused|not built) \|",
        TABLE.read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    return dict(rows)
