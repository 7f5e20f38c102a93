"""Linear biases on local keys and memories, against one softmax written out in float64."""

import torch
import numpy as np
import pytest
from transformers import LlamaModel

from emt import MemoryConfig, attach
from emt.attention.alibi import Alibi
from emt.attention.softmax import memory_attention
from emt.errors import UnsupportedModelError
from emt.model.attention_call import AttentionCall
from tests.emt.modes.token.attending import attend
from tests.emt.modes.token.test_attend import B, D, H, Q, S, attention_call, backend
from tests.families import build

SLOPES = torch.tensor([0.5, 0.25, 0.7, 0.1, 0.03, 0.9])
PADDING = [0, 3]
ROWS = 7
SCALING = 0.3
FRAMES = {
    "from the last key": lambda s, b: s - (S - 1),  # MPT
    "from the first visible key": lambda s, b: max(s - PADDING[b], 0),  # Bloom, Falcon
}


def mask_of(kind, num_queries):
    visible = torch.tensor(
        [
            [[PADDING[b] <= s <= q + S - num_queries for s in range(S)] for q in range(num_queries)]
            for b in range(B)
        ]
    )[:, None]
    if kind == "bool":
        return visible
    return torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)


def alibi_of(frame, distance=None):
    steps = torch.tensor([[FRAMES[frame](s, b) for s in range(S)] for b in range(B)])
    return Alibi(steps[:, None, None] * SLOPES[:, None, None], SLOPES, distance)


def expected(call, rows, distance):
    """Attend to all rows and to what is visible, logits as ALiBi's paper defines them."""
    query, key, value = (part.double().numpy() for part in (call.query, call.key, call.value))
    memory_key, memory_value = (part.double().numpy() for part in rows.values())
    num_queries = query.shape[2]
    output = np.zeros((B, H, num_queries, value.shape[-1]))
    for b, h, q in np.ndindex(B, H, num_queries):
        kv, own = h // (H // key.shape[1]), q + S - num_queries
        slope = float(SLOPES[h])
        logits, values = [], []
        for s in range(PADDING[b], own + 1):
            logits.append(query[b, h, q] @ key[b, kv, s] * SCALING - slope * (own - s))
            values.append(value[b, kv, s])
        for row in range(ROWS):
            steps = own - PADDING[b] + distance(row)
            logits.append(query[b, h, q] @ memory_key[kv, row] * SCALING - slope * steps)
            values.append(memory_value[kv, row])
        weights = np.exp(np.array(logits) - max(logits))
        output[b, h, q] = weights / weights.sum() @ np.array(values)
    return output


@pytest.mark.parametrize("chunk_bytes", [1, 3000, 2**26], ids=["1 query", "few", "all"])
@pytest.mark.parametrize("mask", ["bool", "additive"])
@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("distance", [None, lambda ids: ROWS - ids], ids=["one step", "in order"])
@pytest.mark.parametrize("num_queries", [Q, 1])
@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("memory_type", ["manual", "vector_db"])
def test_against_float64(
    memory_type, recorded, num_queries, distance, frame, mask, chunk_bytes, monkeypatch
):
    monkeypatch.setattr("emt.model.attention_call._CHUNK_BYTES", chunk_bytes)
    torch.manual_seed(0)
    made, rows = backend(memory_type, ROWS)
    plain = attention_call(
        num_queries=num_queries, mask=mask_of(mask, num_queries), scaling=SCALING
    )
    call = AttentionCall(**{**vars(plain), "alibi": alibi_of(frame, distance)})
    attended = attend(call, made, MemoryConfig.published(topk=ROWS), is_recorded=recorded)
    assert (attended[1] is None) == (num_queries == 1 and not recorded and distance is None)
    found = attended[0].transpose(1, 2).numpy()
    wanted = expected(call, rows, distance or (lambda row: 1))
    np.testing.assert_allclose(found, wanted, atol=2e-6)


@pytest.mark.parametrize("num_queries", [S, 1])
def test_no_mask_is_causal(num_queries):
    torch.manual_seed(0)
    made, _ = backend("manual", ROWS)
    call = attention_call(num_queries=num_queries, scaling=SCALING)
    alibi = Alibi((torch.arange(S) * SLOPES[:, None])[None, :, None], SLOPES)
    mask = torch.ones(1, 1, num_queries, S, dtype=torch.bool).tril(S - num_queries)
    found, masked = (
        attend(
            AttentionCall(**{**vars(call), "alibi": alibi, "attention_mask": each}),
            made,
            MemoryConfig.published(topk=4),
            is_recorded=False,
        )[0]
        for each in (None, mask)
    )
    torch.testing.assert_close(found, masked, atol=1e-6, rtol=0)


def test_a_bias_keeps_a_prompt_off_the_fused_path():
    """Fused local attention knows no biases; a bias of nothing must change nothing."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(B, H, Q, D) for _ in range(3))
    memories = [torch.randn(B, H, Q, 3, D) for _ in range(2)]
    with torch.no_grad():
        one, other, biased = (
            memory_attention(
                query, key, value, *memories, scaling=SCALING, is_causal=True, memory_bias=bias
            ).memory_weights
            for bias in (None, torch.zeros(1, H, 1, 1), torch.full((1, H, 1, 1), 2.0))
        )
    torch.testing.assert_close(one, other, atol=1e-6, rtol=0)
    odds = biased.sum(-1) / (1 - biased.sum(-1))
    torch.testing.assert_close(odds, one.sum(-1) / (1 - one.sum(-1)) * np.exp(2), atol=0, rtol=1e-4)


def test_memories_that_are_placed_by_id_need_their_ids():
    with pytest.raises(ValueError, match="placed by their ids here; got none"):
        alibi_of("from the last key", lambda ids: ids).of_memories(None)


class _MaskedLlama(LlamaModel):
    """A decoder with linear biases in its mask, which a token that stands alone does not see."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **options):
        at = torch.arange(input_ids.shape[1])
        distance = (at[:, None] - at).float()
        mask = (-0.5 * distance).masked_fill(distance < 0, torch.finfo(torch.float32).min)
        return super().forward(input_ids, mask[None, None], position_ids, **options)


def test_biases_in_a_mask_are_refused():
    model = build("llama").eval()
    model.model.__class__ = _MaskedLlama
    with pytest.raises(UnsupportedModelError, match="a bias of its own to the logits of visible"):
        attach(model)
