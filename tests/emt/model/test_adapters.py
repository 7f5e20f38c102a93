"""Families with an adapter: their own numbers bit for bit, and who runs an adapter at all."""

import copy
import functools
import io

import torch
import pytest
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from transformers import AutoConfig, AutoModelForCausalLM

from emt import MemoryConfig, attach, detach
from emt.errors import MemoryUseError, UnsupportedModelError
from emt.model.adapters import installing, mpt
from emt.model.hook import is_bound
from tests.emt.modes.generation import GREEDY
from tests.emt.modes.token.test_generate import greedy_by_hand, remembering
from tests.emt.test_prefix_oracle import BATCHES, TOLERANCE, config
from tests.families import FAMILIES, VOCAB_SIZE, Family, oracle_error

ADAPTED = [family for family in FAMILIES if "through an adapter" in family.note]
_FALCON = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 6}
_GPTJ = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
_NAMED = ("intermediate_size", "max_position_embeddings", "num_key_value_heads")
_ALL = (*_NAMED, "hidden_size", "num_hidden_layers", "num_attention_heads")
VARIANTS = {
    "mpt, six heads, clipped": Family(
        "mpt",
        "",
        {
            **{"d_model": 96, "n_heads": 6, "n_layers": 2},
            "attn_config": {"clip_qkv": 0.3, "softmax_scale": 0.35},
        },
        drop=_ALL,
    ),
    "bloom, six heads": Family("bloom", "", {"hidden_size": 96, "n_head": 6, "n_layer": 2}, _ALL),
    "falcon, multi-query": Family("falcon", "", _FALCON, _NAMED),
    "falcon, multi-head": Family("falcon", "", {**_FALCON, "multi_query": False}, _NAMED),
    "falcon, multi-head with ALiBi": Family(
        "falcon", "", {**_FALCON, "multi_query": False, "alibi": True, "bias": True}, _NAMED
    ),
    "falcon, grouped with ALiBi": Family(
        "falcon",
        "",
        {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 3, "alibi": True},
        _NAMED,
    ),
    "gptj, all dims rotated": Family("gptj", "", {**_GPTJ, "rotary_dim": 16}, _ALL),
    "codegen, all dims rotated": Family("codegen", "", {**_GPTJ, "rotary_dim": 16}, _ALL),
}
FAMILY_NAMES = {f"{each.model_type}: {each.note}": each for each in ADAPTED}
EVERY = {**FAMILY_NAMES, **VARIANTS}
IDS = torch.tensor([[3, 60, 22, 41, 7, 80, 15, 9], [0, 0, 0, 33, 12, 4, 71, 50]])
MASK = (IDS > 0).long()
POSITIONS = (MASK.cumsum(-1) - 1).clamp(min=0)
DOCUMENT = list(range(10, 70))


# What a variant changes is in its own numbers; the slow tests try it in every other way, too.
WITH_SLOW_VARIANTS = [
    *(pytest.param(family, id=name) for name, family in FAMILY_NAMES.items()),
    *(pytest.param(family, id=name, marks=pytest.mark.slow) for name, family in VARIANTS.items()),
]


@torch.no_grad()
def outputs(model):
    """Return logits of a padded batch, of cached steps and with weights asked for, and weights."""
    options = {"attention_mask": MASK, "position_ids": POSITIONS}
    if "position_ids" not in model.forward.__code__.co_varnames:
        del options["position_ids"]
    padded = model(IDS, **options).logits[MASK.bool()]
    cached = model(IDS[:1], use_cache=True)
    step = model(IDS[:1, :1], past_key_values=cached.past_key_values, use_cache=True)
    more = model(IDS[:1, :3], past_key_values=step.past_key_values)
    asked = model(IDS[:1], output_attentions=True)
    weights = [each for each in asked.attentions or () if each is not None]
    return [padded, cached.logits, step.logits, more.logits, asked.logits, *weights]


def same(tensors, expected):
    return all(torch.equal(*pair) for pair in zip(tensors, expected, strict=True))


def attention_modules(model):
    decoder = model.get_decoder()
    bound = [module for module in model.modules() if is_bound(module)]
    return [module for module in bound if module is not decoder]


@pytest.mark.parametrize("implementation", [None, "eager"], ids=["default", "eager"])
@pytest.mark.parametrize("family", EVERY.values(), ids=EVERY)
def test_attention_without_memories_is_the_familys_own_bit_for_bit(family, implementation):
    model = family.build(attn_implementation=implementation)
    stock = outputs(model)
    selected = model.config._attn_implementation
    memory = attach(model, MemoryConfig.published(topk=4))
    assert model.config._attn_implementation == selected
    modules = attention_modules(model)
    assert all("forward" in vars(module) for module in modules)
    assert same(outputs(model), stock)
    memory.write(DOCUMENT, document="d")
    assert not torch.equal(outputs(model)[0], stock[0])
    with memory.using(enabled=False):
        assert same(outputs(model), stock)
        model.train()
        torch.manual_seed(7)
        attached = model(IDS).logits
        model.eval()
    detach(model)
    assert len(modules) == model.config.num_hidden_layers
    assert not any("forward" in vars(module) for module in modules)
    assert same(outputs(model), stock)
    model.train()
    torch.manual_seed(7)
    assert torch.equal(model(IDS).logits, attached)


