"""What the package imports, and what a store consists of."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import memory_backends
from memory_backends import MemoryBackend
from memory_backends.testing.rows import LAYOUT, make_document, make_rows

SOURCES = sorted(Path(memory_backends.__file__).parent.rglob("*.py"))


def _imported(source: Path) -> set[str]:
    """Return the top-level names of all that a file imports, inside functions too."""
    result = set()
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            result |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source} has a relative import"
            result.add((node.module or "").partition(".")[0])
    return result


def test_no_language_model_and_no_pickle_is_imported() -> None:
    imported = {source: _imported(source) for source in SOURCES}
    assert all(s.parent.name == "testing" for s, names in imported.items() if "pytest" in names)
    result = set().union(*imported.values())
    assert [s.name for s, names in imported.items() if "ray" in names] == ["remote.py"]
    allowed = {"memory_backends", "torch", "numpy", "faiss", "filelock", "pytest", "ray"}
    assert result - sys.stdlib_module_names == allowed
    assert not result & {"pickle", "shelve", "marshal", "dill", "joblib"}


def test_nothing_is_loaded_that_could_be_code() -> None:
    for source in SOURCES:
        calls = {
            f"{node.func.value.id}.{node.func.attr}"
            for node in ast.walk(ast.parse(source.read_text(encoding="utf-8")))
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
        }
        assert not calls & {"torch.load", "torch.save", "np.load", "np.save", "np.savez"}


def test_the_public_names_are_sorted_and_there() -> None:
    assert memory_backends.__all__ == sorted(memory_backends.__all__)
    assert all(hasattr(memory_backends, name) for name in memory_backends.__all__)


def test_a_store_is_sqlite_faiss_and_raw_values(tmp_path: Path) -> None:
    backend = MemoryBackend(LAYOUT, "vector_db", path=tmp_path)
    backend.add(make_document("a", 10), [make_rows(10, seed=1)])
    backend.save()
    backend.close()
    expected = {
        "catalog.sqlite": b"SQLite format 3\0",
        "rows/layer-000.bin": None,
        "rows/layer-003.bin": None,
        "index/000001/ids.bin": None,
        "index/000001/layer-000-head-000.faiss": b"IxFI",
        "index/000001/layer-000-head-001.faiss": b"IxFI",
        "index/000001/layer-003-head-000.faiss": b"IxFI",
    }
    files = {str(f.relative_to(tmp_path)): f for f in tmp_path.rglob("*") if f.is_file()}
    files.pop("write.lock", None)
    assert set(files) == set(expected)
    for name, start in expected.items():
        if start is not None:
            assert files[name].read_bytes().startswith(start)
    assert files["rows/layer-000.bin"].stat().st_size == 10 * 2 * 16 * 4
    assert files["index/000001/ids.bin"].stat().st_size == 10 * 8


def test_faiss_is_needed_for_a_vector_db_alone() -> None:
    code = (
        "import sys\n"
        "class Blocker:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'faiss':\n"
        "            raise ModuleNotFoundError('No module named faiss', name='faiss')\n"
        "sys.meta_path.insert(0, Blocker())\n"
        "from memory_backends import MemoryBackend\n"
        "from memory_backends.testing.rows import LAYOUT\n"
        "assert len(MemoryBackend(LAYOUT)) == 0\n"
        "MemoryBackend(LAYOUT, 'vector_db')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == (
        "ImportError: emt needs FAISS. Install it with `pip install 'emt[cpu]'`, "
        "or `pip install 'emt[gpu]'` on a machine with CUDA."
    )
