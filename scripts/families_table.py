"""Write which model families work: README.md's short table, and docs/families.md with all of them.

    python scripts/families_table.py                 # print both
    python scripts/families_table.py --write         # put them where they belong
    python scripts/families_table.py llama mamba     # try some families and print what came out

The short table runs the prefix oracle on the tiny models of `tests/families.py`, with both
backends and a left-padded batch. The long one builds every family that `AutoModelForCausalLM`
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

BEGIN, END = "<!-- families: begin -->", "<!-- families: end -->"
TIME_LIMIT = 150.0  # seconds for one family; most take less than one
MADE_BY = (
    "Made by `python scripts/families_table.py --write` with transformers "
    f"{transformers.__version__}."
)
INTRODUCTION = """\
# Model families

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


def long_table(verdicts: Sequence[Verdict]) -> str:
    """Return docs/families.md."""
    # Imported here, for only the page needs them.
    from tests.forgetting import NUM_PREFIX, NUM_REST
    from tests.verdicts import TOLERANCE

    introduction = INTRODUCTION.format(prefix=NUM_PREFIX, rest=NUM_REST, tolerance=TOLERANCE)
    lines = [introduction, counted(verdicts), ""]
    names = ("family", "outcome", "layers, keys", "error", "forgotten", "carries")
    lines += [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for verdict in verdicts:
        what = verdict.layers or verdict.detail.replace("|", "\\|")
        figures = ("", "") if verdict.found is None else (f"{x:.1e}" for x in verdict.found)
        carries = {True: "yes", False: "no", None: ""}[verdict.carries]
        lines.append(
            f"| {' | '.join((verdict.family, verdict.outcome, what, *figures, carries))} |"
        )
    return "\n".join([*lines, "", MADE_BY, ""])


def counted(verdicts: Sequence[Verdict]) -> str:
    """Say in a sentence how many families work."""
    counts = Counter(verdict.outcome for verdict in verdicts)
    built = len(verdicts) - counts["not built"]
    sentence = (
        f"{counts['works']} of {built} buildable families work; {counts['refused']} are refused"
    )
    return sentence + (f"; {counts['wrong']} are wrong." if counts["wrong"] else ".")


def short_table(verdicts: Sequence[Verdict]) -> str:
    """Return what stands between README.md's markers."""
    lines = [
        "| family | what is special | prefix oracle, largest logit difference |",
        "|---|---|---|",
    ]
    for family in FAMILIES:
        model = family.build()
        layers = list(range(model.config.num_hidden_layers))
        errors = []
        for kind in ("manual", "vector_db"):
            config = emt.MemoryConfig.published(memory_type=kind, index="Flat", layers=layers)
            memory = emt.attach(model, config)
            errors.append(oracle_error(model, memory, lengths=(12, 7, 3)))
            emt.detach(model)
        lines.append(f"| {family.model_type} | {family.note} | {max(errors):.1e} |")
    for family in REFUSED:
        try:
            emt.attach(family.build())
        except UnsupportedModelError as error:
            lines.append(f"| {family.model_type} | {family.note} | refused: {error} |")
    page = "[docs/families.md](docs/families.md)"
    lines += ["", f"{counted(verdicts)[:-1]}; the whole table: {page}.", "", MADE_BY]
    return "\n".join(lines)


def main() -> None:
    """Print the tables, or put them where they belong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", help="try only these, and print what came out")
    parser.add_argument("--write", action="store_true", help="into README.md and docs/families.md")
    asked = parser.parse_args()
    if asked.families:
        for verdict in walk(asked.families):
            print(verdict)
        return
    verdicts = list(walk(causal_families()))
    long, short = long_table(verdicts), short_table(verdicts)
    if not asked.write:
        print(long, short, sep="\n")
    else:
        (ROOT / "docs" / "families.md").write_text(long, encoding="utf-8")
        readme = ROOT / "README.md"
        before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
        _, _, after = rest.partition(END)
        readme.write_text(f"{before}{BEGIN}\n{short}\n{END}{after}", encoding="utf-8")
    wrong = [verdict for verdict in verdicts if verdict.outcome == "wrong"]
    if wrong:
        sys.exit("\n".join(f"{verdict.family}: {verdict.detail}" for verdict in wrong))


if __name__ == "__main__":
    main()
