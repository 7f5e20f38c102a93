"""The method once more, in float64, one query at a time: what the fast code is compared with."""

import math

import numpy as np


def retrieve(query, keys, k):
    """Return ids and cosines of the k rows nearest to one query (D,), best first."""
    cosines = [
        float(np.dot(query, key) / (np.linalg.norm(query) * np.linalg.norm(key))) for key in keys
    ]
    ids = sorted(range(len(keys)), key=lambda row: -cosines[row])[:k]
    return ids, [cosines[row] for row in ids]


def joint_softmax(query, keys, values, *, scaling, softcap=None, sink=None):
    """Attend with one query (D,) to all keys; return the output and each key's weight."""
    logits = [float(np.dot(query, key)) * scaling for key in keys]
    if softcap is not None:
        logits = [softcap * math.tanh(logit / softcap) for logit in logits]
    highest = max([*logits, *([] if sink is None else [sink])])
    exponentials = [math.exp(logit - highest) for logit in logits]
    total = sum(exponentials) + (0.0 if sink is None else math.exp(sink - highest))
    weights = [exponential / total for exponential in exponentials]
    return sum(weight * value for weight, value in zip(weights, values, strict=True)), weights


def extended_attention(
    query,
    key,
    value,
    memory_key,
    memory_value,
    *,
    topk,
    scaling,
    visible,
    softcap=None,
    sinks=None,
    threshold=-math.inf,
):
    """Attend with every query to its own memories and to the local keys that it sees.

    Args:
        query: (B, H, Q, D).
        key, value: (B, Hkv, S, D) and (B, Hkv, S, Dv).
        memory_key, memory_value: (Hkv, M, D) and (Hkv, M, Dv).
        topk: memories a query retrieves.
        scaling: factor on logits.
        visible: visible(b, q, s) tells whether a query sees a local key.
        softcap: see `emt.memory_attention`.
        sinks: (H,) logits without value.
        threshold: memories with a cosine not above it are left out.

    Returns:
        Output (B, H, Q, Dv), ids, scores and weights, each (B, H, Q, topk).
    """
    query, key, value, memory_key, memory_value = (
        np.asarray(part, dtype=np.float64) for part in (query, key, value, memory_key, memory_value)
    )
    batch, num_heads, num_queries, _ = query.shape
    group = num_heads // key.shape[1]
    found = min(topk, memory_key.shape[1])
    output = np.zeros((batch, num_heads, num_queries, value.shape[-1]))
    ids = np.full((batch, num_heads, num_queries, topk), -1)
    scores = np.full(ids.shape, -np.inf)
    weights = np.zeros(ids.shape)
    for b in range(batch):
        for h in range(num_heads):
            for q in range(num_queries):
                one, kv = query[b, h, q], h // group
                rows, cosines = retrieve(one, memory_key[kv], topk)
                ids[b, h, q, :found], scores[b, h, q, :found] = rows, cosines
                used = [n for n in range(found) if cosines[n] > threshold]
                local = [s for s in range(key.shape[2]) if visible(b, q, s)]
                if not used and not local:
                    continue
                output[b, h, q], shares = joint_softmax(
                    one,
                    [*(memory_key[kv][rows[n]] for n in used), *key[b, kv][local]],
                    [*(memory_value[kv][rows[n]] for n in used), *value[b, kv][local]],
                    scaling=scaling,
                    softcap=softcap,
                    sink=None if sinks is None else float(sinks[h]),
                )
                weights[b, h, q, used] = shares[: len(used)]
    return output, ids, scores, weights
