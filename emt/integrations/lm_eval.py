"""lm-evaluation-harness with the model "emt": any of its tasks, with a memory store.

    python -m emt.integrations.lm_eval --model emt --model_args store=memories/,topk=10 \
        --tasks my_task --include_path tasks/

is `lm_eval` with one model more; all of its options work. lm_eval finds models in a registry that
its own files fill, and has no entry point for others, so that somebody has to call `register`
first: this command does, and so must a program that calls `lm_eval.simple_evaluate(model="emt")`.

A task on one's own data needs no connection. It is a YAML file in `tasks/`:

    task: my_task
    dataset_path: json
    dataset_kwargs: {data_files: {test: items.jsonl}}   # as seen from where the command runs
    test_split: test
    output_type: multiple_choice
    doc_to_text: "{{query}}"
    doc_to_choice: "{{choices}}"
    doc_to_target: gold                                 # an index into the choices

`--use_cache` keeps answers by request, whatever the model: give each store and setting its own.
"""

from __future__ import annotations

import sys

from emt.errors import ConfigError, EMTError

NAME = "emt"
_TARGET = "emt.integrations.lm_eval_model:ExtendedMindLM"


def register() -> None:
    """Make lm_eval know the model "emt".

    Raises:
        ConfigError: lm_eval is not installed.
    """
    try:
        import lm_eval.models  # noqa: F401  # its own, which it looks for in an empty registry only
        from lm_eval.api.registry import model_registry
    except ImportError as error:
        raise ConfigError(
            f"this needs lm-evaluation-harness ({error}). Run `pip install 'emt[harness]'`."
        ) from error
    if NAME not in model_registry:
        model_registry.register(NAME, target=_TARGET)  # imported when it is asked for


def main() -> None:
    """Run lm_eval's command line; end with one line and code 2 after a mistake with a memory."""
    try:
        register()
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()
    except EMTError as error:
        sys.stderr.write(" ".join(str(error).split()) + "\n")
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
