"""Attention functions of the user's own are used, with memories; what is chosen later is followed.

Expected is a model of transformers' own attention whose weights or scaling do what the function
does: a head is off where nothing reads its output.
"""

import copy
import functools

import torch
import pytest
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from emt import MemoryConfig, Passage, attach, detach
from emt.errors import UnsupportedModelError
from tests.families import build

IDS = torch.tensor([[0, 0, 5, 9, 33, 60], [12, 71, 9, 8, 40, 2]])
MASK = (IDS > 0).long()
DOCUMENT = list(range(10, 80))
HEAD = 16


def without_first_head(module, query, key, value, attention_mask, **options):
    output, weights = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    output = output.clone()
    output[:, :, 0] = 0  # (B, Q, H, D)
    return output, weights


def of_half_the_logits(module, query, key, value, attention_mask, scaling, **options):
    key, value = (part.repeat_interleave(2, dim=1) for part in (key, value))
    logits = query @ key.transpose(2, 3) * scaling / 2
    if attention_mask is not None:
        logits = logits + attention_mask
    return (logits.softmax(-1) @ value).transpose(1, 2).contiguous(), None


def ignores_masks(module, query, key, value, attention_mask, **options):
    return sdpa_attention_forward(module, query, key, value, None, is_causal=False, **options)


def takes_the_last_keys(module, query, key, value, attention_mask, **options):
    last = slice(-query.shape[2], None)
    return sdpa_attention_forward(
        module, query, key[:, :, last], value[:, :, last], attention_mask[..., last], **options
    )


def takes_square_masks(module, query, key, value, attention_mask, **options):
    assert query.shape[2] == key.shape[2], "square"
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


FUNCTIONS = {
    "without_first_head": (without_first_head, sdpa_mask),
    "of_half_the_logits": (of_half_the_logits, eager_mask),
    "ignores_masks": (ignores_masks, sdpa_mask),
    "takes_the_last_keys": (takes_the_last_keys, eager_mask),
    "takes_square_masks": (takes_square_masks, sdpa_mask),
}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    functions, masks = (
        dict(interface._global_mapping)
        for interface in (AttentionInterface, AttentionMaskInterface)
    )
    for name, (function, mask) in FUNCTIONS.items():
        functions[name], masks[name] = function, mask
    monkeypatch.setattr(AttentionInterface, "_global_mapping", functions)
    monkeypatch.setattr(AttentionMaskInterface, "_global_mapping", masks)


def doing_the_same(name, model=None):
    """Let a model compute with sdpa what a function does."""
    model = model or build("llama")
    for layer in model.model.layers:
        if name == "of_half_the_logits":
            layer.self_attn.scaling /= 2
        else:
            layer.self_attn.o_proj.weight.data[:, :HEAD] = 0
    return model


def choosing(name):
    model = build("llama")
    model.set_attn_implementation(name)
    return model


@torch.no_grad()
def outputs(model):
    """Return logits of a padded prompt, of a decode step, and of a long prompt."""
    first = model(IDS, attention_mask=MASK)
    more = torch.cat([MASK, MASK[:, -1:]], dim=1)
    step = model(IDS[:, :1] + 5, attention_mask=more, past_key_values=first.past_key_values)
    long = model((torch.arange(70)[None] * 7) % 90 + 3)
    return [first.logits[0, 2:], first.logits[1], step.logits, long.logits]


def assert_close(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=0)


def attached(model, **settings):
    memory = attach(model, MemoryConfig.published(**{"topk": 4, "mode": "token", **settings}))
    memory.write(DOCUMENT, document="d")
    return memory


