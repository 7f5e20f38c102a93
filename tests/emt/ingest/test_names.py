"""Names beside those of a store: which document a file's is, and which files are gone."""

import hashlib
import shutil

import pytest

from emt.errors import CorpusError
from emt.ingest.corpus import Corpus
from emt.ingest.names import DocumentNames


class Shelf:
    """What a store keeps of its documents, without their rows."""

    def __init__(self):
        self.files, self.hashes = {}, {}

    def read(self, *sources, prune=False, replace=False):
        """Read files as `emt index` does; return name -> text."""
        names = DocumentNames(self.files, self.hashes, replace=replace)
        corpus = Corpus(sources, names=names, may_be_empty=prune)
        texts = {document.name: document.text for document in corpus}
        if prune:
            for name in corpus.gone():
                del self.hashes[name]
        self.hashes |= {
            name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()
        }
        names.keep(self)
        return texts

    # what `keep` asks of a catalogue

    def content_hashes(self):
        return dict(self.hashes)

    def setting(self, key):
        locations = set(self.files.values())
        return {of: [n for n, at in self.files.items() if at == of] for of in locations}

    def set_setting(self, key, files):
        self.files = {name: location for location, names in files.items() for name in names}


@pytest.fixture
def shelf():
    return Shelf()


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_folders_in_any_order_and_spelling_keep_their_names(tmp_path, shelf, monkeypatch):
    for folder in ("kettle", "lantern"):
        write(tmp_path / folder / "notes.md", folder)
    kettle, lantern = tmp_path / "kettle", tmp_path / "lantern"
    (tmp_path / "link").symlink_to(lantern)
    expected = {"notes.md": "kettle", "lantern/notes.md": "lantern"}
    assert shelf.read(kettle) | shelf.read(lantern) == expected
    monkeypatch.chdir(tmp_path)
    for sources in (
        (lantern, kettle),
        (kettle, lantern),
        ("kettle", "./lantern/"),
        ("kettle/../lantern", kettle),
        ("link", "kettle"),
        (kettle / "notes.md", "lantern/notes.md"),
        (tmp_path,),
    ):
        assert shelf.read(*sources) == expected
    write(lantern / "notes.md", "another")
    assert shelf.read(tmp_path) == {**expected, "lantern/notes.md": "another"}
    assert len(shelf.hashes) == 2


def test_a_link_that_is_changed_is_still_the_same_folder(tmp_path, shelf):
    for release in ("1", "2"):
        write(tmp_path / release / "notes.md", f"release {release}")
    current = tmp_path / "current"
    for release in ("1", "2"):
        current.unlink(missing_ok=True)
        current.symlink_to(release)
        assert shelf.read(current) == {"notes.md": f"release {release}"}


def test_lines_of_two_files_with_equal_ids(tmp_path, shelf):
    one = write(tmp_path / "one.jsonl", '{"id": 1, "text": "a"}\n{"id": 2, "text": "b"}')
    two = write(tmp_path / "two.jsonl", '{"id": 2, "text": "c"}\n{"id": 3, "text": "d"}')
    assert shelf.read(one) == {"1": "a", "2": "b"}
    for _ in range(2):
        assert shelf.read(two) == {"two.jsonl/2": "c", "3": "d"}
    write(two, '{"id": 2, "text": "new"}')
    assert shelf.read(two, one, prune=True) == {"1": "a", "2": "b", "two.jsonl/2": "new"}
    assert set(shelf.hashes) == {"1", "2", "two.jsonl/2"}  # a line that is gone is pruned


def test_a_moved_folder_is_recognised_by_what_has_not_changed(tmp_path, shelf):
    for name in ("a.txt", "b.txt"):
        write(tmp_path / "before" / name, name)
    shelf.read(tmp_path / "before")
    moved = tmp_path / "after"
    (tmp_path / "before").rename(moved)
    write(moved / "b.txt", "changed")
    assert shelf.read(moved) == {"a.txt": "a.txt", "after/b.txt": "changed"}
    assert shelf.files["a.txt"] == str(moved / "a.txt")
    assert set(shelf.hashes) == {"a.txt", "b.txt", "after/b.txt"}  # nothing was replaced
    copy = shutil.copytree(moved, tmp_path / "copy")  # its files are others, though equal
    assert set(shelf.read(copy)) == {"copy/a.txt", "copy/b.txt"}


def test_replace_keeps_apart_only_what_is_read_together(tmp_path, shelf):
    for folder in ("one", "two", "three"):
        write(tmp_path / folder / "a.txt", folder)
    shelf.read(tmp_path / "one")
    sources = tmp_path / "two", tmp_path / "three"
    expected = {"a.txt": "two", "three/a.txt": "three"}
    assert shelf.read(*sources, replace=True) == expected
    assert shelf.read(*sources) == expected
    assert shelf.files["a.txt"] == str(tmp_path / "two" / "a.txt")


def test_documents_without_a_file_are_taken_only_for_an_equal_one(tmp_path, shelf):
    folder = write(tmp_path / "folder" / "a.txt", "1").parent
    shelf.hashes["a.txt"] = hashlib.sha256(b"1").hexdigest()
    assert shelf.read(folder) == {"a.txt": "1"}
    assert shelf.files == {"a.txt": str(folder / "a.txt")}
    shelf.files.clear()
    write(folder / "a.txt", "2")
    assert shelf.read(folder) == {"folder/a.txt": "2"}


def test_when_all_names_are_taken_it_is_said(tmp_path, shelf):
    path = write(tmp_path / "a.txt", "1")
    parts = path.parts[1:]
    for first in range(len(parts)):
        shelf.hashes["/".join(parts[first:])] = "of another text"
    with pytest.raises(CorpusError, match=r"a.txt' has no name of its own: .* from 'a.txt' to '"):
        shelf.read(path)


def test_what_is_gone_from_the_folders_given_is_pruned(tmp_path, shelf):
    folder, other = tmp_path / "folder", tmp_path / "folder-2"
    for place in (folder, other):
        for name in ("a.txt", "deep/b.txt"):
            write(place / name, f"{place}{name}")
    linked = tmp_path / "linked"
    linked.symlink_to(folder)
    shelf.read(folder)
    shelf.read(other)
    shutil.rmtree(folder / "deep")
    (other / "a.txt").unlink()
    shelf.read(linked)
    assert len(shelf.hashes) == 4  # without `prune` all stay
    shelf.read(linked, prune=True)
    assert set(shelf.hashes) == {"a.txt", "folder-2/a.txt", "folder-2/deep/b.txt"}
    (folder / "a.txt").unlink()
    assert shelf.read(folder, prune=True) == {}
    assert set(shelf.hashes) == {"folder-2/a.txt", "folder-2/deep/b.txt"}


def test_what_cannot_be_read_is_not_gone(tmp_path, shelf):
    lines = write(tmp_path / "d.jsonl", '{"id": 1, "text": "a"}\n{"id": 2, "text": "b"}')
    write(tmp_path / "c.txt", "c")
    shelf.read(tmp_path)
    write(lines, '{"id": 1, "text": "a"}\n{"id": 2')
    write(tmp_path / "c.txt", "")
    write(tmp_path / "e.txt", "e")
    names = DocumentNames(shelf.files, shelf.hashes)
    corpus = Corpus([tmp_path], names=names, skip_errors=True)
    assert corpus.names == ["1", "e.txt"]
    assert corpus.gone() == []
