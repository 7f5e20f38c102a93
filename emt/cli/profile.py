"""`emt profile`: find the heads of a model that know which passage is meant."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from emt.attach import attach
from emt.cli.model_options import add_model_options, load_model
from emt.cli.printing import count, say
from emt.cli.session import Session
from emt.errors import ConfigError, MemoryUseError
from emt.memory.memory import Memory
from emt.profiles.cache import cache_profile
from emt.profiles.examples import make_examples, read_examples
from emt.profiles.ranking import Ranked
from emt.profiles.stored_text import stored_texts
from emt.routing.head_profile import HeadProfile

_SHOWN = 12  # heads of the ranking


def add_to(commands: Any) -> None:
    """Add the subcommand to a parser's."""
    parser = commands.add_parser(
        "profile",
        help="find the heads of a model that know which passage is meant",
        description="Find the heads of a model that know which passage is meant, for the passage "
        "mode. They are found by questions about texts that come with emt, in the time of reading "
        "6,000 tokens, and kept in the user's cache for all stores of the model.",
    )
    parser.set_defaults(run=profile, config=None)
    add_model_options(parser)
    parser.add_argument(
        "--data",
        metavar="FILE",
        help="other questions: .json in SQuAD's layout, or .jsonl with context, question and "
        "answer; up to 128 about 16 texts are tried",
    )
    parser.add_argument(
        "--store",
        metavar="DIR",
        help="without --data, questions made from the text of this store; the profile is kept in "
        "it, for it alone",
    )
    parser.add_argument(
        "--output", metavar="FILE", help="write the profile here, and keep it nowhere else"
    )


def profile(options: argparse.Namespace) -> None:
    """Find a model's retrieval heads, and keep them."""
    examples = None if options.data is None else read_examples(options.data)
    if options.store is None:
        loaded = load_model(options)
        memory, model = attach(loaded.model, tokenizer=loaded.tokenizer), loaded.source
    else:
        session = Session(options, writing=False)
        memory, model = session.memory, session.source
    source = Path(options.data or "").name
    if examples is None and options.store is not None:
        examples = make_examples(stored_texts(memory.backend, memory.tokenizer))
        source = "stored text"
    with _progress() as on_tokens:
        ranked = memory.rank_heads(
            examples, name=Path(model).name, source=source, on_tokens=on_tokens
        )
    kept = _keep(ranked.profile, memory, options)
    _print_ranking(ranked)
    print(kept)


def _keep(made: HeadProfile, memory: Memory, options: argparse.Namespace) -> str:
    """Keep a profile where the options say; say where."""
    if options.output is not None:
        made.write(options.output)
        return f"written to '{options.output}'"
    if options.store is not None:
        memory.keep_profile(made)
        memory.save()  # in passage mode, without the indexes of other heads
        return f"kept in '{options.store}'"
    file = cache_profile(made)
    if file is None:
        raise ConfigError("the user's cache cannot be written. Name --output FILE.")
    return f"kept for all stores of this model, in '{file}'"


def profile_if_needed(memory: Memory) -> None:
    """Make a head profile if heads would be searched, but for the lack of one; say so."""
    if not memory.lacks_profile:
        return
    say("no head profile of this model: one is made, and kept for all its stores")
    try:
        with _progress() as on_tokens:
            made = memory.make_profile(on_tokens=on_tokens)
    except (ConfigError, MemoryUseError) as error:
        is_read = memory.mode == "token"
        instead = "All heads read memories." if is_read else "Passages are found without heads."
        say(f"no head profile could be made: {error} {instead}")
    else:
        say(f"head profile: {count(len(made.heads), 'head')}")


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[int, int], object]]:
    """Show on a terminal how many tokens were read."""
    with tqdm(unit="tok", disable=None, leave=False) as bar:

        def show(num_read: int, total: int) -> None:
            if bar.total != total:  # shown at once, however soon all are read
                bar.reset(total)
            bar.update(num_read - bar.n)

        yield show


def _print_ranking(ranked: Ranked) -> None:
    """Print the best heads, with a star at those that were chosen, and how they do together."""
    chosen = {(head.layer, head.head) for head in ranked.profile.heads}
    shown = list(ranked.scores.items())[:_SHOWN]
    for (layer, head), score in shown:
        star = "*" if (layer, head) in chosen else " "
        print(
            f"{star} layer {layer:2d}, head {head:2d}  {score.deviations:5.2f} deviations above "
            f"other places, right for {score.hit_rate:6.1%}"
        )
    if len(ranked.scores) > len(shown):
        print(f"  and {count(len(ranked.scores) - len(shown), 'head')} more")
    print(_together(ranked))


def _together(ranked: Ranked) -> str:
    return (
        f"{count(len(ranked.profile.heads), 'head')} together find the passage of "
        f"{ranked.hit_rate:.1%} of {count(ranked.num_questions, 'question')} in "
        f"{count(ranked.num_rows, 'row')}; "
        f"two halves of the questions agree on {ranked.agreement:.0%} of the heads"
    )
