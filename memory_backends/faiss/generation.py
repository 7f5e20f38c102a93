"""The FAISS files of a store: a cache of its rows, one generation at a time.

A generation is a folder `index/000001` with one FAISS file for each indexed (layer, KV head), which
may be a few of them (see `coverage.py`), and `ids.bin`, which says what row each FAISS position is.
The catalogue's setting "index" names the generation in force, with size and crc32 of every file and
what calibration found; writing it is what commits a generation. The files can be deleted at any
time: they are made from the rows.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from memory_backends.catalog import Catalog
from memory_backends.catalog.database import file_id
from memory_backends.errors import StoreError, StoreReplacedError, reported
from memory_backends.faiss import index as faiss_index
from memory_backends.faiss.calibration import Effort, least_effort
from memory_backends.faiss.coverage import IndexedHeads, file_name, from_setting
from memory_backends.layout import Int64Array
from memory_backends.rows.append_files import next_crc32, sync_path
from memory_backends.store.directory import INDEX_FOLDER, check_generation

_IDS = "ids.bin"
_SETTING = "index"
_ADVICE = "Run `emt rebuild`: the index is made anew from the rows."


@dataclass(frozen=True)
class Generation:
    """One complete set of FAISS files."""

    folder: Path
    option: str  # the factory string that the user gave
    factory: str  # the one they were built with
    heads: IndexedHeads
    num_rows: int  # vectors in each file
    efforts: Mapping[int, list[list[Effort]]]  # layer -> of each of its heads; none uncalibrated
    files: Mapping[str, Mapping[str, int]]  # name -> its size and crc32
    folder_id: tuple[int, int] | None = None  # of the folder when it was found

    @classmethod
    def current(cls, directory: Path, catalog: Catalog) -> Generation | None:
        """Return the generation in force; None if there is none, or its folder was deleted."""
        saved = catalog.setting(_SETTING)
        if not saved:
            return None
        try:
            generation = cls(
                directory / INDEX_FOLDER / check_generation(saved["generation"]),
                str(saved["option"]),
                str(saved["factory"]),
                from_setting(saved, catalog.layout),
                int(saved["num_rows"]),
                {
                    int(idx): [[Effort(int(e[0]), *map(float, e[1:])) for e in head] for head in h]
                    for idx, h in saved["efforts"].items()
                },
                saved["files"],
                file_id(directory / INDEX_FOLDER / saved["generation"]),
            )
            for layer_idx, efforts in generation.efforts.items():
                if len(efforts) != len(generation.heads.get(layer_idx, ())):
                    raise ValueError(f"layer {layer_idx} has efforts of {len(efforts)} heads")
            named = ((idx, head) for idx, chosen in generation.heads.items() for head in chosen)
            names = {_IDS, *(file_name(idx, head) for idx, head in named)}
            lacking = names - generation.files.keys()
            if lacking:
                raise ValueError(f"sizes and checksums of {sorted(lacking)[:5]} are missing")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StoreError(f"the record of the index is damaged: {error!r}. {_ADVICE}") from error
        if not generation.folder.is_dir():
            return None
        generation._check_sizes()
        return generation

    def is_in_force(self, catalog: Catalog) -> bool:
        """Tell whether this is still the store's generation."""
        saved = catalog.setting(_SETTING) or {}
        return self.folder.is_dir() and saved.get("generation") == self.folder.name

    def remove_others(self) -> None:
        """Delete all other generations, also those that a killed run left behind."""
        with reported(self.folder.parent.parent):
            for other in self.folder.parent.iterdir():
                if other.name != self.folder.name:
                    shutil.rmtree(other, ignore_errors=True)

    def holds(self, layer_idx: int, head: int) -> bool:
        """Tell whether a head has a file."""
        return head in self.heads.get(layer_idx, ())

    def covers(self, heads: IndexedHeads) -> bool:
        """Tell whether all of these heads have files."""
        return all(self.holds(idx, head) for idx, chosen in heads.items() for head in chosen)

    def efforts_of(self, layer_idx: int, head: int) -> list[Effort]:
        """Return the calibrated efforts of a head that has a file; an empty list without any."""
        of_layer = self.efforts.get(layer_idx)
        return of_layer[self.heads[layer_idx].index(head)] if of_layer else []

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(int(entry["size"]) for entry in self.files.values())

    def read_ids(self, stop: int) -> Int64Array:
        """Read which row each position is, (num_rows,) int64; raise a StoreError if damaged."""
        self._check_in_place()
        path = self.folder / _IDS
        size = path.stat().st_size if path.is_file() else 0
        if size != 8 * self.num_rows:
            state = f"has {size} bytes" if path.is_file() else "is missing"
            raise StoreError(f"'{path}' {state}; expected {8 * self.num_rows} bytes. {_ADVICE}")
        self._check_bytes(path)
        ids: npt.NDArray[np.int64] = np.fromfile(path, dtype="<i8")
        if self.num_rows and not 0 <= ids.min() <= ids.max() < stop:
            raise StoreError(
                f"'{path}' is damaged: expected row ids 0 to {stop - 1}; "
                f"got {ids.min()} to {ids.max()}. {_ADVICE}"
            )
        return ids

    def read_head(self, layer_idx: int, head: int, dim: int, *, mapped: bool) -> Any:
        """Read one head's index; raise a StoreError if its file is missing or damaged.

        A file that is mapped is not compared with its checksum: that would read all of it.
        """
        self._check_in_place()
        path = self.folder / file_name(layer_idx, head)
        if not mapped:
            self._check_bytes(path)
        index = faiss_index.read_index(path, dim, self.num_rows, mapped=mapped)
        if mapped and faiss_index.mapped_lists(index) is None:  # a kind that FAISS reads whole
            self._check_bytes(path)
        return index

    def _check_in_place(self) -> None:
        if file_id(self.folder) not in (self.folder_id, None):
            raise StoreReplacedError(
                f"'{self.folder}' was replaced by another one since the store was opened. Open the "
                "store again (`Memory.refresh` does it)."
            )

    def _check_bytes(self, path: Path) -> None:
        if path.is_file() and _checksum(path) != self.files[path.name]["crc32"]:
            raise StoreError(f"'{path}' is damaged: its checksum differs. {_ADVICE}")

    def _check_sizes(self) -> None:
        for name, expected in self.files.items():
            path = self.folder / Path(name).name
            size = path.stat().st_size if path.is_file() else None
            if size != expected["size"]:
                state = "is missing" if size is None else f"has {size} bytes"
                raise StoreError(f"'{path}' {state}; expected {expected['size']} bytes. {_ADVICE}")


