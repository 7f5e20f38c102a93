"""The comparison with the real model: what it was told beats what it knows."""

import pytest
from experiments.comparison.run import run_comparison
from experiments.comparison.settings import ComparisonSettings

from tests.experiments.question_sets import write_set

pytestmark = pytest.mark.model

TEXTS = {
    "lamp": "The lamp of the Orrin lighthouse was lit by Tobias Fell in 1871. It burnt whale oil.",
    "mill": "The mill at Brask was bought by Ingrid Voss, who painted its doors yellow.",
    "ferry": "The ferry to Sandholm leaves at nine. Its captain has a parrot called Admiral.",
}
QUESTIONS = {
    "lamp": ("Who lit the lamp of the Orrin lighthouse?", "Tobias Fell"),
    "mill": ("Who bought the mill at Brask?", "Ingrid Voss"),
    "ferry": ("What is the parrot of the captain called?", "Admiral"),
}


def test_evidence_and_passages_beat_closed_book(smollm2, tmp_path):
    questions = [
        {
            "id": name,
            "question": question,
            "answers": [answer],
            "evidence": [{"document": name, "text": answer}],
        }
        for name, (question, answer) in QUESTIONS.items()
    ]
    documents = [{"name": name, "text": text} for name, text in TEXTS.items()]
    asked = ComparisonSettings(
        sets=[write_set(tmp_path / "three", questions, documents)],
        conditions=["closed_book", "evidence", "passages", "rag_bm25"],
        max_new_tokens=8,
    )
    items = run_comparison(asked, tmp_path / "out", lambda: smollm2).items
    nats = {
        name: sum(one["log_prob"] for one in items.values() if one["condition"] == name) / 3
        for name in asked.conditions
    }
    for name in ("evidence", "passages", "rag_bm25"):
        assert nats[name] > nats["closed_book"] + 1
    of_passages = [one for one in items.values() if one["condition"] == "passages"]
    assert all(one["found"] for one in of_passages)
    assert all(one["is_cited"] for one in of_passages if one["right"])
