import torch
import numpy as np
import pytest

from emt import memory_attention
from emt.attention.softmax import decode_attention, group_queries, ungroup, visible_to
from tests.emt.brute_force import extended_attention, joint_softmax

B, H, HKV, Q, S, K, D, DV = 2, 6, 2, 5, 7, 3, 8, 4


def tensors(num_heads=H, dtype=torch.float32):
    shapes = {
        "query": (B, num_heads, Q, D),
        "key": (B, HKV, S, D),
        "value": (B, HKV, S, DV),
        "memory_keys": (B, num_heads, Q, K, D),
        "memory_values": (B, num_heads, Q, K, DV),
    }
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


def by_hand(given, *, scaling, visible=None, usable=None, softcap=None, sinks=None):
    """Compute `memory_attention` with one softmax over concatenated keys, KV heads repeated."""
    arrays = {name: part.double().numpy() for name, part in given.items()}
    num_heads = arrays["query"].shape[1]
    output = np.zeros((B, num_heads, Q, DV))
    weights = np.zeros((B, num_heads, Q, K))
    for b, h, q in np.ndindex(B, num_heads, Q):
        kv = h // (num_heads // HKV)
        used = [n for n in range(K) if usable is None or usable[b, h, q, n]]
        local = [s for s in range(S) if visible is None or visible[b, 0, q, s]]
        if not used and not local:
            continue
        output[b, h, q], shares = joint_softmax(
            arrays["query"][b, h, q],
            [*arrays["memory_keys"][b, h, q, used], *arrays["key"][b, kv, local]],
            [*arrays["memory_values"][b, h, q, used], *arrays["value"][b, kv, local]],
            scaling=scaling,
            softcap=softcap,
            sink=None if sinks is None else float(sinks[h]),
        )
        weights[b, h, q, used] = shares[: len(used)]
    return output, weights


def assert_equal_to(found, expected, tolerance=2e-6):
    output, weights = expected
    np.testing.assert_allclose(found.output.double().numpy(), output, atol=tolerance)
    np.testing.assert_allclose(found.memory_weights.double().numpy(), weights, atol=tolerance)


@pytest.mark.parametrize("num_heads", [HKV, H], ids=["multi-head", "grouped"])
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_one_joint_softmax(num_heads, softcap, with_sinks, masked):
    given = tensors(num_heads)
    sinks = torch.randn(num_heads) if with_sinks else None
    visible = torch.rand(B, 1, Q, S) > 0.4 if masked else None
    usable = torch.rand(B, num_heads, Q, K) > 0.4 if masked else None
    found = memory_attention(
        *given.values(),
        scaling=0.3,
        attention_mask=visible,
        memory_mask=usable,
        softcap=softcap,
        sinks=sinks,
    )
    expected = by_hand(
        given, scaling=0.3, visible=visible, usable=usable, softcap=softcap, sinks=sinks
    )
    assert_equal_to(found, expected)


@pytest.mark.parametrize("num_heads", [HKV, H], ids=["multi-head", "grouped"])
@pytest.mark.parametrize("mask", ["none", "bool", "additive", "shared"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_decode_step_is_the_last_query_of_memory_attention(num_heads, mask, dtype):
    given = tensors(num_heads, dtype)
    for name in ("query", "memory_keys", "memory_values"):
        given[name] = given[name][:, :, -1:]
    visible = torch.rand(1 if mask == "shared" else B, 1, 1, S) > 0.4
    attention_mask = None if mask == "none" else visible
    if mask == "additive":
        attention_mask = torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)
    expected = memory_attention(**given, scaling=0.3, attention_mask=attention_mask).output
    found = decode_attention(**given, scaling=0.3, attention_mask=attention_mask)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=2**-7 if dtype.itemsize == 2 else 0)


