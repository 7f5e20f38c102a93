"""`emt serve` as a Ray Serve application: replicas that share the store that they read.

    serve run emt.integrations.ray_serve:app store=DIR replicas=2

Each replica has a model of its own, and answers OpenAI's API with the page, as `emt serve` does.
Replicas only read: documents are written by `emt index`, and are seen after a restart. A file of
keys says who may see what; without one everybody who reaches the port sees everything.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray import serve

from emt.errors import ConfigError

_ARGUMENTS = ("store", "model", "config", "device", "dtype", "keys", "replicas", "cpus", "gpus")


def app(arguments: Mapping[str, str]) -> serve.Application:
    """Return the application, for `serve run`.

    Args:
        arguments: `store`, the directory of a store that is there on every machine; and if wanted
            `model`, `config`, `device`, `dtype` and `keys` as of `emt serve`, how many `replicas`
            (1), and the `cpus` (1) and `gpus` (0) of each.

    Raises:
        ConfigError: there is no store among them, an unknown one, or a number that is none.
    """
    unknown = [name for name in arguments if name not in _ARGUMENTS]
    if unknown or "store" not in arguments:
        got = f"got {unknown[0]!r}" if unknown else "store is missing"
        raise ConfigError(f"arguments are {', '.join(_ARGUMENTS)}, as in store=DIR; {got}.")
    try:
        replicas, cpus = int(arguments.get("replicas", 1)), float(arguments.get("cpus", 1))
        gpus = float(arguments.get("gpus", 0))
    except ValueError as error:
        raise ConfigError(f"replicas, cpus and gpus are numbers: {error}.") from error
    given = {name: arguments.get(name) for name in _ARGUMENTS[:6]}

    def build() -> Any:
        return _application(given)

    deployment = serve.deployment(
        name="emt", num_replicas=replicas, ray_actor_options={"num_cpus": cpus, "num_gpus": gpus}
    )
    return deployment(serve.ingress(build)()).bind()


def _application(given: Mapping[str, str | None]) -> Any:
    """Return the web application of one replica, which loads the model."""
    from emt.cli.session import Session  # only in a replica
    from emt.serving.app import create_app
    from emt.serving.keys import Keys

    options = argparse.Namespace(**given, attn_implementation=None)
    session = Session(options, writing=False)
    keys = None if given["keys"] is None else Keys.read(Path(given["keys"]))
    name = Path(session.source).name.removesuffix(".gguf")
    return create_app(session.model, session.memory, keys=keys, model_name=name, can_write=False)
