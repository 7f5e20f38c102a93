"""The retrieval experiment's smallest preset, as it ships, with the real model.

By default its shorter document alone.
"""

import pytest
from experiments.retrieval.answering import LocalModel
from experiments.retrieval.experiment import run_retrieval
from experiments.retrieval.report import of, summary, values
from experiments.retrieval.settings import RetrievalSettings
from experiments.settings import load_settings

from tests.model.conftest import DEMO

pytestmark = pytest.mark.model

ROOT = DEMO.parent.parent


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        (["splits=[0.5k]", "max_new_tokens=8"], 1),
        pytest.param([], 2, marks=pytest.mark.slow),
    ],
    ids=["one document", "all"],
)
def test_the_smoke_preset(smollm2, tmp_path, monkeypatch, changes, count):
    monkeypatch.chdir(ROOT)  # the file names its items from there
    base = "configs/experiments/retrieval.yaml"
    asked = load_settings(RetrievalSettings, base, preset="smoke", changes=changes)
    results = run_retrieval(
        asked,
        tmp_path,
        loading=lambda asked: LocalModel(
            smollm2.model, smollm2.tokenizer, max_new_tokens=asked.max_new_tokens
        ),
    )
    records = list(results.items.values())
    assert len(records) == count * 6
    mean = {
        condition: sum(values(of(records, condition), "log_prob")) / count
        for condition in ("closed_book", "document", "emt_manual", "emt_vector_db", "rag")
    }
    assert mean["document"] > mean["closed_book"] + 1
    assert mean["rag"] > mean["closed_book"] + 1
    assert mean["emt_manual"] > mean["closed_book"] + 1
    assert mean["emt_vector_db"] == pytest.approx(mean["emt_manual"], abs=1e-3)
    manual, vector = (of(records, f"emt_{name}") for name in ("manual", "vector_db"))
    assert [one["text"] for one in manual] == [one["text"] for one in vector]
    assert f" | rag_emt | {count} |" in summary(results.header, results.items)
