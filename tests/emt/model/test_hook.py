import threading

import torch
import pytest
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask, sdpa_mask

from emt.errors import UnsupportedModelError
from emt.model import hook
from emt.model.attention_call import AttentionCall
from emt.model.hook import own_eager
from emt.model.watch import watching
from tests.families import build

NAMES = [hook.IMPLEMENTATION, hook.EAGER_IMPLEMENTATION]
IDS = torch.arange(5, 17)[None]


@pytest.mark.parametrize("name", NAMES)
def test_names_select_no_other_code_path(name):
    assert not [part for part in ("sdpa", "flash", "flex_attention", "/") if part in name]
    assert name in AttentionInterface().valid_keys()


def test_masks_are_those_of_the_implementation_stood_in_for():
    assert AttentionMaskInterface()[hook.IMPLEMENTATION] is sdpa_mask
    assert AttentionMaskInterface()[hook.EAGER_IMPLEMENTATION] is eager_mask


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "own"), [(hook.IMPLEMENTATION, "sdpa"), (hook.EAGER_IMPLEMENTATION, "eager")]
)
def test_a_model_that_nobody_listens_to_computes_its_own_attention(name, own):
    mask = torch.tensor([[0] * 3 + [1] * 9])
    outputs = []
    for implementation in (own, name):
        model = build("llama")
        model.config._attn_implementation = implementation
        outputs.append((model(IDS).logits, model(IDS, attention_mask=mask).logits[:, 3:]))
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert torch.equal(outputs[0][1], outputs[1][1])


class Zeros:
    def begin(self, forward):
        return forward

    def end(self, output):
        pass

    def attend(self, call):
        return torch.zeros_like(call.query).transpose(1, 2), None


@torch.no_grad()
def test_a_listener_computes_the_attention_of_its_module_only():
    model = build("llama")
    stock = model(IDS).logits
    model.config._attn_implementation = hook.IMPLEMENTATION
    module = model.model.layers[1].self_attn
    hook.bind(model.model, [module], Zeros())
    assert hook.is_bound(module)
    bound = model(IDS).logits
    hook.unbind(model.model, [module])
    assert not hook.is_bound(module)
    assert torch.equal(model(IDS).logits, stock)
    module.o_proj.weight.zero_()
    assert torch.equal(model(IDS).logits, bound)


@torch.no_grad()
def test_watching_sees_calls_and_silences_listeners():
    model = build("llama")
    stock = model(IDS).logits
    model.config._attn_implementation = hook.IMPLEMENTATION
    hook.bind(model.model, [layer.self_attn for layer in model.model.layers], Zeros())
    with watching(model) as seen:
        assert torch.equal(model(IDS).logits, stock)
    assert [call.layer_idx for call in seen.calls] == [0, 1, 2]
    assert seen.calls[0].query.shape == (1, 4, 12, 16)
    assert seen.calls[0].key.shape == seen.calls[0].value.shape == (1, 2, 12, 16)
    cos, sin = seen.position_embeddings[seen.calls[1].module]
    torch.testing.assert_close(cos[0, :, 0], torch.arange(12).float().cos())
    torch.testing.assert_close(sin[0, :, 0], torch.arange(12).float().sin())
    assert not torch.equal(model(IDS).logits, stock)
    assert len(seen.calls) == 3
    assert not [layer for layer in model.model.layers if layer._forward_pre_hooks]


@torch.no_grad()
def test_watching_sees_nothing_of_other_threads():
    model = build("llama")
    model.config._attn_implementation = hook.IMPLEMENTATION
    with watching(model) as seen:
        model(IDS)
        other = threading.Thread(target=torch.no_grad()(model), args=(IDS[:, :3],))
        other.start()
        other.join()
    assert [call.query.shape[2] for call in seen.calls] == [12, 12, 12]
    assert {cos.shape[1] for cos, _ in seen.position_embeddings.values()} == {12}


def test_own_eager_is_beside_the_module():
    module = build("qwen3").model.layers[0].self_attn
    assert own_eager(module).__module__ == type(module).__module__
    with pytest.raises(UnsupportedModelError, match="beside Linear; found none"):
        own_eager(torch.nn.Linear(1, 1))


@pytest.mark.parametrize("layer_idx", [None, "3"])
def test_layers_must_be_numbered(layer_idx):
    module = torch.nn.Linear(1, 1)
    module.layer_idx = layer_idx
    part = torch.zeros(1, 1, 1, 1)
    call = AttentionCall(module, part, part, part, None, {}, lambda *_: (part, None))
    with pytest.raises(UnsupportedModelError, match=f"integer layer_idx; got {layer_idx!r}"):
        _ = call.layer_idx
