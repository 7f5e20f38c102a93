"""Plain questions at default settings: the first five minutes of a newcomer."""

import json
from pathlib import Path

import pytest

from emt import MemoryConfig, attach, detach
from emt.answer import answer

pytestmark = pytest.mark.model

DEMO = Path(__file__).parent.parent.parent / "scripts" / "demo"
QUESTIONS = [
    json.loads(line) for line in (DEMO / "questions.jsonl").read_text(encoding="utf-8").splitlines()
]


@pytest.mark.parametrize("name", ["smollm2", "qwen05"])
def test_nine_of_ten_plain_questions_are_answered_and_cited(name, request, tmp_path):
    loaded = request.getfixturevalue(name)
    config = MemoryConfig(memory_type="vector_db", path=tmp_path / "store")
    memory = attach(loaded.model, config, tokenizer=loaded.tokenizer)
    try:
        memory.write_all(
            (path.name, path.read_text(encoding="utf-8"))
            for path in sorted((DEMO / "documents").glob("*.txt"))
        )
        assert memory.mode == "passage"
        num_right = num_cited = 0
        for question in QUESTIONS:
            answered = answer(loaded.model, memory, question["question"], max_new_tokens=24)
            num_right += question["answer"] in answered.text
            num_cited += answered.citations[0].document == question["document"]
    finally:
        detach(loaded.model)
        memory.close()
    assert num_right >= 9
    assert num_cited >= 9
