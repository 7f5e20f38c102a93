"""Are turns recalled as well from a model's cache as when they are written as text?

python scripts/remembered_chat.py MODEL [--questions N]

The invented chat of 100 pairs of turns is said to the model, in a window of 2,048 tokens, and each
pair is remembered from the cache. Another memory reads the same pairs as text. Both are asked the
chat's 60 questions, in the words they were told in and in others. Counted are questions whose first
passage has the fact, and those with it in any; and of the six facts that a later turn corrects, how
often the correction comes first.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from emt import Memory, MemoryConfig, attach, detach
from emt.citations.citing import quoted
from emt.conversation.turns import Said, remember_turn
from emt.model.chat import chat_ids, prompt_ids
from emt.model.loading import load

ROOT = Path(__file__).resolve().parent
CHAT = ROOT.parent / "configs" / "experiments" / "data" / "questions" / "chat"
OWN_WORDS = ROOT / "data" / "chat_in_its_own_words.jsonl"
WINDOW, KEPT = 2048, 8  # tokens; messages that a new window begins with


def main() -> None:
    """Fill two memories with the chat, ask both, and print how often the fact was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--questions", type=int, default=60)
    options = parser.parse_args()
    loaded = load(options.model)
    turns, questions = lines_of(CHAT / "documents.jsonl"), lines_of(CHAT / "questions.jsonl")
    own_words = {each["id"]: each["question"] for each in lines_of(OWN_WORDS)}
    questions = questions[: options.questions]
    print("| rows | asked in | fact first | fact found | correction first |\n|---|---|---|---|---|")
    for is_said in (False, True):
        memory = attach(loaded.model, MemoryConfig(), tokenizer=loaded.tokenizer)
        for number, turn in enumerate(turns, 1):
            turn["messages"] = messages_of(turn["text"])
            if not is_said:
                about = {"conversation": "chat", "turn": number, "time": float(number)}
                memory.write("\n".join(turn["messages"]), document=name_of(number), metadata=about)
        if is_said:
            say(loaded.model, memory, [turn["messages"] for turn in turns])
        for words in ("its own words", "other words"):
            asked = [
                own_words[each["id"]] if words == "its own words" else each["question"]
                for each in questions
            ]
            found = [hits(memory, text, each) for text, each in zip(asked, questions, strict=True)]
            corrected = [
                hit
                for hit, each in zip(found, questions, strict=True)
                if each["kind"] == "corrected"
            ]
            print(
                f"| {'of the cache' if is_said else 'of text'} | {words} "
                f"| {sum(hit[:1] == [True] for hit in found)} | {sum(map(any, found))} "
                f"| {sum(hit[:1] == [True] for hit in corrected)} of {len(corrected)} |",
                flush=True,
            )
        detach(loaded.model)


@torch.no_grad()
def say(model: PreTrainedModel, memory: Memory, turns: Sequence[tuple[str, str]]) -> None:
    """Let a model hear a chat that is given, and remember each turn from its cache."""
    cache, cached = DynamicCache(config=model.config), list[int]()
    for number, (message, answer, prompt, new) in enumerate(prompts_of(memory, turns), 1):
        if prompt[: len(cached)] != cached:  # a new window
            cache, cached = DynamicCache(config=model.config), []
        token_ids = [*prompt, *new]
        with memory.using(enabled=False):
            model(
                torch.tensor([token_ids[len(cached) : -1]]),
                past_key_values=cache,
                logits_to_keep=1,
            )
        cached = token_ids[:-1]
        said = Said(message, answer, token_ids, len(prompt), cache)
        remember_turn(memory, said, "chat", number)


def prompts_of(
    memory: Memory, turns: Sequence[tuple[str, str]]
) -> Iterator[tuple[str, str, list[int], list[int]]]:
    """Yield message, answer, and the tokens of the prompt and of the answer with its end."""
    tokenizer: Any = memory.tokenizer

    messages: list[tuple[str, str]] = []
    for message, answer in turns:
        messages.append(("user", message))
        new = tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        if len(chat_ids(tokenizer, messages)) + len(new) > WINDOW:
            messages = messages[-KEPT - 1 :]
        yield message, answer, chat_ids(tokenizer, messages).tolist(), new
        messages.append(("assistant", answer))


def hits(memory: Memory, question: str, about: dict[str, Any]) -> list[bool]:
    """Return for each recalled passage, best first, whether it is the fact's and says it."""
    assert memory.tokenizer is not None
    (evidence,) = about["evidence"]
    expected = name_of(int(evidence["document"].removeprefix("turn-")))
    found = []
    for routed in memory.route(prompt_ids(memory.tokenizer, question).tolist()).passages:
        passage = routed.passage
        document = memory.backend.catalog.document(passage.document)
        tokens = document.row_tokens[passage.first : passage.stop]
        _, _, text = quoted(document, int(tokens[0]), int(tokens[-1]) + 1, memory.tokenizer)
        is_said = any(answer.lower() in text.lower() for answer in about["answers"])
        found.append(is_said and passage.document == expected)
    return found


def messages_of(text: str) -> tuple[str, str]:
    """Return what the user and the assistant say in a pair of turns."""
    message, answer = text.split("\nAssistant: ", 1)
    return message.removeprefix("User: "), answer


def name_of(number: int) -> str:
    """Return the name of a turn, as `remember_turn` gives it."""
    return f"chat/{number:04d}"


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a .jsonl file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main()
