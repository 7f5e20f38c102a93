"""`emt generate`: answer a prompt from a store, and show what the answer is from."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from emt.answer import Answer, answer, sampling_options
from emt.citations.citing import Citation
from emt.cli.model_options import add_model_options
from emt.cli.printing import count, one_line, print_json, printable, say
from emt.cli.session import Session, existing
from emt.errors import ConfigError, DocumentError
from emt.memory.memory import Memory
from emt.model.chat import in_template
from memory_backends.catalog import Catalog
from memory_backends.catalog.metadata import is_value

_SETTINGS = ("enabled", "mode", "topk", "uncertainty", "documents")  # of `Memory.using`
_WHERE = 'before the options: emt generate "PROMPT" --store DIR --documents NAME'
_UNCITED = (
    "Memory was used, but there is nothing to cite: all that was read are attention sinks, the "
    "first rows of documents."
)


def add_to(commands: Any) -> None:
    """Add the subcommand to a parser's."""
    parser = commands.add_parser("generate", help="answer a prompt from a store")
    parser.set_defaults(run=generate)
    parser.add_argument(
        "prompt", nargs="?", help="- or none to read it from standard input; before --documents"
    )
    parser.add_argument("--store", required=True, metavar="DIR")
    add_model_options(parser, default="the one that wrote the store")
    parser.add_argument("--config", metavar="FILE", help="memory settings in YAML")
    parser.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="use the chat template (default: if the model has one)",
    )
    parser.add_argument(
        "--mode",
        choices=("token", "passage", "auto"),
        help="how the memory is used (default: the store's setting)",
    )
    parser.add_argument("--max-new-tokens", type=_positive, default=64, metavar="N")
    parser.add_argument(
        "--temperature", type=float, metavar="T", help="sample with this temperature (default: 0)"
    )
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="sample from the likeliest tokens of P together"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="the same seed samples the same")
    parser.add_argument("--topk", type=_topk, metavar="K", help="memories for each query, or auto")
    parser.add_argument(
        "--uncertainty",
        type=_uncertainty,
        metavar="ENTROPY:K",
        help="redo a step whose entropy, in nats, is above ENTROPY with K memories: 1.0:12",
    )
    parser.add_argument("--documents", nargs="+", metavar="NAME", help="read these documents only")
    parser.add_argument(
        "--where",
        type=_where,
        action="append",
        metavar="KEY=VALUE",
        help="read only documents with this metadata; of one key, any value given will do",
    )
    parser.add_argument(
        "--citations", action="store_true", help="print the sentences and passages that were used"
    )
    parser.add_argument("--json", action="store_true", help="print one object")
    parser.add_argument(
        "--no-memory",
        dest="enabled",
        action="store_const",
        const=False,
        help="the plain model: the setting `enabled` is false",
    )


def generate(options: argparse.Namespace) -> None:
    """Answer a prompt from a store."""
    started = time.perf_counter()
    sampling = {name: getattr(options, name) for name in ("temperature", "top_p", "seed")}
    sampling_options(**sampling)  # a mistake is told before the model is loaded
    prompt = _prompt(options)
    session = Session(options, writing=False)
    opened = time.perf_counter()
    _check_template(options.chat, session.memory, prompt)
    settings = {name: getattr(options, name) for name in _SETTINGS}
    if options.where is not None:
        where: dict[str, list[Any]] = {}
        for key, values in options.where:  # of one key, any value will do
            where.setdefault(key, []).extend(values)
        settings["where"] = where
    try:
        answered = answer(
            session.model,
            session.memory,
            prompt,
            chat=options.chat,
            max_new_tokens=options.max_new_tokens,
            on_text=None if options.json else _show,
            **sampling,
            **{name: value for name, value in settings.items() if value is not None},
        )
    except KeyboardInterrupt:
        if not options.json:
            print(flush=True)  # what comes next stands on a line of its own
        raise
    if options.json:
        timings = {"open_seconds": round(opened - started, 3), **answered.timings}
        print_json({**answered.to_json(), "timings": timings})
        return
    print()
    if options.citations:
        _print_sources(answered)


def _prompt(options: argparse.Namespace) -> str:
    """Return the prompt that was given, or that stands on standard input.

    Raises:
        ConfigError: there is none, or standard input cannot be read.
        DocumentError: `--documents` may have taken it for a name.
    """
    if options.prompt not in (None, "-"):
        return str(options.prompt)
    if options.prompt is None:
        if options.documents:
            _check_names(existing(options.store), options.documents)
        if sys.stdin.isatty():
            raise ConfigError(f"there is no prompt. Give it {_WHERE}, or on standard input.")
    try:
        return sys.stdin.read().removeprefix("\ufeff").rstrip("\r\n")
    except OSError as error:
        raise ConfigError(f"the prompt cannot be read: {error.strerror}.") from error


def _check_names(store: Path, documents: list[str]) -> None:
    with contextlib.closing(Catalog.open(store)) as catalog:
        unknown = next((name for name in documents if not catalog.has_document(name)), None)
    if unknown is not None:
        raise DocumentError(
            f"there is no prompt, and no document '{unknown}' in '{store}'. If this is the prompt, "
            f"give it {_WHERE}."
        )


def _check_template(chat: bool | None, memory: Memory, prompt: str) -> None:
    """Say so if the chat template is passed over because it cannot take the prompt."""
    tokenizer = memory.tokenizer
    if chat is None and tokenizer is not None and tokenizer.chat_template:
        try:
            in_template(tokenizer, prompt, chat=True)
        except ConfigError as error:
            say(f"the prompt is asked as a plain text: {error}")


def _show(text: str) -> None:
    print(printable(text), end="", flush=True)


def _print_sources(answered: Answer) -> None:
    """Print the sentences that were used, and the passages they are from if those were recalled."""
    print()
    for rank, citation in enumerate(answered.citations, start=1):
        print(f"[{rank}] {citation.share:5.1%}  {_place(citation)}")
        print(f"      {one_line(' '.join(citation.text.split()))}")
    if not answered.citations:
        print(_UNCITED if answered.num_retrieved or answered.passages else "No memory was used.")
    if answered.passages:
        print(f"\n{count(len(answered.passages), 'passage')} recalled:")
    for passage in answered.passages:
        score = "" if passage.score is None else f", score {passage.score:.2f}"
        print(f"      {_place(passage)}: {passage.attention:.1%} of the attention{score}")


def _place(citation: Citation) -> str:
    characters = "" if citation.start is None else f" {citation.start}-{citation.end}"
    return f"{one_line(citation.document)}{characters}"


def _topk(text: str) -> int | str:
    return text if text == "auto" else _positive(text)


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1; got {text!r}")
    return number


def _uncertainty(text: str) -> dict[str, Any]:
    entropy, _, topk = text.partition(":")
    try:
        return {"entropy": float(entropy), "topk": int(topk)}
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be an entropy and a whole number, such as 1.0:12; got {text!r}"
        ) from None


def _where(text: str) -> tuple[str, list[Any]]:
    """Read KEY=VALUE; a value that looks like a number or a truth value may be that, or text."""
    key, is_pair, value = text.partition("=")
    if not key or not is_pair:
        raise argparse.ArgumentTypeError(f"must be KEY=VALUE, such as year=1999; got {text!r}")
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):
        parsed = None
    is_other = is_value(parsed) and not isinstance(parsed, str)
    return key, [value, parsed] if is_other else [value]
