"""A config chooses a backend by name, one that somebody else has registered included."""

import torch
import pytest

from emt import MemoryConfig, attach
from memory_backends import MemoryBackend, register_searcher
from memory_backends.search.manual import ManualSearcher
from tests.families import build


class Counting(ManualSearcher):
    """Exact search that counts its calls."""

    num_searches = 0

    def candidates(self, *args):
        Counting.num_searches += 1
        return super().candidates(*args)


register_searcher("counting", Counting)


@torch.no_grad()
def test_a_registered_searcher_serves_a_memory():
    logits = []
    document, prompt = torch.arange(3, 60), torch.arange(5, 12)[None]
    for memory_type in ("manual", "counting"):
        model = build("llama")
        config = MemoryConfig.published(memory_type=memory_type, topk=4, remove_special_ids=False)
        attach(model, config).write(document, document="d")
        logits.append(model(prompt).logits)
    assert torch.equal(logits[0], logits[1])
    assert Counting.num_searches == 3  # once in each layer


@pytest.mark.parametrize("memory_type", ["manual", "vector_db"])
@pytest.mark.parametrize(
    ("dtype", "codec"),
    [(torch.float32, "float16"), (torch.bfloat16, "exact"), (torch.float16, "exact")],
)
def test_automatic_codec_keeps_16_bits_of_each_number(tmp_path, dtype, codec, memory_type):
    for asked, kept in (("auto", codec), ("exact", "exact"), ("bfloat16", "bfloat16")):
        path, model = tmp_path / asked, build("llama", dtype=dtype)
        config = MemoryConfig(memory_type=memory_type, row_codec=asked, path=path, index="Flat")
        memory = attach(model, config)
        memory.write(torch.arange(3, 60), document="d")
        memory.close()
        backend = MemoryBackend.open(path)
        assert backend.catalog.row_codec == kept
        num_bytes = 4 if (dtype, kept) == (torch.float32, "exact") else 2
        for idx in backend.layout.layers:
            size = (path / "rows" / f"layer-{idx:03d}.bin").stat().st_size
            assert size == 57 * 2 * (16 + 16) * num_bytes  # rows, KV heads, keys and values


def test_automatic_codec_changes_nothing_in_ram(tmp_path):
    backends = []
    for codec in ("auto", "exact"):
        memory = attach(build("llama"), MemoryConfig(row_codec=codec, remove_special_ids=False))
        memory.write(torch.arange(3, 60), document="d")
        backends.append(memory.backend)
    ids = torch.arange(57).expand(2, -1)
    for parts in zip(*(backend.fetch(1, ids) for backend in backends), strict=True):
        assert torch.equal(*parts)
    memory = attach(build("llama"), MemoryConfig(remove_special_ids=False))
    memory.write(torch.arange(3, 60), document="d")
    memory.save(tmp_path / "copy")
    for part, exact in zip(
        MemoryBackend.open(tmp_path / "copy").fetch(1, ids), backends[1].fetch(1, ids), strict=True
    ):
        assert torch.equal(part, exact.half().float())
