import copy
import gc
import weakref

import torch
import pytest
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, LlamaForCausalLM

from emt import MemoryConfig, attach, detach
from emt.errors import ConfigError, MemoryUseError, StoreError, UnsupportedModelError
from tests.families import FAMILIES, REFUSED, build

IDS = torch.tensor([[3, 60, 22, 41, 7, 80, 15, 9], [0, 0, 0, 33, 12, 4, 71, 50]])
MASK = (IDS > 0).long()
DOCUMENT = list(range(10, 70))


@torch.no_grad()
def outputs(model):
    """Return logits of a plain and a left-padded prompt and of a cached step, and greedy tokens."""
    plain = model(IDS[:1], use_cache=True)
    step = model(IDS[:1, :1], past_key_values=plain.past_key_values)
    padded = model(IDS, attention_mask=MASK)
    tokens = model.generate(IDS, attention_mask=MASK, max_new_tokens=5, do_sample=False)
    return plain.logits, step.logits, padded.logits[MASK.bool()], tokens


def same(found, expected):
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("implementation", [None, "eager"], ids=["default", "eager"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_without_rows_and_after_detach_it_is_the_stock_model_bit_for_bit(family, implementation):
    model = family.build(attn_implementation=implementation)
    selected = model.config._attn_implementation
    stock = outputs(model)
    memory = attach(model, MemoryConfig.published(topk=4))
    assert same(outputs(model), stock)
    memory.write(DOCUMENT, document="d")
    assert not torch.equal(outputs(model)[0], stock[0])
    with memory.using(enabled=False):
        assert same(outputs(model), stock)
    memory.remove("d")
    assert same(outputs(model), stock)
    memory.write(DOCUMENT, document="d")
    detach(model)
    assert same(outputs(model), stock)
    assert model.config._attn_implementation == selected
    assert "generate" not in vars(model)


@pytest.mark.parametrize("family", REFUSED, ids=lambda family: family.model_type)
def test_families_that_cannot_be_reached_are_refused_by_name(family):
    model = family.build()
    stock = outputs(model)
    with pytest.raises(UnsupportedModelError, match=family.model_type) as caught:
        attach(model)
    assert "none of its 3 layers" in str(caught.value)
    assert same(outputs(model), stock)
    with pytest.raises(MemoryUseError, match="no memory to detach"):
        detach(model)


def test_models_that_are_not_causal_are_refused():
    small = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    with pytest.raises(UnsupportedModelError, match="bert: layer 0 must attend causally"):
        attach(AutoModel.from_config(AutoConfig.for_model("bert", **small)))
    t5 = AutoConfig.for_model("t5", d_model=32, num_layers=1, num_heads=2, d_ff=32, vocab_size=97)
    with pytest.raises(UnsupportedModelError, match="got T5ForConditionalGeneration"):
        attach(AutoModelForSeq2SeqLM.from_config(t5))
    with pytest.raises(UnsupportedModelError, match="got Linear"):
        attach(torch.nn.Linear(2, 2))


def test_state_dict_and_saved_files_are_untouched(tmp_path):
    model = build("gemma3_text")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "before")
    attach(model).write(DOCUMENT, document="d")
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    model.save_pretrained(tmp_path / "attached")
    names = sorted(path.name for path in (tmp_path / "before").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "attached").iterdir())
    assert "config.json" in names
    for name in names:
        before = (tmp_path / "before" / name).read_bytes()
        assert (tmp_path / "attached" / name).read_bytes() == before


def test_attaching_twice_and_detaching_twice_are_refused():
    model = build("llama")
    memory = attach(model, MemoryConfig.published(topk=4))
    memory.write(DOCUMENT, document="d")
    before = outputs(model)
    for again in (model, model.model):
        with pytest.raises(MemoryUseError, match=r"already has a memory.*detach\(\)"):
            attach(again)
    assert same(outputs(model), before)
    detach(model)
    with pytest.raises(MemoryUseError, match=r"no memory .*attach\(\)"):
        detach(model)
    assert len(attach(model)) == 0


def test_a_memory_outlives_detach_but_neither_writes_nor_opens():
    model = build("llama")
    memory = attach(model)
    memory.write(DOCUMENT, document="d")
    detach(model)
    assert (len(memory), memory.documents) == (60, ["d"])
    with pytest.raises(MemoryUseError, match="cannot write: the model was detached"):
        memory.write(DOCUMENT, document="e")
    with pytest.raises(MemoryUseError, match="cannot open: the model was detached"):
        memory.open("anywhere")


def test_two_models_do_not_meet():
    one, two, plain = build("llama"), build("llama"), build("llama")
    stock = outputs(plain)
    first, second = (
        attach(one, MemoryConfig.published(topk=4)),
        attach(two, MemoryConfig.published(topk=4)),
    )
    first.write(DOCUMENT, document="d")
    with_first = outputs(one)
    assert not same(with_first, stock)
    assert same(outputs(two), stock)
    second.write(DOCUMENT[::-1], document="e")
    assert same(outputs(one), with_first)
    assert not same(outputs(two), with_first)
    detach(one)
    assert same(outputs(one), stock)
    assert not same(outputs(two), stock)
    assert same(outputs(plain), stock)


