"""Ask the demo's questions without and with memory, and show what the answers are from.

python scripts/demo/ask.py STORE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from emt import MemoryConfig, attach
from emt.answer import answer
from emt.cli import quiet
from emt.model.loading import load
from memory_backends.catalog import Catalog

HERE = Path(__file__).resolve().parent
MAX_NEW_TOKENS = 24


def main() -> None:
    """Open the store and ask."""
    store = Path(sys.argv[1])
    catalog = Catalog.open(store)
    with quiet():
        loaded = load(catalog.setting("model"))
    config = MemoryConfig.from_dict(catalog.setting("config")).replace(path=str(store))
    memory = attach(loaded.model, config, tokenizer=loaded.tokenizer)
    print(f"{len(memory):,} memories of {len(memory.documents)} documents, from '{store.name}'")
    questions = [json.loads(line) for line in (HERE / "questions.jsonl").open(encoding="utf-8")]
    right = {False: 0, True: 0}
    cited = 0
    for question in questions:
        print(f"\n{question['question']}")
        for enabled in (False, True):
            answered = answer(
                loaded.model,
                memory,
                question["question"],
                max_new_tokens=MAX_NEW_TOKENS,
                enabled=enabled,
            )
            is_right = question["answer"].lower() in answered.text.lower()
            right[enabled] += is_right
            label = "with memory   " if enabled else "without memory"
            print(f"   {label}  {'✓' if is_right else '✗'}  {' '.join(answered.text.split())}")
        for citation in answered.citations[:1]:
            print(f"   cited first     {citation.document}: {' '.join(citation.text.split())}")
            cited += citation.document == question["document"]
    total = len(questions)
    print(
        f"\nright without memory: {right[False]} of {total}; with memory: {right[True]} of {total}"
    )
    print(f"the document with the answer is cited first: {cited} of {total}")


if __name__ == "__main__":
    main()
