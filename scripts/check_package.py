"""Check what is published: sdist and wheel, in empty environments with extras and other versions.

    python scripts/check_package.py [--keep DIR] [NAME ...]

Without names all of `ENVIRONMENTS` are tried, one after the other; each takes a minute or two, and
1 to 2 GB of disk while it is tried. In each, a tiny random model reads a document and answers, and
`emt --help` runs. One line says how each went; the exit status is 1 if any failed. torch comes from
where pip finds it: name an index with a CPU build in pip's configuration, or gigabytes of CUDA come
with it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent

_TINY = """
import torch, transformers
from emt import MemoryConfig, attach, detach
torch.manual_seed(0)
shape = dict(vocab_size=99, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2)
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).eval()
config = MemoryConfig(memory_type="vector_db", path="store", mode="token")
ids = torch.randint(3, 99, (1, 80))
attach(model, config).write(ids, document="one")
detach(model)
memory = attach(model, config)
out = model.generate(ids[:, :20], max_new_tokens=4, do_sample=False)
assert memory.documents == ["one"] and out.shape == (1, 24), out.shape
import faiss, numpy
print("torch", torch.__version__, "transformers", transformers.__version__,
      "faiss", faiss.__version__, "numpy", numpy.__version__)
"""


class Environment(NamedTuple):
    """One environment that the wheel is installed in.

    Attributes:
        extras: of the wheel.
        pins: what is installed with it, as pip names it.
        code: Python that must run there, beside the tiny model's.
    """

    extras: str
    pins: tuple[str, ...] = ()
    code: str = ""


_LOWEST = ("transformers==5.23.0", "faiss-cpu==1.14.2", "numpy==1.26.4")
_CONSTRAINED = ("-c", str(ROOT / "constraints.txt"))

ENVIRONMENTS = {
    "cpu": Environment("cpu", _CONSTRAINED),
    "lowest": Environment("cpu", _LOWEST),
    "newest": Environment("cpu", ("--upgrade", "--upgrade-strategy", "eager")),
    "serve": Environment("cpu,serve", _CONSTRAINED, "import emt.serving.app"),
    "documents": Environment(
        "cpu,documents", _CONSTRAINED, "import pypdfium2, mammoth, markdownify, lxml"
    ),
    "ray": Environment("cpu,ray,serve", _CONSTRAINED, "import emt.integrations.ray_serve"),
    "langchain": Environment("cpu,langchain", _CONSTRAINED, "import emt.integrations.langchain"),
    "llamaindex": Environment("cpu,llamaindex", _CONSTRAINED, "import emt.integrations.llamaindex"),
    "harness": Environment("cpu,harness", _CONSTRAINED, "import emt.integrations.lm_eval_model"),
}


def main() -> int:
    """Build, check and try; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("name", nargs="*", help=f"of {', '.join(ENVIRONMENTS)}; default: all")
    parser.add_argument("--keep", metavar="DIR", type=Path, help="keep what was built there")
    options = parser.parse_args()
    unknown = [name for name in options.name if name not in ENVIRONMENTS]
    if unknown:
        parser.error(f"no environment {unknown[0]!r}; there are {', '.join(ENVIRONMENTS)}")
    with tempfile.TemporaryDirectory(prefix="emt-package-") as folder:
        built = options.keep or Path(folder) / "dist"
        wheel = _build(built)
        print(f"built and checked: {', '.join(sorted(path.name for path in built.iterdir()))}")
        failed = [
            name
            for name in options.name or ENVIRONMENTS
            if not _works(name, ENVIRONMENTS[name], wheel, Path(folder) / name)
        ]
    return 1 if failed else 0


def _build(folder: Path) -> Path:
    """Build sdist and wheel from a clean checkout of what is committed; return the wheel."""
    with tempfile.TemporaryDirectory(prefix="emt-tree-") as tree:
        archive = subprocess.run(
            ["git", "-C", str(ROOT), "archive", "HEAD"], check=True, capture_output=True
        ).stdout
        subprocess.run(["tar", "-x", "-C", tree], input=archive, check=True)
        _run([sys.executable, "-m", "build", "--outdir", str(folder), tree])
    files = sorted(str(path) for path in folder.iterdir())
    _run([sys.executable, "-m", "twine", "check", "--strict", *files])
    (wheel,) = folder.glob("*.whl")
    return wheel


def _works(name: str, environment: Environment, wheel: Path, folder: Path) -> bool:
    """Install the wheel in an empty environment, and try it; print how it went."""
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    wanted = f"{wheel}[{environment.extras}]"
    try:
        # torch first: with it in place, nothing else pulls another build of it
        _run([python, "-m", "pip", "install", "-q", *_CONSTRAINED, "torch"])
        torch = _run([python, "-c", "import torch; print(torch.__version__.split('+')[0])"])
        pins = [*environment.pins, f"torch=={torch.strip()}"]
        _run([python, "-m", "pip", "install", "-q", wanted, *pins])
        _run([python, "-m", "pip", "check"])
        _run([str(folder / "bin" / "emt"), "--help"], folder)
        said = _run([python, "-c", _TINY + environment.code], folder)
    except RuntimeError as error:
        print(f"{name}: FAILED\n{error}", flush=True)
        return False
    finally:
        subprocess.run(["rm", "-rf", str(folder)], check=False)
    print(f"{name}: {said.strip().splitlines()[-1]}", flush=True)
    return True


def _run(command: list[str], folder: Path | None = None) -> str:
    """Run a command; return what it prints. A RuntimeError if it fails."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:6])}\n{done.stdout[-1500:]}{done.stderr[-1500:]}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
