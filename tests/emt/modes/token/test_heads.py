"""The setting `heads`: those of the head profile search, and the others are left as they are."""

from __future__ import annotations

from typing import Any

import torch
import numpy as np
import pytest

from emt import MemoryConfig, attach, detach
from emt.errors import ConfigError
from emt.model.watch import watching
from memory_backends import Scope
from memory_backends.faiss.coverage import coverage_of
from tests.emt.brute_force import extended_attention
from tests.emt.modes.generation import GREEDY
from tests.emt.modes.passage.recalled import BACKENDS, tokens
from tests.emt.modes.token.attending import attend
from tests.emt.modes.token.test_attend import (
    LAYER,
    ROWS,
    attention_call,
    backend,
    causal_at_the_end,
    mask_of,
)
from tests.emt.routing.worlds import profile_of
from tests.families import build

PROMPT = tokens(9, 5)[None]


def expected_of(
    call: Any, rows: Any, heads: list[int], visible: Any, **options: Any
) -> tuple[Any, Any]:
    """Return outputs (B, H, Q, Dv) by brute force, and ids (B, H, Q, k), -1 of other heads."""
    given = (call.query, call.key, call.value)
    scaling = call.options["scaling"]
    output, ids, _, _ = extended_attention(
        *given, **rows, topk=4, scaling=scaling, visible=visible, **options
    )
    local, _, _, _ = extended_attention(
        *given, **rows, topk=0, scaling=scaling, visible=visible, **options
    )
    others = [head for head in range(call.query.shape[1]) if head not in heads]
    output[:, others], ids[:, others] = local[:, others], -1
    return output, ids


@pytest.mark.parametrize("memory_type", ["manual", "vector_db"])
@pytest.mark.parametrize("heads", [[0], [4], [1, 5], [4, 0, 1], list(range(6))], ids=str)
@pytest.mark.parametrize("options", [{}, {"softcap": 0.5}], ids=["plain", "softcap"])
def test_a_prompt_against_brute_force(memory_type: str, heads: list[int], options: Any) -> None:
    made, rows = backend(memory_type)
    call = attention_call(mask=mask_of(causal_at_the_end), scaling=0.3, **options)
    config = MemoryConfig.published(topk=4)
    found = attend(call, made, config, heads={LAYER: heads}, needs_weights=True)
    output, ids = expected_of(call, rows, heads, causal_at_the_end, **options)
    np.testing.assert_allclose(found.output.transpose(1, 2).numpy(), output, atol=2e-6)
    assert found.retrieved.ids.tolist() == ids.tolist()
    assert not found.retrieved.weights[found.retrieved.ids < 0].any()
    np.testing.assert_allclose(found.weights.sum(-1).numpy(), 1, atol=1e-6)


@pytest.mark.parametrize("memory_type", ["manual", "vector_db"])
@pytest.mark.parametrize("index", ["Flat", "SQfp16"])
@pytest.mark.parametrize("is_recorded", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_a_decode_step_against_brute_force(
    memory_type: str, index: str, is_recorded: bool, masked: bool
) -> None:
    made, rows = backend(memory_type, **({"index": index} if memory_type == "vector_db" else {}))

    def visible(b: int, q: int, s: int) -> bool:
        return s >= 3 * b if masked else True

    mask = mask_of(visible)[:, :, -1:] if masked else None
    call = attention_call(num_queries=1, mask=mask, scaling=0.3)
    config = MemoryConfig.published(topk=4)
    found = attend(call, made, config, heads={LAYER: [1, 3, 4]}, is_recorded=is_recorded)
    output, _ = expected_of(call, rows, [1, 3, 4], visible)
    np.testing.assert_allclose(found.output.transpose(1, 2).numpy(), output, atol=2e-6)


def test_sequences_of_other_scopes_take_the_same_heads() -> None:
    made, rows = backend("manual")
    scopes = [Scope.of([(0, ROWS)]), Scope.of([(3, 5)])]  # the second has fewer than topk
    call = attention_call(num_queries=1, scaling=0.3)
    for is_recorded in (True, False):
        found = attend(
            call,
            made,
            MemoryConfig.published(topk=4),
            scopes,
            {LAYER: [0]},
            is_recorded=is_recorded,
        )
        for sequence, (first, stop) in enumerate([(0, ROWS), (3, 5)]):
            some = {name: part[:, first:stop] for name, part in rows.items()}
            output, ids = expected_of(call, some, [0], lambda b, q, s: True)
            attended = found.output[sequence].transpose(0, 1)
            np.testing.assert_allclose(attended.numpy(), output[sequence], atol=2e-6)
            ids[ids >= 0] += first
            assert found.retrieved.ids[sequence].tolist() == ids[sequence].tolist()


# -- whole models ---------------------------------------------------------------------------------


def remembering(
    model: Any, folder: Any, memory_type: str = "manual", heads: Any = ((0, 1),), **settings: Any
) -> Any:
    """Return a memory of 40 tokens in token mode, read by the KV heads of a profile."""
    profile = folder / "profile.json"
    profile_of(model, heads).write(profile)
    options = {"mode": "token", "topk": 5, "heads": "profile", "profile": str(profile)}
    config = MemoryConfig.published(
        memory_type=memory_type, **{**options, **BACKENDS[memory_type], **settings}
    )
    memory = attach(model, config)
    if not memory.documents:
        memory.write(tokens(40, 1), document="d")
    return memory


@torch.no_grad()
@pytest.mark.parametrize("memory_type", ["manual", "vector_db"])
def test_a_one_layer_model_against_brute_force(memory_type: str, tmp_path: Any) -> None:
    """Query head 1 of the profile reads memories, and head 0 of the same KV head does not."""
    model = build("llama", num_hidden_layers=1)
    memory = remembering(model, tmp_path, memory_type)
    logits = model(PROMPT).logits
    with watching(model) as seen:
        model(PROMPT)
    (call,) = seen.calls
    memory_key, memory_value = memory.backend.fetch(0, torch.arange(40).expand(2, -1))
    given = {
        "query": call.query,
        "key": call.key,
        "value": call.value,
        "memory_key": memory_key,
        "memory_value": memory_value,
    }
    options = {"scaling": call.options["scaling"], "visible": lambda b, q, s: s <= q}
    output, _, _, _ = extended_attention(**given, topk=0, **options)
    output[:, 1] = extended_attention(**given, topk=5, **options)[0][:, 1]
    attended = torch.from_numpy(output).float().transpose(1, 2).flatten(2)
    handle = call.module.o_proj.register_forward_pre_hook(lambda *_: (attended,))
    with memory.using(enabled=False):
        expected = model(PROMPT).logits
        handle.remove()
        stock = model(PROMPT).logits
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=0)
    assert (logits - stock).abs().max() > 1e-2


