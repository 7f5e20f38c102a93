"""The retrieval experiment's smallest preset, as it ships, with the real model."""

import pytest

from emt.experiments.retrieval.answering import LocalModel
from emt.experiments.retrieval.experiment import run_retrieval
from emt.experiments.retrieval.report import of, summary, values
from emt.experiments.retrieval.settings import RetrievalSettings
from emt.experiments.settings import load_settings
from tests.model.conftest import DEMO

pytestmark = pytest.mark.model

ROOT = DEMO.parent.parent


def test_the_smoke_preset(smollm2, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)  # the file names its items from there
    asked = load_settings(RetrievalSettings, "configs/experiments/retrieval.yaml", preset="smoke")
    results = run_retrieval(
        asked, tmp_path, loading=lambda _: LocalModel(smollm2.model, smollm2.tokenizer)
    )
    records = list(results.items.values())
    assert len(records) == 2 * 6
    mean = {
        condition: sum(values(of(records, condition), "log_prob")) / 2
        for condition in ("closed_book", "document", "emt_manual", "emt_vector_db", "rag")
    }
    assert mean["document"] > mean["closed_book"] + 1
    assert mean["rag"] > mean["closed_book"] + 1
    assert mean["emt_manual"] > mean["closed_book"] + 1
    assert mean["emt_vector_db"] == pytest.approx(mean["emt_manual"], abs=1e-3)
    manual, vector = (of(records, f"emt_{name}") for name in ("manual", "vector_db"))
    assert [one["text"] for one in manual] == [one["text"] for one in vector]
    assert "| all | rag_emt | 2 |" in summary(results.header, results.items)