@pytest.mark.parametrize("num_heads", [HKV, H], ids=["multi-head", "grouped"])
@pytest.mark.parametrize("num_keys", [Q, S], ids=["prompt", "later chunk"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("grad", [False, True], ids=["fused", "plain"])
def test_causal_is_the_mask_of_causal(num_heads, num_keys, masked, grad):
    given = tensors(num_heads)
    if not grad:  # the fused call wants values as wide as keys
        given["value"], given["memory_values"] = given["key"].flip(0), given["memory_keys"].flip(0)
    given["key"], given["value"] = given["key"][:, :, :num_keys], given["value"][:, :, :num_keys]
    usable = torch.rand(B, num_heads, Q, K) > (0.5 if masked else -1)
    usable[0, 0, 0] = False  # no memory at all
    mask = visible_to(num_keys - Q, num_keys, num_keys, torch.device("cpu"))
    with torch.set_grad_enabled(grad):
        found = memory_attention(**given, scaling=0.3, is_causal=True, memory_mask=usable)
    expected = memory_attention(**given, scaling=0.3, attention_mask=mask, memory_mask=usable)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=2e-6, rtol=0)


def test_decode_steps_of_other_lengths_do_not_share_a_mask():
    for num_keys in (S, S - 2, S):
        given = {name: part[:, :, -1:] for name, part in tensors().items()}
        given["key"], given["value"] = (
            torch.randn(B, HKV, num_keys, D),
            torch.randn(B, HKV, num_keys, DV),
        )
        expected = memory_attention(**given, scaling=0.3).output
        torch.testing.assert_close(
            decode_attention(**given, scaling=0.3), expected, atol=2e-6, rtol=0
        )


def test_decode_steps_of_any_mode_and_default_dtype_follow_each_other():
    given = {name: part[:, :, -1:] for name, part in tensors().items()}
    given["key"], given["value"] = torch.randn(B, HKV, 97, D), torch.randn(B, HKV, 97, DV)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.inference_mode():
            first = decode_attention(**given, scaling=0.3)
    finally:
        torch.set_default_dtype(torch.float32)
    given["query"] = given["query"].clone().requires_grad_()
    second = decode_attention(**given, scaling=0.3)
    assert torch.equal(first, second.detach())
    second.sum().backward()
    assert given["query"].grad.abs().sum() > 0


def test_additive_masks_mean_the_same_as_bool():
    given = tensors()
    visible = torch.ones(B, 1, Q, S, dtype=torch.bool).tril(2)
    additive = torch.zeros(B, 1, Q, S).masked_fill(~visible, torch.finfo(torch.float32).min)
    found = memory_attention(*given.values(), scaling=1.0, attention_mask=additive)
    assert_equal_to(found, by_hand(given, scaling=1.0, visible=visible))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)], ids=str
)
def test_half_precision_is_computed_in_float32(dtype, tolerance):
    given = tensors(dtype=dtype)
    found = memory_attention(*given.values(), scaling=0.3)
    assert (found.output.dtype, found.memory_weights.dtype) == (dtype, torch.float32)
    output, weights = by_hand(given, scaling=0.3)
    np.testing.assert_allclose(found.output.double().numpy(), output, atol=tolerance)
    np.testing.assert_allclose(found.memory_weights.numpy(), weights, atol=2e-6)


def test_huge_logits_do_not_overflow():
    given = tensors()
    found = memory_attention(*given.values(), scaling=1e4)
    assert_equal_to(found, by_hand(given, scaling=1e4), tolerance=1e-3)


@pytest.mark.parametrize("additive", [False, True])
def test_a_query_without_local_keys_reads_memories_only(additive):
    given = tensors()
    visible = torch.ones(B, 1, Q, S, dtype=torch.bool)
    visible[0, 0, 2] = False
    mask = torch.zeros(B, 1, Q, S).masked_fill(~visible, -torch.inf) if additive else visible
    found = memory_attention(*given.values(), scaling=0.3, attention_mask=mask)
    assert_equal_to(found, by_hand(given, scaling=0.3, visible=visible))
    np.testing.assert_allclose(found.memory_weights[0, :, 2].sum(-1), 1.0, atol=1e-6)


