"""The subcommand `profile`, and what `index` and `info` need of head profiles."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from emt.attach import attach
from emt.cli.printing import count
from emt.cli.session import Session, quiet
from emt.errors import ConfigError
from emt.memory.memory import Memory
from emt.model.loading import DEFAULT_MODEL, load
from emt.profiles.choice import PROFILE, shipped_profiles
from emt.profiles.examples import Example, read_examples
from emt.profiles.ranking import Ranked
from emt.routing.head_profile import HeadProfile
from memory_backends.catalog import Catalog

_SHOWN = 12  # heads of the ranking


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
        with quiet():
            loaded = load(options.model or DEFAULT_MODEL)
        memory, source = attach(loaded.model, tokenizer=loaded.tokenizer), loaded.source
    else:
        session = Session(options, writing=False)
        memory, source = session.memory, session.source or DEFAULT_MODEL
    if examples is None:
        ranked = ranked_from_store(memory, source)
    else:
        ranked = _ranked(memory, source, examples, Path(options.data).name)
    _print_ranking(ranked)
    if options.output is not None:
        ranked.profile.write(options.output)
        print(f"written to '{options.output}'")
    else:
        memory.passages.keep(ranked.profile)
        memory.save()  # in passage mode, without the indexes of other heads
        print(f"kept in '{options.store}'")


def ranked_from_store(memory: Memory, source: str) -> Ranked:
    """Rank the heads by questions made from a memory's own text, and show the progress.

    Args:
        memory: with documents.
        source: of the model, as `load` takes it.

    Raises:
        ConfigError: too few questions can be made from it, or no head finds anything.
    """
    with _progress() as on_step:
        return memory.rank_heads(name=Path(source).name, on_step=on_step)


def profile_if_needed(memory: Memory, source: str) -> None:
    """Make a head profile from a memory's text if that is all its passage mode lacks; say so.

    Args:
        memory: with documents.
        source: of the model, as `load` takes it.
    """
    if not memory.passages.lacks_profile:
        return
    _say("no head profile of this model: one is made from the text that was read")
    try:
        ranked = ranked_from_store(memory, source)
    except ConfigError as error:
        _say(
            f"no head profile could be made: {error} Until there is one, from `emt profile --store "
            f"{memory.config.path} --data FILE`, read this store with --mode token"
            + (", as is the default." if memory.config.mode == "auto" else ".")
        )
        return
    memory.passages.keep(ranked.profile)
    _say(f"head profile: {_together(ranked)}")


def describe(catalog: Catalog) -> dict[str, Any] | None:
    """Return what a store's head profile is, or the one that comes with emt; None for none."""
    kept = catalog.setting(PROFILE)
    try:
        found = None if kept is None else HeadProfile.from_json(kept)
    except ConfigError as error:
        return {"error": str(error)}
    if kept is None:
        found = shipped_profiles().get(str(catalog.identity.get("weights")))
    if found is None:
        return None
    return {
        "kept": kept is not None,
        "model": found.model,
        "source": found.source,
        "heads": [
            {"layer": head.layer, "head": head.head, "hit_rate": head.hit_rate}
            for head in found.heads
        ],
    }


def in_words(described: dict[str, Any] | None) -> str:
    """Say in one line what `describe` found."""
    if described is None:
        return "none (`emt profile` makes one)"
    if "error" in described:
        return f"cannot be read: {described['error']}"
    heads = described["heads"]
    named = ", ".join(f"{head['layer']}.{head['head']}" for head in heads)
    words = f"{count(len(heads), 'query head')} ({named}) of {described['model']}"
    if described["source"]:
        words += f", from {described['source']}"
    return words if described["kept"] else f"{words}; comes with emt"


def _ranked(memory: Memory, source: str, examples: list[Example], about: str) -> Ranked:
    with _progress() as on_step:
        name = Path(source).name
        return memory.rank_heads(examples, name=name, source=about, on_step=on_step)


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


def _say(what: str) -> None:
    """Print to stderr, above a progress bar if there is one."""
    tqdm.write(f"emt: {' '.join(what.split())}", file=sys.stderr)
