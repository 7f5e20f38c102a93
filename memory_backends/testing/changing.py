"""Rows that come and go: a search finds those that there are, in this process and in others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import pytest

from memory_backends.backend import MemoryBackend
from memory_backends.errors import DocumentError
from memory_backends.layout import Document, Rows
from memory_backends.sharded.verify import verify
from memory_backends.testing.base import Make, Suite
from memory_backends.testing.checks import assert_fetches, assert_finds
from memory_backends.testing.rows import IDENTITY, LAYOUT, make_document, make_rows


class ChangeConformance(Suite):
    """Add, replace, remove, save, open and refresh."""

    def test_a_document_comes_in_runs(self, make: Make) -> None:
        """One of them empty."""
        backend = make()
        runs = [make_rows(n, seed=n, first=at) for n, at in ((4, 0), (0, 4), (300, 4), (1, 304))]
        assert backend.add(make_document("a", 305), iter(runs)) == range(305)
        assert_fetches(backend, runs)
        assert_finds(backend, runs, range(305))
        assert backend.catalog.document("a").row_tokens.tolist() == list(range(305))

    def test_many_documents_are_added(self, make: Make) -> None:
        """Those before one that fails stay."""
        backend = make()
        runs = [make_rows(n, seed=n, sinks=[0]) for n in (3, 4, 5, 6)]

        def documents() -> Iterator[tuple[Document, list[Rows]]]:
            for run in runs:
                yield make_document(str(len(run)), len(run)), [run]
            raise RuntimeError("cut")

        added: list[tuple[str, range]] = []
        with pytest.raises(RuntimeError, match="cut"):
            added.extend(backend.add_many(documents(), rows_per_commit=7))
        starts = zip("3456", (0, 3, 7, 12), strict=True)
        assert added == [(name, range(first, first + int(name))) for name, first in starts]
        assert_finds(backend, runs, range(18))
        assert_fetches(backend, runs)

    def test_a_document_that_fails_half_way_leaves_no_trace(self, make: Make) -> None:
        """Also one that was to take the place of another."""
        backend, runs = make(), self.runs

        def failing() -> Iterator[Rows]:
            yield make_rows(500, seed=9)
            raise RuntimeError("cut")

        backend.add(make_document("a", 10), [runs[0]])
        with pytest.raises(RuntimeError, match="cut"):
            backend.add(make_document("a", 500), failing(), replace=True)
        assert_finds(backend, runs, range(10))
        assert backend.add(make_document("b", 7), [runs[1]]) == range(10, 17)
        assert_finds(backend, runs, range(17))
        assert_fetches(backend, runs)

    def test_replace_puts_new_rows_for_old(self, make: Make) -> None:
        """The new rows have new ids."""
        backend, runs = make(), self.runs
        backend.add(make_document("a", 10), [runs[0]])
        assert backend.add(make_document("a", 7), [runs[1]], replace=True) == range(10, 17)
        assert_finds(backend, runs, range(10, 17))
        assert backend.catalog.document_sizes() == [("a", 7, 7)]

    def test_removed_rows_are_not_found(self, make: Make) -> None:
        """Other rows keep their ids."""
        backend, runs = self.filled(make()), self.runs
        assert_finds(backend, runs, range(17))  # an index may be there already
        backend.remove([3, 4, 5, 16, 3])
        left = [0, 1, 2, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]
        assert_finds(backend, runs, left, k=20)
        assert_fetches(backend, runs)
        backend.remove(iter([]))
        backend.remove(torch.tensor([0]))
        assert_finds(backend, runs, left[1:])

    def test_a_removed_document_is_not_found(self, make: Make) -> None:
        """Its name can be used again, its ids not."""
        backend, runs = self.filled(make()), self.runs
        backend.remove([1])
        assert backend.remove_document("a") == 10
        assert_finds(backend, runs, range(10, 17))
        assert backend.catalog.document_names() == ["b"]
        with pytest.raises(DocumentError, match="no document 'a'"):
            backend.remove_document("a")
        assert backend.add(make_document("a", 10), [runs[0]]) == range(17, 27)
        assert_finds(backend, [*runs, runs[0]], range(10, 27))

    def test_clear_removes_everything_and_uses_no_id_again(self, make: Make) -> None:
        """The memory can be written to as before."""
        backend, runs = make(), self.runs
        backend.add(make_document("a", 10), [runs[0]])
        backend.clear()
        assert_finds(backend, runs, [])
        assert backend.catalog.document_names() == []
        assert backend.add(make_document("a", 7), [runs[1]]) == range(10, 17)
        assert_finds(backend, runs, range(10, 17))
        assert_fetches(backend, runs)

    def test_one_set_of_sinks_can_be_found(self, make: Make) -> None:
        """That of the first document which still has some."""
        backend = make(sinks="one")
        runs = [make_rows(5, at, sinks=sinks) for at, sinks in enumerate([[0, 3], [0, 1], [4]])]
        for name, rows in zip("abc", runs, strict=True):
            backend.add(make_document(name, 5), [rows])
        assert_finds(backend, runs, [0, 1, 2, 3, 4, 7, 8, 9, 10, 11, 12, 13], k=15)
        backend.remove([0])  # one of them is still there
        assert_finds(backend, runs, [1, 2, 3, 4, 7, 8, 9, 10, 11, 12, 13], k=15)
        backend.remove_document("a")
        assert_finds(backend, runs, [5, 6, 7, 8, 9, 10, 11, 12, 13], k=15)
        backend.remove([5, 6])
        assert_finds(backend, runs, [7, 8, 9, 10, 11, 12, 13, 14], k=15)

    # -- keeping --------------------------------------------------------------------------------

    def test_a_copy_is_the_same_memory(self, make: Make, tmp_path: Path) -> None:
        """For another kind of backend, too."""
        backend, runs = self.filled(make(identity=IDENTITY)), self.runs
        backend.remove([2, 11])
        left = [row for row in range(17) if row not in (2, 11)]
        backend.save(tmp_path / "copy")
        backend.clear()  # of which the copy knows nothing
        assert verify(tmp_path / "copy") == []
        other = MemoryBackend.open(tmp_path / "copy", self.other_type)
        for reopened in (self.open(tmp_path / "copy"), other):
            assert reopened.catalog.identity == IDENTITY
            assert reopened.layout == LAYOUT
            assert_finds(reopened, runs, left)
            assert_fetches(reopened, runs)

    def test_an_empty_memory_is_kept(self, make: Make, tmp_path: Path) -> None:
        """And can be written to."""
        make().save(tmp_path / "copy")
        reopened = self.open(tmp_path / "copy")
        assert_finds(reopened, [make_rows(0, seed=1)], [])
        assert reopened.add(make_document("a", 10), [self.runs[0]]) == range(10)

    def test_writing_goes_on_after_opening(self, store: Path) -> None:
        """Without saving, each write is kept."""
        more = make_rows(4, seed=5)
        backend = self.open(store)
        assert backend.add(make_document("c", 4), [more]) == range(17, 21)
        assert_finds(backend, [*self.runs, more], range(21))
        backend.remove_document("b")
        backend.close()
        assert_finds(self.open(store), [*self.runs, more], [*range(10), *range(17, 21)])

    # -- other writers --------------------------------------------------------------------------

    def test_two_writers_in_turn_keep_each_others_rows(self, store: Path) -> None:
        """Of the same kind, or of another."""
        writers = (self.open(store), MemoryBackend.open(store, self.other_type), self.open(store))
        runs = [*self.runs, *(make_rows(n, seed=n) for n in (4, 3, 5))]
        names = iter("cde")
        for writer, run in zip(reversed(writers), runs[2:], strict=True):
            writer.add(make_document(next(names), len(run)), [run])
        assert_finds(writers[0], runs, range(29))
        assert_fetches(writers[0], runs)

    def test_a_reader_keeps_its_snapshot_until_it_refreshes(self, store: Path) -> None:
        """Whatever another process writes and saves meanwhile."""
        reader, writer = (self.open(store) for _ in range(2))
        more, again = make_rows(4, seed=5), make_rows(4, seed=6)
        writer.add(make_document("c", 4), [more])
        writer.remove_document("a")
        writer.add(make_document("b", 4), [again], replace=True)
        writer.save()
        assert_finds(reader, self.runs, range(17))
        assert_fetches(reader, self.runs)
        assert reader.catalog.document_names() == []  # what is gone is not quoted, nor mistaken
        assert reader.catalog.document_of_rows([0, 10, 17, 21]) == {}
        for _ in range(2):
            reader.refresh()
            assert_finds(reader, [*self.runs, more, again], range(17, 25))
            assert reader.catalog.document_sizes() == [("c", 4, 4), ("b", 4, 4)]
            assert reader.catalog.document("b").first_row == 21

    def test_a_refresh_finds_a_store_made_meanwhile(self, make: Make, tmp_path: Path) -> None:
        """The path had none when it was opened."""
        reader, writer = (make(path=tmp_path / "new") for _ in range(2))
        reader.refresh()
        writer.add(make_document("a", 10), [self.runs[0]])
        assert len(reader) == 0
        reader.refresh()
        assert_finds(reader, self.runs, range(10))
        assert_fetches(reader, self.runs[:1])
