"""Folders with links, and places in them that cannot be read."""

import errno
import os

import pytest

from emt.errors import CorpusError
from emt.ingest.corpus import Corpus
from emt.ingest.files import find_files


def names_in(*sources):
    return [file.name for file in find_files(sources, [".txt"]).files]


def make(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def test_links_to_files_and_folders_are_followed(tmp_path):
    make(tmp_path, "corpus/a.txt", "elsewhere/deep/b.txt", "elsewhere/c.txt")
    (tmp_path / "corpus" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "corpus" / "d.txt").symlink_to("../single.txt")
    make(tmp_path, "single.txt")
    expected = ["a.txt", "d.txt", "linked/c.txt", "linked/deep/b.txt"]
    assert names_in(tmp_path / "corpus") == expected
    assert Corpus([tmp_path / "corpus"]).names == expected


def test_loops_end_and_each_file_is_found_once(tmp_path):
    make(tmp_path, "z/a.txt", "z/deep/b.txt")
    for name, target in {
        "a-before": "z",  # the folder itself comes before a link to it
        "z/up": "..",
        "z/deep/self": ".",
        "z/again": "deep",
    }.items():
        (tmp_path / name).symlink_to(target)
    (tmp_path / "b-first.txt").symlink_to("z/a.txt")
    assert names_in(tmp_path) == ["z/a.txt", "z/deep/b.txt"]
    for number in range(12):  # 2 ** 12 ways through
        folder = tmp_path / "ways" / str(number)
        folder.mkdir(parents=True)
        for name in ("x", "y"):
            (folder / name).symlink_to(f"../{number + 1}")
    (tmp_path / "ways" / "12").mkdir()
    make(tmp_path, "ways/12/end.txt")
    assert len(names_in(tmp_path / "ways" / "0")) == 1


def test_links_that_lead_nowhere_are_named(tmp_path):
    make(tmp_path, "a.txt")
    for name, target in {"b.txt": "gone.txt", "folder": "gone", "loop": "loop"}.items():
        (tmp_path / name).symlink_to(target)
    (tmp_path / "picture.png").symlink_to("gone.png")
    found = find_files([tmp_path], [".txt"])
    assert [file.name for file in found.files] == ["a.txt"]
    assert {path.name for path in found.unread} == {"b.txt", "folder", "loop"}
    assert not found.errors


def test_locked_folders_are_named(tmp_path, monkeypatch):
    make(tmp_path, "a.txt", "locked/b.txt")
    scandir = os.scandir

    def refusing(path):  # rights do not hold for root
        if os.fspath(path).endswith("locked"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    corpus = Corpus([tmp_path])
    assert corpus.names == ["a.txt"]
    assert corpus.unread == {tmp_path / "locked": "Permission denied"}
    with pytest.raises(CorpusError, match=r"locked' cannot be read: Permission denied\."):
        Corpus([tmp_path / "locked"])
