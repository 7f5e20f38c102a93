"""PEFT adapters on an attached model, before and after `attach`: adapted models are others."""

import warnings

import torch
import pytest
from transformers import LogitsProcessor

from emt import MemoryConfig, attach, detach
from emt.errors import MemoryMismatchError, MemoryUseError, UnsupportedModelError
from emt.model.identity import sketch_of, weights_fingerprint
from tests.families import build

peft = pytest.importorskip("peft")

PROMPT = torch.tensor([[5, 9, 33, 60, 41, 18]])
GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
DOCUMENT = [(7 * number) % 90 + 5 for number in range(80)]
TARGETS = ["q_proj", "k_proj", "v_proj"]


def lora(seed=1, **options):
    return peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM", **options
    )


def wrapped(model, config=None):
    with warnings.catch_warnings():  # of a property of transformers that peft still reads
        warnings.simplefilter("ignore", FutureWarning)
        found = peft.get_peft_model(model, config or lora())
    return found.eval()


@torch.no_grad()
def trained(model, *, seed=1, name="default"):
    """Give an adapter weights that change what the model computes."""
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        if "lora_" in key and f".{name}." in key:
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@torch.no_grad()
def merged_by_hand(peft_model):
    """Return a plain model with the adapter's products added to its weights: W + alpha / r B A."""
    plain = build("llama")
    factors = dict(peft_model.get_base_model().named_parameters())
    for name, parameter in plain.named_parameters():
        stem = name.removesuffix(".weight")
        if stem.endswith(tuple(TARGETS)):
            a, b = (factors[f"{stem}.lora_{which}.default.weight"] for which in "AB")
            parameter += 2 * b @ a
    return plain


@torch.no_grad()
def logits(model):
    return model(PROMPT).logits


@torch.no_grad()
def error(adapted, expected, ids=PROMPT):
    """Return the largest difference of two models' logits, in standard deviations of them."""
    wanted = expected(ids).logits
    return float((adapted(ids).logits - wanted).abs().max() / wanted.std())


def remembering(model, **settings):
    memory = attach(model, MemoryConfig.published(topk=4, **settings))
    memory.write(DOCUMENT, document="d")
    return memory


def around(model):
    return wrapped(model)