@pytest.mark.parametrize("name", ["without_first_head", "of_half_the_logits"])
def test_a_function_of_the_users_own_computes_local_attention_and_memories(name):
    model, same = choosing(name), doing_the_same(name)
    own = outputs(model)
    assert_close(own, outputs(same))
    assert (own[-1] - outputs(build("llama"))[-1]).abs().max() > 1e-2
    memory = attach(model, MemoryConfig.published(topk=4, mode="token"))
    for one, other in zip(outputs(model), own, strict=True):
        assert torch.equal(one, other)
    memory.write(DOCUMENT, document="d")
    expected = attached(same)
    assert_close(outputs(model), outputs(same))
    passages = [Passage("d", first=8, stop=40)]
    for retrieve in (False, True):
        with memory.recalling(passages, retrieve=retrieve):
            found = outputs(model)
        with expected.recalling(passages, retrieve=retrieve):
            assert_close(found, outputs(same))
        assert (found[-1] - own[-1]).abs().max() > 1e-2
    with memory.recording(), memory.using(mask_by_sim=True, sim_threshold=0.3):
        found = outputs(model)
    with expected.using(mask_by_sim=True, sim_threshold=0.3):
        assert_close(found, outputs(same))
    detach(model)
    assert model.config._attn_implementation == name
    for one, other in zip(outputs(model), own, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("name", "does"),
    [
        ("ignores_masks", "sees keys that the mask hides"),
        ("takes_the_last_keys", "leaves out further keys"),
        ("takes_square_masks", "raises AssertionError"),
    ],
)
def test_a_function_that_cannot_be_given_memories_is_refused(name, does):
    model = choosing(name)
    with pytest.raises(UnsupportedModelError, match=f"'{name}'.*{does}"):
        attach(model)
    assert model.config._attn_implementation == name
    model.set_attn_implementation("sdpa")
    memory = attached(model)
    expected = outputs(model)
    model.set_attn_implementation(name)
    for _ in range(2):
        with pytest.raises(UnsupportedModelError, match=name):
            model(IDS)
        with pytest.raises(UnsupportedModelError, match=name):
            model.generate(IDS, attention_mask=MASK)
        with pytest.raises(UnsupportedModelError, match=name):
            memory.write(DOCUMENT, document="e")
    model.set_attn_implementation("eager")
    assert_close(outputs(model), expected)
    model.set_attn_implementation(name)
    detach(model)
    assert model.config._attn_implementation == name


WAYS = {
    "method": lambda model, name: model.set_attn_implementation(name),
    "mapping": lambda model, name: model.set_attn_implementation({"": name}),
    "config": lambda model, name: setattr(model.config, "_attn_implementation", name),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_is_chosen_after_attach_is_followed(way):
    model = build("llama")
    attached(model)
    for name in ("eager", "without_first_head", "sdpa"):
        same = build("llama")
        attached(same)
        if name in FUNCTIONS:
            doing_the_same(name, same)
        WAYS[way](model, name)
        assert_close(outputs(model), outputs(same))
        for options in ({}, {"cache_implementation": "static"}):
            WAYS[way](model, "sdpa")
            WAYS[way](model, name)
            calls = [
                each.generate(IDS, attention_mask=MASK, max_new_tokens=4, **options)
                for each in (model, same)
            ]
            assert torch.equal(*calls)
    WAYS[way](model, "eager")
    model(IDS)
    detach(model)
    assert model.config._attn_implementation == "eager"
    assert_close(outputs(model), outputs(build("llama")))


def test_weights_of_eager_attention_are_given_once_it_is_chosen():
    model = build("llama")
    memory = attached(model)
    model.set_attn_implementation("eager")
    with memory.using(enabled=False):
        weights = model(IDS, output_attentions=True).attentions
    assert_close([weight.sum(-1) for weight in weights], [torch.ones(2, 4, 6)] * 3)


def test_models_that_share_a_config_follow_together():
    model = build("llama")
    twin = type(model)(model.config).eval()
    twin.load_state_dict(model.state_dict())
    attached(model), attached(twin)
    expected = outputs(model)
    model.set_attn_implementation("eager")
    assert_close(outputs(twin), expected)
    assert_close(outputs(model), expected)
    detach(twin)
    assert_close(outputs(model), expected)
    detach(model)
    assert model.config._attn_implementation == "eager"


def test_a_copy_of_an_attached_model_keeps_its_function():
    model = choosing("without_first_head")
    own = outputs(model)
    attached(model)
    twin = copy.deepcopy(model)
    for one, other in zip(outputs(twin), own, strict=True):
        assert torch.equal(one, other)
    attached(twin)
    assert_close(outputs(twin), outputs(model))
    detach(twin)
    assert twin.config._attn_implementation == "without_first_head"


def test_a_function_that_is_registered_anew_is_called():
    AttentionInterface.register("mine", functools.partial(of_half_the_logits))
    AttentionMaskInterface.register("mine", eager_mask)
    model, same = choosing("mine"), doing_the_same("of_half_the_logits")
    attached(model), attached(same)
    AttentionInterface.register("mine", without_first_head)
    for layer in same.model.layers:
        layer.self_attn.scaling *= 2
    assert_close(outputs(model), outputs(doing_the_same("without_first_head", same)))


def test_sdpa_itself_may_be_the_users_own():
    AttentionInterface.register("sdpa", without_first_head)
    model = build("llama")
    own = outputs(model)
    attach(model)
    for one, other in zip(outputs(model), own, strict=True):
        assert torch.equal(one, other)
    detach(model)
    assert model.config._attn_implementation == "sdpa"