@pytest.mark.parametrize("model_type", ["bloom", "falcon", "gptj", "codegen", "mpt"])
def test_dropout_falls_where_the_family_lets_it(model_type):
    names = {
        "bloom": {"attention_dropout": 0.5, "hidden_dropout": 0.5},
        "falcon": {"attention_dropout": 0.5, "alibi": True},
        "mpt": {"attn_config": {"attn_pdrop": 1}},  # its config takes whole numbers only
    }
    family = next(each for each in ADAPTED if each.model_type == model_type)
    dropout = names.get(model_type, {"attn_pdrop": 0.5, "resid_pdrop": 0.5})
    model = family.build(**dropout)
    stock = model(IDS).logits
    model.train()
    torch.manual_seed(7)
    expected = model(IDS).logits
    assert not torch.equal(expected, stock)
    attach(model)
    torch.manual_seed(7)
    assert torch.equal(model(IDS).logits, expected)


@pytest.mark.parametrize(
    ("implementation", "batch", "memory_type"),
    [(None, "one", "vector_db"), (None, "left-padded", "manual"), ("eager", "one", "manual")],
)
@pytest.mark.parametrize("name", VARIANTS)
def test_memories_are_context(name, implementation, batch, memory_type):
    model = VARIANTS[name].build(attn_implementation=implementation)
    memory = attach(model, config(memory_type))
    assert oracle_error(model, memory, lengths=BATCHES[batch]) <= TOLERANCE


@pytest.mark.parametrize("family", WITH_SLOW_VARIANTS)
def test_generating_with_a_cache_is_one_forward_a_token(family):
    model, memory = remembering(family.build())
    options = {"pad_token_id": 0, "eos_token_id": 2, **GREEDY}

    def generated(**more):
        return model.generate(IDS, attention_mask=MASK, **{**options, **more})

    expected = generated()
    for row, mask, tokens in zip(expected, MASK, IDS, strict=True):
        assert row[IDS.shape[1] :].tolist() == greedy_by_hand(model, tokens[mask.bool()])
    with memory.recording():  # the general path, not that of a plain decode step
        assert torch.equal(generated(), expected)
    if not getattr(model.config, "alibi", False):  # transformers' Falcon fails with ALiBi
        assert torch.equal(generated(cache_implementation="static"), expected)
    beams = {**options, "num_beams": 3, "num_return_sequences": 3}
    uncached = model.generate(IDS[:1], use_cache=False, **beams)
    assert torch.equal(model.generate(IDS[:1], **beams), uncached)
    with memory.using(enabled=False):
        plain = generated()
    assert not torch.equal(plain, expected)
    detach(model)
    assert torch.equal(generated(), plain)


@pytest.mark.parametrize("family", WITH_SLOW_VARIANTS)
def test_half_precision_is_near_float32(family, tmp_path):
    """All rows are retrieved, so that no near tie between cosines can change which are."""
    family.build(initializer_range=0.05).save_pretrained(tmp_path)
    logits = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        # Not model.to(dtype): loading leaves tables of cosines in float32.
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
        stock = outputs(model)
        memory = attach(model, MemoryConfig.published(topk=100))
        assert same(outputs(model), stock)
        assert memory.backend.layout.dtype == dtype
        memory.write(DOCUMENT, document="d")
        logits[dtype] = outputs(model)[0]
        assert logits[dtype].dtype == dtype
        assert (logits[dtype] - stock[0]).abs().max() > 0.05
    for dtype, bound in ((torch.float16, 0.005), (torch.bfloat16, 0.03)):
        assert (logits[dtype].float() - logits[torch.float32]).abs().max() < bound


def test_grouped_heads_are_stored_once():
    model = VARIANTS["falcon, grouped with ALiBi"].build()
    layer = attach(model).backend.layout.layers[0]
    assert (layer.num_key_value_heads, layer.head_dim) == (3, 16)


