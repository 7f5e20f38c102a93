"""One model in two dtypes shares a store: rows are converted, and nothing else changes."""

import torch
import numpy as np
import pytest

from emt import MemoryConfig, attach
from emt.errors import MemoryMismatchError
from emt.passage import Passage
from memory_backends import MemoryBackend, Rows
from tests.families import build

PAIRS = [
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float16),
]
BACKENDS = {"manual": {}, "vector_db": {"index": "Flat"}}
DOCUMENT = [(7 * number) % 90 + 5 for number in range(60)]
PROMPT = torch.tensor([[5, 9, 33, 60, 41, 18]])
GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}


def remembering(model, path=None, memory_type="manual", **settings):
    options = {"topk": 4, "sinks": "all", "remove_special_ids": False, "mode": "token"}
    options |= BACKENDS[memory_type] | settings
    return attach(model, MemoryConfig.published(path=path, memory_type=memory_type, **options))


def written_by(dtype, path, memory_type="manual"):
    """Let the model in one dtype write a store; return its rows, as they are."""
    memory = remembering(build("llama", dtype=dtype), path, memory_type)
    memory.write(DOCUMENT, document="d")
    memory.save()
    memory.close()
    backend = MemoryBackend.open(path)
    everything = {
        idx: backend.fetch(idx, torch.arange(len(DOCUMENT)).expand(layer.num_key_value_heads, -1))
        for idx, layer in backend.layout.layers.items()
    }
    document = backend.catalog.document("d")
    backend.close()
    return document, everything


def rounded(document, stored, dtype):
    """Return the rows of a store in another dtype."""
    is_sink = np.isin(np.arange(len(DOCUMENT)), document.sink_rows)
    keys, values = ({idx: pair[part].to(dtype) for idx, pair in stored.items()} for part in (0, 1))
    return Rows(keys, values, document.row_tokens, is_sink)


@pytest.mark.parametrize("memory_type", BACKENDS)
@pytest.mark.parametrize(("written", "read"), PAIRS)
@torch.no_grad()
def test_a_model_computes_what_it_does_with_rows_rounded_beforehand(
    tmp_path, written, read, memory_type
):
    document, stored = written_by(written, tmp_path / "m", memory_type)
    expected, model = build("llama", dtype=read), build("llama", dtype=read)
    # An index has keys that were not rounded yet: it may find another row of two nearly equal ones.
    topk = {"manual": 4, "vector_db": len(DOCUMENT)}[memory_type]
    in_ram = remembering(expected, topk=topk)
    in_ram.backend.add(document, [rounded(document, stored, read)])
    plain = model(PROMPT).logits
    memory = remembering(model, tmp_path / "m", memory_type, topk=topk)
    exact = {"atol": 1e-6, "rtol": 1e-6}  # in half precision, to the last bit
    torch.testing.assert_close(model(PROMPT).logits, expected(PROMPT).logits, **exact)
    assert (model(PROMPT).logits - plain).abs().max() > 0.05
    assert torch.equal(model.generate(PROMPT, **GREEDY), expected.generate(PROMPT, **GREEDY))
    passages = [Passage("d", 10, 30)]
    with memory.recalling(passages), in_ram.recalling(passages):
        torch.testing.assert_close(model(PROMPT).logits, expected(PROMPT).logits, **exact)
        assert (model(PROMPT).logits - plain).abs().max() > 0.05


def test_both_dtypes_write_to_one_store(tmp_path):
    written_by(torch.bfloat16, tmp_path / "m")
    other = remembering(build("llama"), tmp_path / "m")
    other.write(DOCUMENT[::-1], document="e")
    assert other.write_all([("d", DOCUMENT), ("e", DOCUMENT[::-1])]).skipped == 2
    own = remembering(build("llama", dtype=torch.bfloat16), tmp_path / "m")
    assert own.documents == ["d", "e"]
    heads = own.backend.layout.layers[1].num_key_value_heads
    ids = torch.arange(len(own)).expand(heads, -1)
    pairs = zip(own.backend.fetch(1, ids), other.backend.fetch(1, ids), strict=True)
    assert all(torch.equal(ours.float(), theirs) for ours, theirs in pairs)


@pytest.mark.parametrize("name", ["embed_tokens", "layers.1.mlp.up_proj", "norm"])
def test_another_model_in_another_dtype_is_refused(tmp_path, name):
    written_by(torch.bfloat16, tmp_path / "m")
    tuned = build("llama")
    with torch.no_grad():
        tuned.model.get_submodule(name).weight.mul_(1.02)
    differ = "another model; dtype: the memory has 'bfloat16', this model 'float32'; weights: "
    with pytest.raises(MemoryMismatchError, match=differ):
        remembering(tuned, tmp_path / "m")
    detached = build("llama", rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    with pytest.raises(MemoryMismatchError, match="another model; rope: "):
        remembering(detached, tmp_path / "m")
