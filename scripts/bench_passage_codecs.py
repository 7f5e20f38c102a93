"""What row codecs cost where passages are recalled: bytes, next tokens, and which passages.

    python scripts/bench_passage_codecs.py ARTICLES [--model MODEL] [--codecs int8 int5.5 int4]

ARTICLES is a file in the layout of SQuAD. Its articles are read once, and written to a store of
each codec. The exact rows choose passages for each question and answer it greedily; every codec's
rows are then recalled as the same passages, before the same answers, and choose passages of their
own. Prints a table for `benchmarks/codecs.md`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from bench_decode import machine
from experiments.command import one_line_errors

import emt
from emt.cli import quiet
from emt.memory.memory import Memory
from emt.model.chat import prompt_ids
from emt.model.loading import DEFAULT_MODEL, LoadedModel, load
from emt.passage import Passage
from memory_backends import Document, MemoryBackend, Rows


@dataclass
class Asked:
    """One question: its prompt, (T,) int64, and what the exact rows made of it."""

    prompt: torch.Tensor
    at: int = 0
    passages: tuple[Passage, ...] = ()
    answer: torch.Tensor | None = None  # (A,) int64
    log_probs: torch.Tensor | None = None  # (A, vocabulary)


def read_articles(path: Path, options: argparse.Namespace) -> tuple[dict[str, str], list[str]]:
    """Return the beginnings of articles by title, and questions spread over them."""
    articles, questions = {}, []
    each = -(-options.questions // options.articles)
    for article in json.loads(path.read_text(encoding="utf-8"))["data"][: options.articles]:
        text, asked = "", []
        for paragraph in article["paragraphs"]:
            if len(text) <= options.characters:
                text += paragraph["context"] + "\n\n"
                asked += [question["question"] for question in paragraph["qas"]]
        articles[article["title"]] = text
        questions += asked[:: max(1, len(asked) // each)][:each]
    return articles, questions


def store_of(
    memory: Memory, documents: Sequence[tuple[Document, list[Rows]]], codec: str, path: Path
) -> MemoryBackend:
    """Write a store as a memory writes it, whose searched heads are known from the start."""
    backend = MemoryBackend(memory.backend.layout, path=path, sinks="one", row_codec=codec)
    backend.index_heads(memory.heads_to_index)
    for document, rows in documents:
        backend.add(document, rows)
    return backend


@torch.no_grad()
def log_probs(loaded: LoadedModel, memory: Memory, asked: Asked) -> torch.Tensor:
    """Return log-probabilities at each token of the answer, (A, vocabulary)."""
    assert asked.answer is not None
    ids = torch.cat([asked.prompt, asked.answer[:-1]])
    with memory.recalling(asked.passages, at=asked.at):
        logits = loaded.model(ids[None], logits_to_keep=len(asked.answer)).logits[0]
    return logits.float().log_softmax(-1)


def answer_exactly(loaded: LoadedModel, memory: Memory, asked: Asked, num_tokens: int) -> None:
    """Let the exact rows choose passages, and answer with them if there is to be an answer."""
    routed = memory.route(asked.prompt)
    asked.at = routed.question.at
    asked.passages = tuple(found.passage for found in routed.passages)
    if num_tokens:
        with memory.recalling(asked.passages, at=asked.at):
            ids = loaded.model.generate(
                asked.prompt[None], max_new_tokens=num_tokens, do_sample=False
            )
        asked.answer = ids[0, len(asked.prompt) :]
        asked.log_probs = log_probs(loaded, memory, asked)


def compare(loaded: LoadedModel, memory: Memory, questions: Sequence[Asked]) -> str:
    """Return the columns of a codec: agreement, KL, and how often passages are the same."""
    agree, divergence, same = [], [], 0
    for asked in questions:
        routed = memory.route(asked.prompt)
        same += tuple(found.passage for found in routed.passages) == asked.passages
        if asked.log_probs is not None:
            exact, other = asked.log_probs, log_probs(loaded, memory, asked)
            agree.append(exact.argmax(-1) == other.argmax(-1))
            divergence.append((exact.exp() * (exact - other)).sum(-1))
    agreement, kl = torch.cat(agree).float(), torch.cat(divergence)
    return (
        f"{agreement.mean():.2%} of {len(agreement):,} | {kl.mean():.5f} / {kl.max():.4f} "
        f"| {same} of {len(questions)}"
    )


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("file", type=Path, metavar="ARTICLES")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--codecs", nargs="+", default=["float16", "int8", "int5.5", "int4"])
    parser.add_argument("--articles", type=int, default=15)
    parser.add_argument("--characters", type=int, default=7000, help="of each article, about")
    parser.add_argument("--questions", type=int, default=150, help="that choose passages")
    parser.add_argument("--answers", type=int, default=36, help="questions that are answered, too")
    parser.add_argument("--tokens", type=int, default=28, help="of an answer")
    with one_line_errors():
        bench(parser.parse_args())


def bench(options: argparse.Namespace) -> None:
    """Print the table."""
    articles, questions = read_articles(options.file, options)
    with quiet():
        loaded = load(options.model)
    config = emt.MemoryConfig(mode="passage", memory_type="manual")
    memory = emt.attach(loaded.model, config, tokenizer=loaded.tokenizer)
    documents = []
    for name, text in articles.items():
        ids = loaded.tokenizer(text, verbose=False)["input_ids"]
        documents.append((Document(name, torch.tensor(ids).int().numpy()), list(memory.read(ids))))
    asked = [Asked(prompt_ids(loaded.tokenizer, question)) for question in questions]
    answered = {id(one) for one in asked[:: max(1, len(asked) // options.answers)]}
    layers = memory.backend.layout.layers.values()
    half = sum(2 * layer.num_key_value_heads * layer.row_dim for layer in layers)
    with contextlib.ExitStack() as stack, memory.using(relevance=None, routing="heads"):
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for number, codec in enumerate(["exact", *options.codecs]):
            memory.backend = store_of(memory, documents, codec, folder / codec)
            if not number:
                for one in asked:
                    num_tokens = options.tokens if id(one) in answered else 0
                    answer_exactly(loaded, memory, one, num_tokens)
                print(f"{loaded.source}, {len(memory.backend):,} rows, on {machine()}.\n")
                print("| rows | bytes of half precision's | next tokens | KL | same passages |")
                print("|---|---|---|---|---|")
                continue
            share = memory.backend.catalog.bytes_per_row / half
            print(f"| {codec} | {share:.1%} | {compare(loaded, memory, asked)} |", flush=True)
            memory.backend.close()


if __name__ == "__main__":
    main()
