"""Run one of the experiments: its settings name it, and a preset may change them.

    python scripts/run_experiment.py retrieval --preset smoke [--set key=value] [--model MODEL]

SETTINGS is a file in YAML, or the name of one in configs/experiments: comparison, retrieval,
perplexity, timing or interpretability. Results, tables and plots go to --output;
the same command goes on where an interrupted run stopped.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

from experiments.command import one_line_errors, write_report
from experiments.registry import experiment_of
from experiments.settings import read_settings

from emt.cli import quiet
from emt.model.loading import LoadedModel, load

_CONFIGS = Path(__file__).parent.parent / "configs" / "experiments"


def main() -> None:
    """Run an experiment, print its tables and say where the files are."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("settings", help="a YAML file, or a name in configs/experiments")
    parser.add_argument("--preset", help="a named set of changes in that file")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="changes",
        metavar="KEY=VALUE",
        help="change a setting; the value is YAML; KEY.INNER=VALUE inside of a mapping",
    )
    parser.add_argument("--model", help="a folder, hub name or .gguf file; as --set model=...")
    parser.add_argument("--output", type=Path, help="a folder for results; goes on if they exist")
    with one_line_errors():
        _run(parser.parse_args())


def _run(options: argparse.Namespace) -> None:
    path = Path(options.settings)
    if not path.suffix:
        path = _CONFIGS / f"{path}.yaml"
    model = [] if options.model is None else [f"model={options.model}"]
    values = read_settings(path, preset=options.preset, changes=[*options.changes, *model])
    experiment = experiment_of(values.pop("experiment", None))
    settings = experiment.settings(**values)
    name = "-".join(filter(None, (path.stem, options.preset)))
    folder = options.output or Path("results") / name

    @functools.cache
    def loading() -> LoadedModel:
        with quiet():
            return load(settings.model)

    results = experiment.run(settings, folder, loading)
    files = write_report(results.header, results.items, folder)
    print(files[0].read_text(encoding="utf-8"))
    print(f"in '{folder}'")


if __name__ == "__main__":
    main()