@torch.no_grad()
def test_all_heads_of_a_layer_are_what_layers_chooses(tmp_path: Any) -> None:
    model = build("llama")
    memory = remembering(model, tmp_path, heads=[(2, head) for head in (3, 1, 0, 2)])
    with memory.recording() as recorded:
        logits = model(PROMPT).logits
    assert list(recorded[-1]) == [2]
    with memory.using(heads="all", layers=[2]):
        torch.testing.assert_close(model(PROMPT).logits, logits, atol=2e-6, rtol=0)
    with memory.using(heads="all"):
        assert not torch.equal(model(PROMPT).logits, logits)


@torch.no_grad()
@pytest.mark.parametrize("memory_type", ["manual", "vector_db"])
def test_generate_goes_on_as_a_forward_without_cache(memory_type: str, tmp_path: Any) -> None:
    """Also after rows were removed, with documents chosen, and in beams."""
    model = build("llama")
    memory = remembering(model, tmp_path, memory_type, heads=((0, 1), (2, 3)))
    memory.write(tokens(30, 2), document="e")
    memory.remove("d")
    memory.write(tokens(30, 3), document="f")
    for documents in (None, ["e"]):
        with memory.using(documents=documents):
            chosen = model.generate(PROMPT, **GREEDY)
            uncached = model.generate(PROMPT, **{**GREEDY, "use_cache": False})
            assert torch.equal(chosen, uncached)
            beams = {**GREEDY, "num_beams": 2}
            uncached = model.generate(PROMPT, **{**beams, "use_cache": False})
            assert torch.equal(model.generate(PROMPT, **beams), uncached)


@torch.no_grad()
def test_a_store_has_indexes_of_these_heads_wherever_it_is_opened(tmp_path: Any) -> None:
    model = build("llama")
    settings = {"path": str(tmp_path / "m"), "heads": ((0, 1), (2, 3))}
    memory = remembering(model, tmp_path, "vector_db", **settings)
    memory.save()
    logits = model(PROMPT).logits
    setting = memory.backend.catalog.setting("index")
    assert coverage_of(setting, memory.backend.layout).heads == {0: (0,), 2: (1,)}
    detach(model)
    memory = remembering(model, tmp_path, "vector_db", **settings)
    assert not memory.backend.lacks_files
    assert torch.equal(model(PROMPT).logits, logits)


@torch.no_grad()
def test_without_a_profile_all_heads_read(tmp_path: Any) -> None:
    model = build("llama")
    memory = attach(model, MemoryConfig.published(topk=5, heads="profile"))
    memory.write(tokens(40, 1), document="d")
    logits = model(PROMPT).logits
    with memory.using(heads="all"):
        assert torch.equal(model(PROMPT).logits, logits)


def test_layers_without_a_head_of_the_profile_are_refused(tmp_path: Any) -> None:
    model = build("llama")
    message = r"must have heads in the layers \[1\]; it has some in \[0, 2\]"
    heads = ((0, 1), (2, 3))
    with pytest.raises(ConfigError, match=message):
        remembering(model, tmp_path, heads=heads, layers=[1])
    memory = remembering(model, tmp_path, heads=heads)
    with pytest.raises(ConfigError, match=message), memory.using(layers=[1]):
        raise AssertionError("the block was entered")
