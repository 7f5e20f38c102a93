"""`emt generate`: answer a prompt from a store, and show what the answer is from."""

from __future__ import annotations

import argparse
import time
from typing import Any

from emt.answer import Answer, answer, sampling_options
from emt.citations.citing import Citation
from emt.cli.model_options import add_model_options
from emt.cli.printing import count, one_line, print_json, printable, say
from emt.cli.prompt import add_prompt, read_prompt
from emt.cli.scope_options import add_scope_options, using_settings
from emt.cli.session import Session, missing_shards
from emt.errors import ConfigError
from emt.memory.memory import Memory
from emt.model.chat import in_template

_UNCITED = (
    "Memory was used, but there is nothing to cite: all that was read are attention sinks, rows "
    "that are attended to whatever is asked."
)


def add_to(commands: Any) -> None:
    """Add the subcommand to a parser's."""
    parser = commands.add_parser("generate", help="answer a prompt from a store")
    parser.set_defaults(run=generate)
    add_prompt(parser, "prompt")
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
    parser.add_argument("--max-new-tokens", type=positive, default=64, metavar="N")
    add_sampling_options(parser)
    parser.add_argument("--topk", type=_topk, metavar="K", help="memories for each query, or auto")
    parser.add_argument(
        "--uncertainty",
        type=_uncertainty,
        metavar="ENTROPY:K",
        help="redo a step whose entropy, in nats, is above ENTROPY with K memories: 1.0:12",
    )
    add_scope_options(parser)
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


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of sampling to a subcommand's parser."""
    parser.add_argument(
        "--temperature", type=float, metavar="T", help="sample with this temperature (default: 0)"
    )
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="sample from the likeliest tokens of P together"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="the same seed samples the same")


def generate(options: argparse.Namespace) -> None:
    """Answer a prompt from a store."""
    sampling = {name: getattr(options, name) for name in ("temperature", "top_p", "seed")}
    sampling_options(**sampling)  # a mistake is told before the model is loaded
    prompt = read_prompt(options)
    started = time.perf_counter()
    session = Session(options, writing=False)
    opened = time.perf_counter()
    _check_template(options.chat, session.memory, prompt)
    try:
        answered = answer(
            session.model,
            session.memory,
            prompt,
            chat=options.chat,
            max_new_tokens=options.max_new_tokens,
            on_text=None if options.json else show,
            **sampling,
            **using_settings(options, "enabled", "mode", "topk", "uncertainty"),
        )
    except KeyboardInterrupt:
        if not options.json:
            print(flush=True)  # what comes next stands on a line of its own
        raise
    if options.json:
        timings = {"open_seconds": round(opened - started, 3), **answered.timings}
        described = {**answered.to_json(), "timings": timings}
        print_json({**described, **missing_shards(session.memory)})
        return
    print()
    if options.citations:
        print_sources(answered)


def _check_template(chat: bool | None, memory: Memory, prompt: str) -> None:
    """Say so if the chat template is passed over because it cannot take the prompt."""
    tokenizer = memory.tokenizer
    if chat is None and tokenizer is not None and tokenizer.chat_template:
        try:
            in_template(tokenizer, prompt, chat=True)
        except ConfigError as error:
            say(f"the prompt is asked as a plain text: {error}")


def show(text: str) -> None:
    """Print a piece of an answer."""
    print(printable(text), end="", flush=True)


def print_sources(answered: Answer) -> None:
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
    return text if text == "auto" else positive(text)


def positive(text: str) -> int:
    """Read a whole number of at least 1."""
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
