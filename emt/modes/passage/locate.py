"""From passages to the ids of their rows, checked against what the store has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from emt.errors import ConfigError, DocumentError
from emt.ingest.carry import FIRST_ROWS
from emt.passage import Passage, are_among
from memory_backends import MemoryBackend
from memory_backends.layout import Int64Array, StoredDocument


@dataclass(frozen=True)
class Placement:
    """The rows that are put into one prompt.

    Attributes:
        ids: ids of rows, in the order they are put.
        at: the token of the prompt that they are put before.
    """

    ids: tuple[int, ...]
    at: int


def by_prompt(
    passages: Sequence[Passage] | Sequence[Sequence[Passage]], at: int | Sequence[int]
) -> tuple[list[Sequence[Passage]], list[int]]:
    """Return the passages and the place of each prompt of a batch.

    Args:
        passages: of all prompts alike, or one sequence for each prompt.
        at: of all prompts alike, or one for each.

    Raises:
        ConfigError: their numbers differ, or they are something else.
    """
    shared: list[Passage] = []
    separate: list[Sequence[Passage]] = []
    for given in passages:
        if isinstance(given, Passage):
            shared.append(given)
        elif isinstance(given, Sequence) and all(isinstance(item, Passage) for item in given):
            separate.append(given)
        else:
            raise ConfigError(
                f"expected Passage, or sequences of it, one for each prompt; got {given!r:.100}."
            )
    if shared and separate:
        raise ConfigError(
            "passages must be alike for all prompts, or one sequence for each; got both."
        )
    places = [at] if isinstance(at, int) else list(at)
    prompts: list[Sequence[Passage]] = separate or [shared]
    if len(prompts) == 1 and len(places) > 1:
        prompts = prompts * len(places)
    if len(places) == 1:
        places = places * len(prompts)
    if len(places) != len(prompts):
        raise ConfigError(
            f"at must be one place, or one for each prompt: {len(prompts)} of them; "
            f"got {len(places)}."
        )
    return prompts, places


def locate(
    backend: MemoryBackend,
    prompts: Sequence[Sequence[Passage]],
    places: Sequence[int],
    *,
    sinks: bool | None = None,
) -> list[Placement]:
    """Return the rows of the passages of each prompt.

    Args:
        backend: where the rows are.
        prompts: the passages of each prompt, in the order they are put.
        places: of each prompt, the token its passages are put before, padding not counted.
        sinks: whether the first passage is put after the first rows of its document, if it
            does not begin with them; None where it is put before a prompt's first token, without
            those that another passage has.

    Raises:
        ConfigError: passages of one prompt share rows, or a place is negative.
        DocumentError: a document is unknown, or does not have a passage's rows, or some of them
            were removed.
    """
    documents: dict[str, StoredDocument] = {}
    stored_rows = backend.store.searchable_rows("all")
    placements = []
    for passages, at in zip(prompts, places, strict=True):
        if at < 0:
            raise ConfigError(f"at must be 0 or more, a token of the prompt; got {at}.")
        ids: list[int] = []
        for order, passage in enumerate(passages):
            if passage.document not in documents:
                documents[passage.document] = backend.catalog.document(passage.document)
            document = documents[passage.document]
            _check_range(passage, document)
            if order == 0 and (at == 0 if sinks is None else sinks):
                # A later passage may have the sinks itself.
                others = passages[1:] if sinks is None else ()
                ids += _sinks_before(passage, document, others, stored_rows)
            ids += range(document.first_row + passage.first, document.first_row + passage.stop)
        if len(set(ids)) < len(ids):
            raise ConfigError(
                f"passages of one prompt must not share rows; got {', '.join(map(str, passages))}. "
                "Join those that touch, or pass sinks=False if a later one has the sinks."
            )
        placements.append(Placement(tuple(ids), at))
    _check_stored(placements, stored_rows)
    return placements


def _sinks_before(
    passage: Passage, document: StoredDocument, others: Sequence[Passage], stored_rows: Int64Array
) -> list[int]:
    """Return the ids of the rows of a document's first tokens that stand before a passage of it.

    One of them, mostly the first, gets nearly all of the attention that goes to sinks.
    """
    first_rows = [
        row
        for row in np.flatnonzero(document.row_tokens < FIRST_ROWS).tolist()
        if row < passage.first and not any(_has(other, passage.document, row) for other in others)
    ]
    ids = document.first_row + np.array(first_rows, dtype=np.int64)
    kept: list[int] = ids[are_among(ids, stored_rows)].tolist()
    return kept


def _has(passage: Passage, document: str, row: int) -> bool:
    return passage.document == document and passage.first <= row < passage.stop


def _check_range(passage: Passage, document: StoredDocument) -> None:
    if not 0 <= passage.first < passage.stop <= len(document.row_tokens):
        raise DocumentError(
            f"expected 0 <= first < stop <= {len(document.row_tokens)}, the rows of document "
            f"'{passage.document}'; got first={passage.first}, stop={passage.stop}."
        )


def _check_stored(placements: Sequence[Placement], stored_rows: Int64Array) -> None:
    unique = sorted({row for placement in placements for row in placement.ids})
    ids = np.array(unique, dtype=np.int64)
    removed = ids[~are_among(ids, stored_rows)]
    if len(removed):
        raise DocumentError(
            f"{len(removed)} rows of these passages were removed, the first of them row "
            f"{removed[0]} of the memory. Recall passages without them."
        )