def inside(model):
    """Add an adapter in transformers' own way."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.add_adapter(lora())
    return model.eval()


@pytest.mark.parametrize("adapt", [around, inside])
@pytest.mark.parametrize("memory_type", ["manual", "vector_db"])
def test_an_adapted_model_remembers_as_one_with_the_adapter_in_its_weights(memory_type, adapt):
    adapted = trained(adapt(build("llama")))
    expected = merged_by_hand(adapted if adapt is around else wrapper_of(adapted))
    # W + B A and W x + B (A x) are rounded differently while the document is read, too
    rounding = error(adapted, expected, torch.tensor([DOCUMENT + PROMPT[0].tolist()]))
    assert rounding <= 1e-4
    remembering(expected)
    memory = remembering(adapted, memory_type=memory_type)
    assert error(adapted, expected) <= rounding
    tokens = adapted.generate(input_ids=PROMPT, **GREEDY).tolist()
    assert tokens == expected.generate(PROMPT, **GREEDY).tolist()
    with memory.using(enabled=False):
        assert adapted.generate(input_ids=PROMPT, **GREEDY).tolist() != tokens
    detach(adapted)
    plain = merged_by_hand(adapted if adapt is around else wrapper_of(adapted))
    assert error(adapted, plain) <= 2e-5


def wrapper_of(model):
    """Stand in for a PEFT model around one that has its adapter inside."""

    class Around:
        get_base_model = staticmethod(lambda: model)

    return Around


def test_an_adapter_that_comes_later_reads_the_memory_and_may_not_write_to_it(tmp_path):
    model = build("llama")
    memory = remembering(model, path=str(tmp_path / "store"))
    before = model.generate(PROMPT, **GREEDY).tolist()
    adapted = wrapped(model)  # products of zero: the same function
    assert adapted.generate(input_ids=PROMPT, **GREEDY).tolist() == before
    trained(adapted)
    after = adapted.generate(input_ids=PROMPT, **GREEDY).tolist()
    assert after != before
    with memory.using(enabled=False):
        assert adapted.generate(input_ids=PROMPT, **GREEDY).tolist() not in (before, after)
    with pytest.raises(MemoryUseError, match="the model's weights have changed since attach"):
        memory.write(DOCUMENT, document="e")
    with adapted.disable_adapter():
        assert adapted.generate(input_ids=PROMPT, **GREEDY).tolist() == before
        memory.write(DOCUMENT[:9], document="e")
    detach(adapted)
    with pytest.raises(MemoryMismatchError, match="weights: the memory has"):
        attach(adapted, MemoryConfig.published(path=str(tmp_path / "store")))
    opened = attach(adapted.unload(), MemoryConfig.published(path=str(tmp_path / "store")))
    assert opened.documents == ["d", "e"]


def test_training_between_writes_is_refused():
    model = build("llama")
    memory = remembering(model)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.001)
    with pytest.raises(MemoryUseError, match=r"by training or by an adapter.*detach\(\)"):
        memory.write(DOCUMENT, document="e")
    assert memory.documents == ["d"]
    detach(model)
    remembering(model)


def test_fingerprints_are_of_what_the_model_computes():
    base = weights_fingerprint(build("llama"))
    peft_model = trained(wrapped(build("llama")))
    model = peft_model.get_base_model()
    first = weights_fingerprint(model)
    with peft_model.disable_adapter():
        assert weights_fingerprint(model) == base
    peft_model.add_adapter("second", lora())
    trained(peft_model, seed=2, name="second")
    assert weights_fingerprint(model) == first  # it is there, and not in use
    peft_model.set_adapter("second")
    second = weights_fingerprint(model)
    peft_model.set_adapter("default")
    assert weights_fingerprint(model) == first
    peft_model.merge_adapter()
    merged = weights_fingerprint(model)
    peft_model.unmerge_adapter()
    assert weights_fingerprint(peft_model.merge_and_unload()) == merged
    assert len({base, first, second, merged}) == 4


def test_a_sketch_is_of_what_the_model_computes():
    plain = build("llama")
    base = sketch_of(plain, plain.get_decoder())
    peft_model = trained(wrapped(build("llama")))
    model = peft_model.get_base_model()
    adapted = sketch_of(model, model.get_decoder())
    assert not adapted.is_same(base, torch.float32, torch.bfloat16)
    assert adapted.correlation(base) == pytest.approx(1)  # a tuned model has its base's profile
    with peft_model.disable_adapter():
        unused = sketch_of(model, model.get_decoder())
    assert unused.to_json() == base.to_json()
    merged = peft_model.merge_and_unload()
    assert not sketch_of(merged, merged.get_decoder()).is_same(base, torch.float32, torch.bfloat16)


class Clearing(LogitsProcessor):
    def __init__(self, memory):
        self.memory = memory

    def __call__(self, input_ids, scores):
        self.memory.clear()
        return scores


@pytest.mark.parametrize("attached_first", [True, False])
def test_nothing_changes_the_memory_while_the_wrapper_generates(attached_first):
    model = build("llama")
    memory = remembering(model) if attached_first else None
    adapted = wrapped(model)
    memory = memory or remembering(adapted)
    with pytest.raises(MemoryUseError, match="cannot clear while the model is generating"):
        adapted.generate(input_ids=PROMPT, logits_processor=[Clearing(memory)], **GREEDY)
    assert len(memory) == len(DOCUMENT)
    with pytest.raises(MemoryUseError, match="already has a memory"):
        attach(adapted)
    detach(adapted)
    with pytest.raises(MemoryUseError, match="no memory to detach"):
        detach(model)


def test_an_adapter_loaded_from_a_folder_opens_the_store_it_wrote(tmp_path):
    adapted = trained(wrapped(build("llama")))
    remembering(adapted, path=str(tmp_path / "store"), memory_type="vector_db").save()
    expected = adapted.generate(input_ids=PROMPT, **GREEDY).tolist()
    adapted.save_pretrained(tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        again = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "adapter").eval()
    attach(
        again, MemoryConfig.published(topk=4, path=str(tmp_path / "store"), memory_type="vector_db")
    )
    assert again.generate(input_ids=PROMPT, **GREEDY).tolist() == expected


def test_trained_tokens_before_the_prompt_are_refused():
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    adapted = wrapped(build("llama"), config)
    with pytest.raises(UnsupportedModelError, match="PeftModelForCausalLM puts trained tokens"):
        attach(adapted)
