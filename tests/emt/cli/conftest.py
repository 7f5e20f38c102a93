"""A tiny model of words, and a store that it has written; tests change copies of it."""

import contextlib
import shutil

import pytest

from memory_backends import MemoryBackend
from memory_backends.catalog import Catalog
from tests.emt.commands import emt, make_documents, make_model


@pytest.fixture(scope="package")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="package")
def indexed(tmp_path_factory, model):
    folder = tmp_path_factory.mktemp("indexed")
    documents = make_documents(folder / "documents")
    emt("index", documents, "--store", folder / "store", "--model", model)
    return folder


@pytest.fixture
def documents(tmp_path, indexed):
    return shutil.copytree(indexed / "documents", tmp_path / "documents")


@pytest.fixture
def store(tmp_path, indexed):
    """A store that was written from the folder `documents`, whether a test uses that or not."""
    store = shutil.copytree(indexed / "store", tmp_path / "store")
    with contextlib.closing(Catalog.open(store)) as catalog:
        files = catalog.setting("files")
        catalog.set_setting(
            "files",
            {file.replace(str(indexed), str(tmp_path)): names for file, names in files.items()},
        )
    return store


@pytest.fixture
def store_of_all_heads(store):
    """The store with indexes of all heads, not of those of the head profile only."""
    with contextlib.closing(MemoryBackend.open(store, "vector_db")) as backend:
        backend.rebuild()
    return store


@pytest.fixture
def more(tmp_path):
    """A folder with one more document."""
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "d.txt").write_text("w20 w30 w40")
    return tmp_path / "more"