def test_models_that_share_one_config_object_do_not_meet():
    config = build("llama").config
    models = []
    for _ in range(3):
        torch.manual_seed(0)
        models.append(LlamaForCausalLM(config).eval())
    one, two, plain = models
    assert one.config is two.config
    stock = outputs(plain)
    attach(one, MemoryConfig.published(topk=4)).write(DOCUMENT, document="d")
    with_memory = outputs(one)
    memory = attach(two, MemoryConfig.published(topk=4))
    assert same(outputs(two), stock)
    detach(one)
    memory.write(DOCUMENT, document="d")
    assert same(outputs(two), with_memory)
    assert same(outputs(one), stock)
    assert same(outputs(plain), stock)
    detach(two)
    assert config._attn_implementation == "sdpa"
    assert same(outputs(two), stock)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_deep_copy_is_a_plain_model(implementation):
    model = build("llama", attn_implementation=implementation)
    stock = outputs(model)
    memory = attach(model, MemoryConfig.published(topk=4))
    memory.write(DOCUMENT, document="d")
    with_memory = outputs(model)
    twin = copy.deepcopy(model)
    assert same(outputs(twin), stock)
    with pytest.raises(MemoryUseError, match="no memory to detach"):
        detach(twin)
    attach(twin, MemoryConfig.published(topk=4)).write(DOCUMENT, document="d")
    assert same(outputs(twin), with_memory)
    detach(twin)
    assert twin.config._attn_implementation == implementation
    assert same(outputs(twin), stock)
    assert same(outputs(model), with_memory)
    detach(model)
    assert same(outputs(copy.deepcopy(model)), stock)


def test_a_generate_of_the_users_own_is_kept():
    model = build("llama")
    calls = []

    def generate(*args, **kwargs):
        calls.append(kwargs)
        return type(model).generate(model, *args, **kwargs)

    model.generate = generate
    attach(model)
    model.generate(IDS[:1], max_new_tokens=1)
    detach(model)
    assert model.generate is generate
    assert len(calls) == 1


def test_a_failed_attach_leaves_the_model_as_it_was(tmp_path):
    model = build("llama")
    stock = outputs(model)
    (tmp_path / "file").write_text("not a store")
    for config, error in (
        (MemoryConfig.published(layers=[3]), ConfigError),
        (MemoryConfig.published(path=tmp_path / "file"), StoreError),
    ):
        with pytest.raises(error):
            attach(model, config)
        assert model.config._attn_implementation == "sdpa"
        assert "generate" not in vars(model)
    assert same(outputs(model), stock)
    assert len(attach(model)) == 0


def test_attach_leaves_training_modes_alone():
    model = build("llama")
    model.train()
    model.model.layers[1].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    attach(model)
    assert {name: module.training for name, module in model.named_modules()} == modes


@pytest.mark.parametrize(
    ("model_type", "options", "layers"),
    [
        ("llama", {}, [0, 1, 2]),
        ("gemma2", {}, [1]),
        ("gemma3_text", {}, [1]),
        ("gpt_oss", {}, [1, 2]),
    ],
)
def test_full_attention_layers_read_memories_and_others_if_asked(model_type, options, layers):
    model = build(model_type, **options)
    memory = attach(model)
    memory.write(DOCUMENT, document="d")
    with memory.recording() as recorded:
        model(IDS[:1])
    assert list(recorded[0]) == layers
    with memory.using(layers=[0, 2]), memory.recording() as recorded:
        model(IDS[:1])
    assert list(recorded[0]) == [0, 2]


def test_models_of_sliding_windows_only_must_be_asked():
    model = build("mistral", sliding_window=4)
    with pytest.raises(ConfigError, match="all layers of this mistral have a sliding window"):
        attach(model)
    attach(model, MemoryConfig.published(layers=[2])).write(DOCUMENT, document="d")
    assert outputs(model)[0].isfinite().all()


def test_an_interrupted_generate_keeps_no_memory_alive():
    model = build("llama")
    memory = attach(model)
    memory.write(DOCUMENT, document="d")

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = model.model.layers[1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.generate(IDS[:1], max_new_tokens=2)
    hook.remove()
    detach(model)
    kept = weakref.ref(memory)
    del memory, interrupt, hook
    gc.collect()
    assert kept() is None


def test_detach_leaves_no_trace_of_hooks():
    model = build("llama")
    before = {name: dict(part) for name, part in vars(model.model).items() if "_hooks" in name}
    attach(model)
    detach(model)
    after = {name: dict(part) for name, part in vars(model.model).items() if "_hooks" in name}
    assert after == before
