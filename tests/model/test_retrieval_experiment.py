"""The retrieval experiment's smallest preset, as it ships, with the real model.

By default its shorter document alone.
"""

import pytest
from experiments.retrieval.report import summary
from experiments.retrieval.run import run_retrieval
from experiments.retrieval.settings import RetrievalSettings
from experiments.settings import read_settings
from experiments.tables import grouped, values

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
    path = "configs/experiments/retrieval.yaml"
    asked = read_settings(path, preset="smoke", changes=changes)
    assert asked.pop("experiment") == "retrieval"
    results = run_retrieval(RetrievalSettings(**asked), tmp_path, lambda: smollm2)
    by_condition = grouped(results.items.values(), "condition")
    assert [len(records) for records in by_condition.values()] == [count] * 6
    mean = {
        condition: sum(values(records, "log_prob")) / count
        for (condition,), records in by_condition.items()
    }
    for condition in ("document", "rag", "emt_manual"):
        assert mean[condition] > mean["closed_book"] + 1
    assert mean["emt_vector_db"] == pytest.approx(mean["emt_manual"], abs=1e-3)
    manual, vector = (by_condition[f"emt_{name}",] for name in ("manual", "vector_db"))
    assert [one["text"] for one in manual] == [one["text"] for one in vector]
    assert f" | rag_emt | {count} |" in summary(results.header, results.items)
