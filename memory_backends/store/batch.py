"""Documents written together: one flush and one transaction for all of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping

import torch
import numpy as np

from memory_backends.catalog.documents import name_taken
from memory_backends.catalog.records import NewDocument
from memory_backends.errors import DocumentError, EMTError, reported
from memory_backends.layout import Document, Rows
from memory_backends.store.checks import check_document, check_queries, check_rows
from memory_backends.store.store import DocumentBatch, Store


class Batch:
    """Documents whose rows are appended, and committed by the next `commit`.

    The store must be `writing`. `num_rows` are the rows that wait to be committed.
    """

    def __init__(self, store: Store, *, replace: bool) -> None:
        self._store = store
        self._replace = replace
        self._documents: list[NewDocument] = []
        self.num_rows = 0

    def append(
        self,
        document: Document,
        runs: Iterable[Rows],
        samples: Mapping[int, torch.Tensor] | None = None,
    ) -> None:
        """Put a document and its rows after those before it, all or nothing; errors as `add`."""
        check_document(document)
        if not self._replace:
            waiting = any(new.document.name == document.name for new in self._documents)
            if waiting or self._store.catalog.has_document(document.name):
                raise name_taken(document.name)
        try:
            new = self._appended(document, runs, samples or {})
        except BaseException:
            with contextlib.suppress(OSError):  # `commit` cuts off what is not committed
                self._store.rows.rewind()
                self._store.samples.rewind()
            raise
        self._documents.append(new)
        self.num_rows += len(new.row_tokens)

    def commit(self) -> list[tuple[str, range]]:
        """Commit all documents of the batch, or none, and empty it; return names and row ids."""
        store, documents = self._store, self._documents
        self._documents, self.num_rows = [], 0
        try:
            if not documents:
                return []
            with reported(store.path):
                flushed = store.rows.flush()
                store.samples.flush()
            ids = store.catalog.commit(
                [
                    new._replace(row_crc32=row_crc32)
                    for new, row_crc32 in zip(documents, flushed.row_crc32, strict=True)
                ],
                query_heads=store.samples.num_heads,
                codec_states=flushed.codec_states,
                moved_crc32=flushed.moved_crc32,
                replace=self._replace,
            )
        finally:  # the catalogue knows whether they are part of the memory, Ctrl-C or not
            store.catalog.refresh()
            store.show_committed()
        return [(new.document.name, rows) for new, rows in zip(documents, ids, strict=True)]

    def _appended(
        self, document: Document, runs: Iterable[Rows], samples: Mapping[int, torch.Tensor]
    ) -> NewDocument:
        store, first = self._store, self._store.catalog.num_rows + self.num_rows
        tokens, sinks = [], []
        num_rows = 0
        for run in runs:
            check_rows(run, store.layout, document, first=num_rows)
            check_queries(run, store.layout, store.samples.num_heads, first + num_rows)
            with reported(store.path):
                store.rows.append(run)
                store.samples.append(run, first + num_rows)
            tokens.append(run.tokens)
            sinks.append(num_rows + np.flatnonzero(run.sinks))
            num_rows += len(run)
        if not num_rows:
            raise DocumentError(
                f"document '{document.name}' has no rows to remember. "
                "Give it at least one token that is not a special id."
            )
        with reported(store.path):
            for layer_idx, of_layer in samples.items():
                store.samples.append_samples(layer_idx, of_layer)
        store.rows.seal()
        return NewDocument(
            document,
            np.concatenate(tokens).astype(np.int32),
            np.concatenate(sinks).astype(np.int32),
            store.samples.seal(),
            row_crc32={},  # `flush` tells
        )


def written(
    batch: DocumentBatch,
    documents: Iterable[tuple[Document, Iterable[Rows]]],
    rows_per_commit: int,
) -> Iterator[list[tuple[str, range]]]:
    """Write documents in batches of a store that is `writing`, as `MemoryBackend.add_many` says.

    Yields name and row ids of the documents of each batch, after it was committed.
    """
    waiting = iter(documents)
    failure: BaseException | None = None
    is_more = True
    while is_more:
        is_more = False
        try:
            for document, rows in waiting:
                batch.append(document, rows)
                if batch.num_rows >= rows_per_commit:
                    is_more = True
                    break
        except BaseException as error:  # raised below, after what is complete is committed
            failure = error
        try:
            added = batch.commit()
        except EMTError as error:
            raise error from failure
        if added:
            yield added
    if failure is not None:
        raise failure
