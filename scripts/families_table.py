"""Write which model families work: docs/families.md.

    python scripts/families_table.py                 # print the page
    python scripts/families_table.py --write         # put it where it belongs
    python scripts/families_table.py llama mamba     # try some families and print what came out

Its first table runs the prefix oracle on the tiny models of `tests/families.py`, with both
backends and a left-padded batch. The other one builds every family that `AutoModelForCausalLM`
knows, each in a process of its own, and runs the forgetting oracle of `tests/forgetting.py`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import emt  # noqa: E402 - the tests are found from the repository's root
from emt.errors import UnsupportedModelError  # noqa: E402
from tests.families import FAMILIES, REFUSED, oracle_error  # noqa: E402
from tests.tiny_models import causal_families  # noqa: E402
from tests.verdicts import Verdict, verdict_on  # noqa: E402

TIME_LIMIT = 150.0  # seconds for one family; most take less than one
MADE_BY = (
    "Made by `python scripts/families_table.py --write` with transformers "
    f"{transformers.__version__}."
)
INTRODUCTION = """\
# Model families

`attach` proves itself: it runs one token and refuses a model when a layer was not reached, or
when it cannot bring a layer's keys back to position 0. The first table is the *prefix oracle*:
the keys and values of a text's first 40 tokens become memories at their true positions, every
layer reads all of them, and the rest must get the logits of the full-context run (float32, both
backends, a left-padded batch of three).
"""
ALL_FAMILIES = """\
## Every family of transformers

Every model type that transformers' `AutoModelForCausalLM` knows, built tiny (about four layers,
random weights, float32) and attached.

*works*: the model reads {prefix} tokens, its cache then loses their keys and values, and the
memory gets them, at their true positions. What it says about the next {rest} tokens (two prompts,
one of them padded on the left, then token by token) must be what it says when nothing was lost:
attention to all memories and the local context in one softmax is attention to the whole. States
of recurrent layers stay in the cache, for only attention has memories. *error* is the largest
difference of any logit, in standard deviations of the logits; it must be at most {tolerance}.
*forgotten* is the same without the memory: what there was to be made good. Then a document is
written, and must change the logits of a prompt. Short documents read together, and a long one
read with `carry_context`, must have the rows that they have when each is read alone and whole;
*carries* says if the family can do the latter.

*refused*: `attach` raises the error that is shown. *not built*: nothing is known.

Layers with a sliding or chunked window read memories here too; without being asked (`layers` in the
config), they do not.
"""


def walk(families: Sequence[str]) -> Iterator[Verdict]:
    """Yield a verdict on each family, in order; a crash or a hang costs no more than its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.verdicts"])
    with context.Pool(2, maxtasksperchild=1) as pool:
        pending = [(family, pool.apply_async(verdict_on, (family,))) for family in families]
        for family, result in pending:
            try:
                yield result.get(TIME_LIMIT)
            except multiprocessing.TimeoutError:
                yield Verdict(family, "wrong", f"no answer after {TIME_LIMIT:.0f} s")


def page(verdicts: Sequence[Verdict]) -> str:
    """Return docs/families.md."""
    # Imported here, for only the page needs them.
    from tests.forgetting import NUM_PREFIX, NUM_REST
    from tests.verdicts import TOLERANCE

    every = ALL_FAMILIES.format(prefix=NUM_PREFIX, rest=NUM_REST, tolerance=TOLERANCE)
    parts = [INTRODUCTION, *prefix_oracle(), "", every, counted(verdicts), ""]
    return "\n".join([*parts, *forgetting(verdicts), "", MADE_BY, ""])


def prefix_oracle() -> Iterator[str]:
    """Yield the lines of the table of `FAMILIES`."""
    yield "| family | what is special | prefix oracle, largest logit difference |"
    yield "|---|---|---|"
    for family in FAMILIES:
        model = family.build()
        layers = list(range(model.config.num_hidden_layers))
        errors = []
        for kind in ("manual", "vector_db"):
            config = emt.MemoryConfig.published(memory_type=kind, index="Flat", layers=layers)
            memory = emt.attach(model, config)
            errors.append(oracle_error(model, memory, lengths=(12, 7, 3)))
            emt.detach(model)
        yield f"| {family.model_type} | {family.note} | {max(errors):.1e} |"
    for family in REFUSED:
        try:
            emt.attach(family.build())
        except UnsupportedModelError as error:
            yield f"| {family.model_type} | {family.note} | refused: {error} |"


def forgetting(verdicts: Sequence[Verdict]) -> Iterator[str]:
    """Yield the lines of the table of every family."""
    names = ("family", "outcome", "layers, keys", "error", "forgotten", "carries")
    yield f"| {' | '.join(names)} |"
    yield "|---" * len(names) + "|"
    for verdict in verdicts:
        what = verdict.layers or verdict.detail.replace("|", "\\|")
        figures = ("", "") if verdict.found is None else (f"{x:.1e}" for x in verdict.found)
        carries = {True: "yes", False: "no", None: ""}[verdict.carries]
        yield f"| {' | '.join((verdict.family, verdict.outcome, what, *figures, carries))} |"


def counted(verdicts: Sequence[Verdict]) -> str:
    """Say in a sentence how many families work."""
    counts = Counter(verdict.outcome for verdict in verdicts)
    built = len(verdicts) - counts["not built"]
    sentence = (
        f"{counts['works']} of {built} buildable families work; {counts['refused']} are refused"
    )
    return sentence + (f"; {counts['wrong']} are wrong." if counts["wrong"] else ".")


def main() -> None:
    """Print the page, or put it where it belongs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", help="try only these, and print what came out")
    parser.add_argument("--write", action="store_true", help="into docs/families.md")
    asked = parser.parse_args()
    if asked.families:
        for verdict in walk(asked.families):
            print(verdict)
        return
    verdicts = list(walk(causal_families()))
    written = page(verdicts)
    if asked.write:
        (ROOT / "docs" / "families.md").write_text(written, encoding="utf-8")
    else:
        print(written)
    wrong = [verdict for verdict in verdicts if verdict.outcome == "wrong"]
    if wrong:
        sys.exit("\n".join(f"{verdict.family}: {verdict.detail}" for verdict in wrong))


if __name__ == "__main__":
    main()
