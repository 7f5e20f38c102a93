"""`emt profile`: find the heads of a model that know which passage is meant."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from emt.attach import attach
from emt.cli.model_options import add_model_options, load_model
from emt.cli.printing import count
from emt.cli.session import Session
from emt.errors import ConfigError
from emt.memory.memory import Memory
from emt.profiles.examples import read_examples
from emt.profiles.ranking import Ranked

_SHOWN = 12  # heads of the ranking


def add_to(commands: Any) -> None:
    """Add the subcommand to a parser's."""
    parser = commands.add_parser(
        "profile",
        help="find the heads of a model that know which passage is meant",
        description="Find the heads of a model that know which passage is meant, for the passage "
        "mode. They are found by questions: those of --data, or else some that are made from the "
        "text of --store.",
    )
    parser.set_defaults(run=profile, config=None)
    add_model_options(parser)
    parser.add_argument(
        "--data",
        metavar="FILE",
        help=".json in SQuAD's layout, or .jsonl with context, question and answer",
    )
    parser.add_argument("--store", metavar="DIR", help="keep the profile here, without --output")
    parser.add_argument("--output", metavar="FILE", help="write the profile here")


def profile(options: argparse.Namespace) -> None:
    """Find a model's retrieval heads, and keep them in a file or in a store."""
    if options.data is None and options.store is None:
        raise ConfigError(
            "a head profile needs questions about texts. Name --data FILE, in SQuAD's layout "
            "(.json) or with context, question and answer in each line (.jsonl); or --store DIR, "
            "whose documents questions are made from."
        )
    if options.output is None and options.store is None:
        raise ConfigError(
            "the head profile has no place. Name --output FILE, or --store DIR that keeps it."
        )
    examples = None if options.data is None else read_examples(options.data)
    if options.store is None:
        loaded = load_model(options)
        memory, source = attach(loaded.model, tokenizer=loaded.tokenizer), loaded.source
    else:
        session = Session(options, writing=False)
        memory, source = session.memory, session.source
    with _progress() as on_step:
        ranked = memory.rank_heads(
            examples,
            name=Path(source).name,
            source=Path(options.data or "").name,
            on_step=on_step,
        )
    _print_ranking(ranked)
    if options.output is not None:
        ranked.profile.write(options.output)
        print(f"written to '{options.output}'")
    else:
        memory.keep_profile(ranked.profile)
        memory.save()  # in passage mode, without the indexes of other heads
        print(f"kept in '{options.store}'")


def profile_if_needed(memory: Memory, source: str) -> None:
    """Make a head profile from a memory's text if that is all its passage mode lacks; say so.

    `source` is the folder, hub name or file of the model.
    """
    if not memory.lacks_profile:
        return
    _say("no head profile of this model: one is made from the text that was read")
    try:
        with _progress() as on_step:
            ranked = memory.rank_heads(name=Path(source).name, on_step=on_step)
    except ConfigError as error:
        _say(
            f"no head profile could be made: {error} Until there is one, from `emt profile --store "
            f"{memory.config.path} --data FILE`, read this store with --mode token"
            + (", as is the default." if memory.config.mode == "auto" else ".")
        )
        return
    memory.keep_profile(ranked.profile)
    _say(f"head profile: {_together(ranked)}")


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str], object]]:
    """Show on a terminal what is being done."""
    with tqdm(bar_format="{desc} [{elapsed}]", disable=None, leave=False) as line:
        yield line.set_description_str


def _print_ranking(ranked: Ranked) -> None:
    """Print the best heads, with a star at those that were chosen, and how they do together."""
    chosen = {(head.layer, head.head) for head in ranked.profile.heads}
    shown = list(ranked.hit_rates.items())[:_SHOWN]
    for (layer, head), rate in shown:
        star = "*" if (layer, head) in chosen else " "
        print(f"{star} layer {layer:2d}, head {head:2d}  {rate:6.1%}")
    if len(ranked.hit_rates) > len(shown):
        print(f"  and {count(len(ranked.hit_rates) - len(shown), 'head')} more")
    print(_together(ranked))


def _together(ranked: Ranked) -> str:
    return (
        f"{count(len(ranked.profile.heads), 'head')} together find the passage of "
        f"{ranked.hit_rate:.1%} of {count(ranked.num_questions, 'question')} in "
        f"{count(ranked.num_rows, 'row')}; "
        f"two halves of the questions agree on {ranked.agreement:.0%} of the heads"
    )


def _say(message: str) -> None:
    """Print to stderr, above a progress bar if there is one."""
    tqdm.write(f"emt: {' '.join(message.split())}", file=sys.stderr)
