"""`emt search`: the passages that a query is about, with nothing generated."""

from __future__ import annotations

import argparse
from typing import Any

from emt.answer import check_prompt
from emt.citations.citing import quoted
from emt.cli.model_options import add_model_options
from emt.cli.printing import one_line, print_json, printable
from emt.cli.prompt import add_prompt, read_prompt
from emt.cli.scope_options import add_scope_options, using_settings
from emt.cli.session import Session, missing_shards
from emt.errors import ConfigError
from emt.memory.memory import Memory
from emt.model.chat import prompt_ids
from emt.passage import RoutedPassage


def add_to(commands: Any) -> None:
    """Add the subcommand to a parser's."""
    parser = commands.add_parser(
        "search",
        help="find passages in a store; nothing is generated",
        description="Find the passages that a query is about, as `emt generate` does before it "
        "answers, best first. Each has its score, 0 to 1, its document, and where it stands there: "
        "the first character and the one after the last, and its rows likewise, counted from the "
        "document's first. The score is the best one that words, values or heads give the place, "
        "and the order that of all and of asking back, so scores need not descend.",
    )
    parser.set_defaults(run=search)
    add_prompt(parser, "query")
    parser.add_argument("--store", required=True, metavar="DIR")
    add_model_options(parser)
    parser.add_argument("--config", metavar="FILE", help="memory settings in YAML")
    add_scope_options(parser)
    parser.add_argument("--max-passages", type=int, metavar="N", help="at most so many")
    parser.add_argument("--passage-rows", type=int, metavar="N", help="rows of all passages")
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one object: query; passages, best first, each with document, start and end (of "
        "characters; null for a document of token ids), first and stop (of rows), score and text; "
        "and relevance, in nats a token that the query gains by them (null: not judged); and "
        "missing_shards, if there are some",
    )


def search(options: argparse.Namespace) -> None:
    """Find the passages that a query is about."""
    query = read_prompt(options)
    check_prompt(query, "query")
    session = Session(options, writing=False)  # has the model, which the memory does not keep
    memory = session.memory
    with memory.using(**using_settings(options, "max_passages", "passage_rows")):
        if not options.json:
            print_passages(memory, query, options.store)
            return
        relevance, passages = _passages(memory, query)
    found = {"query": query, "passages": passages, "relevance": relevance}
    print_json({**found, **missing_shards(memory)})


def print_passages(memory: Memory, query: str, store: str) -> None:
    """Print the passages that a query is about, of a memory whose store has a name.

    Raises:
        ConfigError: the query is empty, or not Unicode; or the model has no tokenizer.
    """
    check_prompt(query, "query")
    _, passages = _passages(memory, query)
    for rank, passage in enumerate(passages, start=1):
        _print(rank, passage)
    if not passages:
        print(f"Nothing in '{one_line(store)}' is relevant to the query.")


def _passages(memory: Memory, query: str) -> tuple[float | None, list[dict[str, Any]]]:
    """Return how relevant the memory is to a query, and its passages as plain JSON types."""
    routed = memory.route(_prompt(memory, query))
    return routed.relevance, [_describe(memory, each) for each in routed.passages]


def _prompt(memory: Memory, query: str) -> list[int]:
    """Return a query as the model is asked it: in its chat template, if it has one."""
    if memory.tokenizer is None:
        raise ConfigError("this model has no tokenizer, so it cannot read a query.")
    return prompt_ids(memory.tokenizer, query).tolist()


def _describe(memory: Memory, routed: RoutedPassage) -> dict[str, Any]:
    """Return a passage with its text, as plain JSON types."""
    passage = routed.passage
    document = memory.backend.catalog.document(passage.document)
    tokens = document.row_tokens[passage.first : passage.stop]
    start, end, text = quoted(document, int(tokens[0]), int(tokens[-1]) + 1, memory.tokenizer)
    return {
        "document": passage.document,
        "start": start,
        "end": end,
        "first": passage.first,
        "stop": passage.stop,
        "score": routed.score,
        "text": text,
    }


def _print(rank: int, passage: dict[str, Any]) -> None:
    start, end = passage["start"], passage["end"]
    characters = "" if start is None else f" {start}-{end}"
    rows = f"rows {passage['first']}-{passage['stop']}"
    document = one_line(passage["document"])
    print(f"[{rank}] score {passage['score']:.2f}  {document}{characters}, {rows}")
    for line in printable(passage["text"]).splitlines():
        print(f"      {line}")