@pytest.mark.parametrize("with_sinks", [False, True])
def test_a_query_that_sees_nothing_gets_zeros(with_sinks):
    given = tensors()
    found = memory_attention(
        *given.values(),
        scaling=0.3,
        attention_mask=torch.zeros(B, 1, Q, S, dtype=torch.bool),
        memory_mask=torch.zeros(B, H, Q, K, dtype=torch.bool),
        sinks=torch.zeros(H) if with_sinks else None,
    )
    assert torch.equal(found.output, torch.zeros(B, H, Q, DV))
    assert torch.equal(found.memory_weights, torch.zeros(B, H, Q, K))


def test_masked_memories_change_nothing():
    given = tensors()
    usable = torch.zeros(B, H, Q, K, dtype=torch.bool)
    found = memory_attention(*given.values(), scaling=0.3, memory_mask=usable)
    repeated = [given[name].repeat_interleave(H // HKV, dim=1) for name in ("key", "value")]
    local = torch.nn.functional.scaled_dot_product_attention(given["query"], *repeated, scale=0.3)
    torch.testing.assert_close(found.output, local, atol=1e-6, rtol=0)


def test_a_query_sees_only_its_own_memories():
    given = tensors()
    before = memory_attention(*given.values(), scaling=0.3).output
    given["memory_values"][:, :, 1] += 1.0
    after = memory_attention(*given.values(), scaling=0.3).output
    changed = (before != after).any(-1).any(1).any(0)  # (Q,)
    assert changed.tolist() == [False, True, False, False, False]


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        (
            "memory_keys",
            (B, HKV, Q, K, D),
            r"memory_keys must have shape \(B=2, H=6, Q=5, k, D=8\)",
        ),
        ("memory_keys", (B, H, Q, K, D + 1), r"got \(2, 6, 5, 3, 9\)"),
        ("memory_values", (B, H, Q, K + 1, DV), "memory_values must have shape"),
        ("key", (B, 4, S, D), "query heads must be a multiple of KV heads; got 6 and 4"),
    ],
)
def test_wrong_shapes_are_refused(name, shape, message):
    given = {**tensors(), name: torch.randn(shape)}
    with pytest.raises(ValueError, match=message):
        memory_attention(*given.values(), scaling=1.0)


def test_group_queries_stacks_the_heads_of_a_group_and_ungroup_undoes_it():
    query = torch.randn(B, H, Q, D)
    grouped = group_queries(query, HKV)
    assert grouped.shape == (HKV, B * (H // HKV) * Q, D)
    group = H // HKV
    for b, h, q in np.ndindex(B, H, Q):
        flat = (b * group + h % group) * Q + q
        assert torch.equal(grouped[h // group, flat], query[b, h, q])
    assert torch.equal(ungroup(grouped, B, Q), query)


def test_visible_to_is_causal_from_the_first_key():
    assert visible_to(2, 4, 5, torch.device("cpu")).tolist() == [
        [True, True, True, False, False],
        [True, True, True, True, False],
    ]


def test_the_brute_force_is_itself_one_softmax():
    """The two independent computations of these tests agree where their inputs can be the same."""
    memory = {"memory_key": torch.randn(HKV, K, D), "memory_value": torch.randn(HKV, K, DV)}
    given = tensors()
    output, ids, _, weights = extended_attention(
        given["query"],
        given["key"],
        given["value"],
        **memory,
        topk=K,
        scaling=0.3,
        visible=lambda b, q, s: True,
    )
    heads = torch.arange(H).view(1, H, 1, 1) // (H // HKV)
    given["memory_keys"] = memory["memory_key"][heads, torch.from_numpy(ids)]
    given["memory_values"] = memory["memory_value"][heads, torch.from_numpy(ids)]
    assert_equal_to(memory_attention(*given.values(), scaling=0.3), (output, weights))
