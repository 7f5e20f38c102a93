import ast
import types
from pathlib import Path

import pytest

import emt
import emt.errors

ROOT = Path(emt.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))


def imports_of(path):
    """Return the names of the modules that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
    return found


def test_all_is_sorted_and_complete():
    assert emt.__all__ == sorted(emt.__all__)
    public = {
        name
        for name, value in vars(emt).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert public == set(emt.__all__)


def test_the_names_a_user_learns():
    assert emt.__all__ == [
        "Citation",
        "ConfigError",
        "CorpusError",
        "DocumentError",
        "EMTError",
        "ExtendedLlamaForCausalLM",
        "ExtendedMindForCausalLM",
        "ExtendedMptForCausalLM",
        "HeadProfile",
        "IndexFactoryError",
        "Memory",
        "MemoryBackend",
        "MemoryConfig",
        "MemoryMismatchError",
        "MemoryUseError",
        "Passage",
        "Recording",
        "Routed",
        "RoutedPassage",
        "RowCitation",
        "StoreError",
        "UnsupportedModelError",
        "attach",
        "detach",
        "memory_attention",
    ]


def test_attention_imports_torch_only():
    found = {name.split(".")[0] for name in imports_of(ROOT / "attention.py")}
    assert found == {"__future__", "functools", "typing", "torch"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_emt_imports_no_scripts_or_tests(path):
    assert not {name.split(".")[0] for name in imports_of(path)} & {"scripts", "tests"}


def test_emt_is_the_only_package_that_imports_transformers():
    backends = sorted((ROOT.parent / "memory_backends").rglob("*.py"))
    assert backends
    for path in backends:
        assert not {name.split(".")[0] for name in imports_of(path)} & {"emt", "transformers"}
    assert any("transformers" in imports_of(path) for path in MODULES)


def test_every_error_is_ours_and_the_builtin_that_fits():
    bases = {
        "ConfigError": ValueError,
        "CorpusError": ValueError,
        "DocumentError": ValueError,
        "EMTError": Exception,
        "IndexFactoryError": ValueError,
        "MemoryMismatchError": ValueError,
        "MemoryUseError": RuntimeError,
        "StoreError": OSError,
        "UnsupportedModelError": NotImplementedError,
    }
    assert emt.errors.__all__ == sorted(bases)
    for name, builtin in bases.items():
        error = getattr(emt.errors, name)
        assert issubclass(error, builtin)
        assert issubclass(error, emt.errors.EMTError)
        assert name in emt.errors.__doc__