def write_generation(
    directory: Path,
    catalog: Catalog,
    ids: Int64Array,
    layers: Mapping[int, Callable[[], Mapping[int, tuple[Any, list[Effort]]]]],
    *,
    option: str,
    factory: str,
    recall: float,
) -> Generation:
    """Write FAISS files to a new generation, make it the store's, and delete the others.

    The catalogue is locked for writing; if writing fails, the generation before stays in force. A
    call of `layers` gives one layer's indexes, for each KV head to be written, ascending, and what
    calibration for `recall` found of it; one layer is in RAM at a time. `ids` are (n,) the row of
    each position, `option` and `factory` as in `Generation`.
    """
    folder = directory / INDEX_FOLDER / f"{_last_number(directory, catalog) + 1:06d}"
    efforts: dict[int, list[list[Effort]]] = {}
    heads: dict[int, tuple[int, ...]] = {}
    with reported(directory):
        shutil.rmtree(folder, ignore_errors=True)  # left by an interrupted run
        try:
            folder.mkdir(parents=True)
            for layer_idx, built in layers.items():
                indexes = built()
                heads[layer_idx] = tuple(indexes)
                efforts[layer_idx] = [effort for _, effort in indexes.values()]
                for head, (index, _) in indexes.items():
                    faiss_index.write_index(index, folder / file_name(layer_idx, head))
            ids.astype("<i8").tofile(folder / _IDS)
            files = {
                path.name: {"size": path.stat().st_size, "crc32": _checksum(path)}
                for path in sorted(folder.iterdir())
            }
            for path in [*folder.iterdir(), folder, folder.parent, directory]:
                sync_path(path)
            catalog.set_setting(
                _SETTING,
                {
                    "generation": folder.name,
                    "option": option,
                    "factory": factory,
                    "heads": {str(idx): list(chosen) for idx, chosen in heads.items()},
                    "num_rows": len(ids),
                    "efforts": {str(idx): e for idx, e in efforts.items() if any(e)},
                    "files": files,
                    **_summary(efforts, recall),
                },
            )
        except BaseException:  # Ctrl-C may come after the catalogue has committed
            if (catalog.setting(_SETTING) or {}).get("generation") != folder.name:
                shutil.rmtree(folder, ignore_errors=True)
            raise
    written = Generation(folder, option, factory, heads, len(ids), efforts, files, file_id(folder))
    written.remove_others()
    return written


def _last_number(directory: Path, catalog: Catalog) -> int:
    """Return the highest number that a generation has or had, 0 if there was none."""
    saved = catalog.setting(_SETTING)
    names = [saved.get("generation", "")] if isinstance(saved, dict) else []
    if (directory / INDEX_FOLDER).is_dir():
        names += [path.name for path in (directory / INDEX_FOLDER).iterdir()]
    return max((int(n) for n in names if re.fullmatch(r"[0-9]{6}", str(n))), default=0)


def _summary(efforts: Mapping[int, list[list[Effort]]], recall: float) -> dict[str, float]:
    """Return what `emt info` says of a calibrated index: means over layers and heads."""
    of_heads = (of_head for of_layer in efforts.values() for of_head in of_layer)
    chosen = [least_effort(of_head, recall) for of_head in of_heads if of_head]
    names = ("recall", "attention", "scanned") if chosen else ()
    return {name: float(np.mean([getattr(effort, name) for effort in chosen])) for name in names}


def _checksum(path: Path) -> int:
    with path.open("rb") as file:
        return next_crc32(file, path.stat().st_size)
