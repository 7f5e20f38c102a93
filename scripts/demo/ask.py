"""Ask the demo's questions without and with memory, and show the passages that caused the answers.

python scripts/demo/ask.py STORE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from emt import MemoryConfig, attach
from emt.cli import quiet
from emt.generation import generate
from emt.loading import load
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
        print(f"\nQ  {question['question']}")
        for use_memory in (False, True):
            answer = generate(
                loaded.model,
                memory,
                question["question"],
                max_new_tokens=MAX_NEW_TOKENS,
                use_memory=use_memory,
            )
            is_right = question["answer"].lower() in answer.text.lower()
            right[use_memory] += is_right
            label = "with memory   " if use_memory else "without memory"
            print(f"   {label}  {'✓' if is_right else '✗'}  {' '.join(answer.text.split())}")
        best = answer.citations[0]
        cited += question["fact"] in best.text
        print(f"   cited ({best.share:.0%} of memory attention, {best.document}): {best.text}")
    total = len(questions)
    print(
        f"\nright without memory: {right[False]} of {total}; with memory: {right[True]} of {total}"
    )
    print(f"first citation is the sentence with the answer: {cited} of {total}")


if __name__ == "__main__":
    main()