def test_adapters_run_only_where_somebody_listens(monkeypatch):
    family = ADAPTED[0]
    model = family.build()
    stock = outputs(model)
    attach(model, MemoryConfig.published(topk=4)).write(DOCUMENT, document="d")
    with_memory = outputs(model)
    twin = copy.deepcopy(model)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=False)

    @functools.wraps(mpt.forward)
    def adapter(*args, **kwargs):
        raise AssertionError("the adapter ran")

    with monkeypatch.context() as patch:
        patch.setitem(installing._ADAPTERS, mpt.ATTENTION, adapter)
        for plain in (twin, loaded, family.build()):
            assert same(outputs(plain), stock)
        with pytest.raises(AssertionError, match="the adapter ran"):
            model(IDS)
    with pytest.raises(MemoryUseError, match="no memory to detach"):
        detach(twin)
    attach(twin, MemoryConfig.published(topk=4)).write(DOCUMENT, document="d")
    assert same(outputs(twin), with_memory)
    detach(twin)
    assert same(outputs(twin), stock)
    assert not any("forward" in vars(module) for module in twin.modules())
    assert same(outputs(model), with_memory)
    with pytest.raises(MemoryUseError, match="already has a memory"):
        attach(model)
    detach(model)
    with pytest.raises(MemoryUseError, match="no memory to detach"):
        detach(model)
    assert same(outputs(model), stock)


class Counting(ModelHook):
    def __init__(self):
        self.calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


@pytest.mark.parametrize("removed", ["after detach", "before detach"])
@pytest.mark.parametrize("added", ["before attach", "after attach"])
@pytest.mark.parametrize("family", ADAPTED[:1], ids=lambda family: family.model_type)
def test_hooks_of_accelerate_still_run(family, added, removed):
    model = family.build()
    stock = outputs(model)
    attach(model, MemoryConfig.published(topk=4)).write(DOCUMENT, document="d")
    with_memory = outputs(model)
    modules = attention_modules(model)
    detach(model)
    hooks = [Counting() for _ in modules]

    def add():
        for module, hook in zip(modules, hooks, strict=True):
            add_hook_to_module(module, hook)

    if added == "before attach":
        add()
        before = [dict(vars(module)) for module in modules]
    memory = attach(model, MemoryConfig.published(topk=4))
    memory.write(DOCUMENT, document="d")
    if added == "after attach":
        add()
    calls = hooks[0].calls
    assert same(outputs(model), with_memory)
    assert hooks[0].calls > calls
    if removed == "before detach":
        for module in modules:
            remove_hook_from_module(module)
        assert same(outputs(model), with_memory)
    detach(model)
    if removed == "after detach":
        if added == "before attach":
            assert [dict(vars(module)) for module in modules] == before
        calls = hooks[0].calls
        assert same(outputs(model), stock)
        assert hooks[0].calls > calls
        for module in modules:
            remove_hook_from_module(module)
    assert same(outputs(model), stock)


def test_what_accelerate_leaves_in_a_module_stays():
    model = ADAPTED[0].build()
    module = model.transformer.blocks[1].attn
    add_hook_to_module(module, Counting())
    remove_hook_from_module(module)
    before = dict(vars(module))
    assert before["forward"].__func__ is type(module).forward
    attach(model)
    assert vars(module)["forward"].__func__ is not type(module).forward
    detach(model)
    assert dict(vars(module)) == before


def test_a_forward_that_somebody_replaced_is_not_bypassed():
    model = ADAPTED[0].build()
    module = model.transformer.blocks[1].attn
    module.forward = lambda *args, **kwargs: type(module).forward(module, *args, **kwargs)
    before = [dict(vars(each)) for each in model.modules()]
    with pytest.raises(UnsupportedModelError, match=r"expected MptAttention\.forward as transf"):
        attach(model)
    assert [dict(vars(each)) for each in model.modules()] == before


@pytest.mark.parametrize("change", ["a class derived from it", "other parameters"])
def test_other_classes_than_the_adapters_own_are_refused(change, monkeypatch):
    model = ADAPTED[0].build()
    kind = type(model.transformer.blocks[0].attn)
    if change == "other parameters":
        monkeypatch.setattr(kind, "forward", lambda self, hidden_states, **_: None)
        assert installing.install(model) == []
        return
    for block in model.transformer.blocks:
        block.attn.__class__ = type("OtherAttention", (kind,), {"__module__": __name__})
    stock = outputs(model)
    with pytest.raises(UnsupportedModelError, match=r"none of its 3 layers.*needs an adapter"):
        attach(model)
    assert same(outputs(model), stock)


def test_a_failed_attach_takes_its_adapters_out():
    model = ADAPTED[0].build()
    with pytest.raises(ValueError, match="0 to 2"):
        attach(model, MemoryConfig.published(layers=[3]))
    assert not any("forward" in vars(module) for module in model.modules())


def test_what_bloom_would_project_otherwise_is_refused():
    options = {"hidden_size": 64, "n_head": 4, "n_layer": 2, "vocab_size": VOCAB_SIZE}
    slices = {"pretraining_tp": 2, "slow_but_exact": True}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("bloom", **options, **slices))
    with pytest.raises(UnsupportedModelError, match="slow_but_exact with pretraining_tp=2"):
        attach(model)
