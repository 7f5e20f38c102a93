"""`MemoryConfig`: every setting of a memory, checked when it is made, to and from YAML."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
import yaml

from emt.errors import ConfigError
from emt.uncertainty import Uncertainty


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """Settings of a memory. The defaults are the published method's.

    Attributes:
        memory_type: "manual" keeps rows as tensors, "vector_db" in a store searched by FAISS.
        path: the store's directory; opened if it exists, else made by the first write. None keeps
            the memory for the life of the process only.
        enabled: False for the plain model, with its memories kept.
        mode: "token" is the published method: each query retrieves single memories. "passage"
            finds the passages that a prompt is about, by a few of the model's heads, and lets every
            layer attend to their rows in order. "auto" is "token" up to 16,384 rows, as published,
            and "passage" beyond, if there is a head profile of the model (`emt profile`).
        recall_rows: rows of all passages of a prompt together, at most.
        recall_passages: passages of a prompt, at most; places near each other make one.
        routing: what finds passages: "heads", "words" (BM25 over the stored text; needs bm25s) or
            "both".
        relevance: how far a prompt's evidence must stand above that of prompts about nothing in
            particular, in standard deviations, for passages to be recalled; else the model is the
            plain one. None recalls passages for every prompt, as is done in a memory of fewer than
            128 rows, in which evidence is all in one place. Words have no say in it.
        reroute: find passages anew every so many generated tokens, with what was generated, and
            swap those recalled for as many rows of others if they are about something else; needs
            one sequence for each prompt and a cache. None for never.
        profile: file of the head profile; None for the store's own, or the one that comes with emt.
        topk: memories that each query attends to, at every layer and head; "auto" for one in 500
            of those there are, at least 4 and at most 12.
        uncertainty: redo a step of `generate` whose next-token entropy, in nats, is above `entropy`
            with `topk` memories, a whole number above the setting `topk`; given as a mapping of
            these two. None for never.
        layers: model layers that read memories; None for every full-attention layer.
        mask_by_sim: leave out retrieved memories whose cosine similarity is not above
            `sim_threshold`.
        sim_threshold: see `mask_by_sim`; a cosine, -1 to 1.
        memory_device: where "manual" keeps its tensors; None for the CPU. For "vector_db", a GPU
            that keeps copies of the indexes and rows of as many layers as fit, the deepest first;
            the others, and searches while removed rows wait for `save`, are the CPU's. Needs FAISS
            with GPU support, and for `index` "auto", "Flat" or a plain IVF.
        remove_special_ids: after encoding, drop the rows of special token ids.
        special_ids: the ids dropped; None for all special ids of the tokenizer given to `attach`,
            or, without one, the model's own bos, eos and pad ids.
        stride: tokens between the starts of two encoding windows.
        max_length: tokens in an encoding window, at least `stride`.
        sinks: "all" finds every row. "one" finds the attention sinks (the first rows of a window
            without left context) of the first document only: many documents' sinks hijack
            retrieval.
        carry_context: encode each token once: a window attends to the rows kept of the windows
            before it, instead of reading their tokens again.
        row_codec: how a new store keeps keys and values: "exact", the model's own dtype;
            "float16" or "bfloat16"; "int8" or "int4", quantised. A store that exists keeps the
            codec it has, whatever is said here. "manual" without a path keeps rows exactly, and
            `save` writes them with this codec.
        index: "auto" or a FAISS factory string, for "vector_db".
        recall: share of the attention to the exact ten nearest rows, attention sinks aside, that
            the search of a plain IVF index, such as that of "auto", is calibrated to find; above 0
            and up to 1.
        overfetch: for an index of coarse codes, how many times `topk` candidates are ranked again
            by their exact keys.
        cache_bytes: bytes of RAM for FAISS files and mapped rows while serving, on Linux; None for
            no limit. IVF indexes that take more than half of it stay on the disk, mapped; other
            kinds, and what was added since the last `save`, are in RAM whatever it says.

    Raises:
        ConfigError: a value of a wrong type or out of range.

    Source:
        Klett and Ahle, Extended Mind Transformers (arXiv 2406.02332), for names and defaults;
        `path`, `mode` to `profile`, `layers` and all settings from `sinks` on are ours.
    """

    memory_type: Literal["manual", "vector_db"] = "manual"
    path: str | None = None
    enabled: bool = True
    mode: Literal["token", "passage", "auto"] = "auto"
    recall_rows: int = 384
    recall_passages: int = 3
    routing: Literal["heads", "words", "both"] = "heads"
    relevance: float | None = 0.5
    reroute: int | None = None
    profile: str | None = None
    topk: int | Literal["auto"] = 10
    uncertainty: Uncertainty | None = None
    layers: tuple[int, ...] | None = None
    mask_by_sim: bool = False
    sim_threshold: float = 0.25
    memory_device: str | None = None
    remove_special_ids: bool = True
    special_ids: tuple[int, ...] | None = None
    stride: int = 512
    max_length: int = 3072
    sinks: Literal["all", "one"] = "all"
    carry_context: bool = False
    row_codec: Literal["exact", "float16", "bfloat16", "int8", "int4"] = "exact"
    index: str = "auto"
    recall: float = 0.95
    overfetch: int = 4
    cache_bytes: int | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = _CONVERT.get(field.name, _same)(getattr(self, field.name))
            accepts, what = _ACCEPTS[field.name]
            if not accepts(value):
                raise ConfigError(f"{field.name} must be {what}; got {value!r}.")
            object.__setattr__(self, field.name, value)
        if self.recall_passages > self.recall_rows:
            raise ConfigError(
                f"recall_rows ({self.recall_rows}) must have a row for each of recall_passages "
                f"({self.recall_passages}). Raise the one or lower the other."
            )
        if self.max_length < self.stride:
            raise ConfigError(
                f"max_length ({self.max_length}) must be at least stride ({self.stride}): "
                "shorter windows would leave out the tokens in between. "
                "Raise max_length or lower stride."
            )
        known = 0 if isinstance(self.topk, str) else self.topk
        if self.uncertainty is not None and self.uncertainty.topk <= known:
            raise ConfigError(
                f"uncertainty's topk ({self.uncertainty.topk}) must be above topk ({self.topk}): "
                "a step is redone to retrieve more. Raise the one or lower the other."
            )

    def topk_of(self, num_rows: int) -> int:
        """Return how many memories a query retrieves where there are `num_rows`.

        Source:
            Klett and Ahle, Extended Mind Transformers (arXiv 2406.02332), for "auto".
        """
        if isinstance(self.topk, str):
            return min(max(min(round(num_rows / 500), 12), 4), num_rows)
        return min(self.topk, num_rows)

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some settings changed.

        Raises:
            ConfigError: an unknown name, or a value of a wrong type or out of range.
        """
        _check_names(changes, "settings")
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return all settings as plain YAML types."""
        values = dataclasses.asdict(self)
        return {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Make a config from plain types.

        Raises:
            ConfigError: an unknown key, or a value of a wrong type or out of range.
        """
        _check_names(values, "a memory config")
        return cls(**values)

    @classmethod
    def from_yaml(cls, path: Path | str, *, defaults: Mapping[str, Any] | None = None) -> Self:
        """Read a config; settings that the file does not name are as in `defaults`, or the class.

        Raises:
            ConfigError: the file is missing or not a YAML mapping, or has an unknown key or a wrong
                value.
        """
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"config '{path}' cannot be read as YAML: {reason}") from error
        if values is None:
            values = {}
        if not isinstance(values, dict):
            raise ConfigError(
                f"config '{path}' must be a mapping of settings; got a {type(values).__name__}."
            )
        try:
            return cls.from_dict({**(defaults or {}), **values})
        except ConfigError as error:
            raise ConfigError(f"config '{path}': {error}") from error

    def to_yaml(self, path: Path | str) -> None:
        """Write all settings to a file that `from_yaml` reads."""
        Path(path).write_text(yaml.safe_dump(self.to_dict(), sort_keys=False), encoding="utf-8")


def _check_names(values: Mapping[str, Any], what: str) -> None:
    names = [field.name for field in dataclasses.fields(MemoryConfig)]
    for key in values:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1, cutoff=0.5)
            hint = f" Did you mean '{near[0]}'?" if near else f" The keys are {', '.join(names)}."
            raise ConfigError(f"unknown key {key!r} in {what}.{hint}")


def _same(value: Any) -> Any:
    return value


def _ints_to_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _path_to_str(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _mapping_to_uncertainty(value: Any) -> Any:
    return Uncertainty.from_mapping(value) if isinstance(value, Mapping) else value


def _int_to_float(value: Any) -> Any:
    return float(value) if _is_int(value) else value


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_positive(value: Any) -> bool:
    return _is_int(value) and value > 0


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_none_or_positive(value: Any) -> bool:
    return value is None or _is_positive(value)


def _is_share(value: Any) -> bool:
    return isinstance(value, float) and 0 < value <= 1


def _is_none_or_text(value: Any) -> bool:
    return value is None or _is_text(value)


def _is_none_or_ids(value: Any) -> bool:
    return value is None or (isinstance(value, tuple) and all(_is_int(i) and i >= 0 for i in value))


def _is_none_or_layers(value: Any) -> bool:
    return value is None or (_is_none_or_ids(value) and len(value) > 0)


def _is_none_or_device(value: Any) -> bool:
    if not _is_none_or_text(value):
        return False
    try:
        torch.device(value or "cpu")
    except RuntimeError:
        return False
    return True


_CONVERT: dict[str, Callable[[Any], Any]] = {
    "layers": _ints_to_tuple,
    "special_ids": _ints_to_tuple,
    "path": _path_to_str,
    "profile": _path_to_str,
    "uncertainty": _mapping_to_uncertainty,
    "sim_threshold": _int_to_float,
    "relevance": _int_to_float,
    "recall": _int_to_float,
}
_ACCEPTS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "memory_type": (lambda v: v in ("manual", "vector_db"), "'manual' or 'vector_db'"),
    "path": (_is_none_or_text, "a directory name or null"),
    "enabled": (_is_bool, "true or false"),
    "mode": (lambda v: v in ("token", "passage", "auto"), "'token', 'passage' or 'auto'"),
    "recall_rows": (_is_positive, "a whole number of at least 1"),
    "recall_passages": (_is_positive, "a whole number of at least 1"),
    "routing": (lambda v: v in ("heads", "words", "both"), "'heads', 'words' or 'both'"),
    "relevance": (
        lambda v: v is None or (isinstance(v, float) and math.isfinite(v)),
        "a number of standard deviations, or null",
    ),
    "reroute": (_is_none_or_positive, "a whole number of at least 1, or null"),
    "profile": (_is_none_or_text, "a file name or null"),
    "topk": (
        lambda v: _is_positive(v) or v == "auto",
        "a whole number of at least 1, or 'auto'",
    ),
    "uncertainty": (
        lambda v: v is None or isinstance(v, Uncertainty),
        "a mapping of entropy and topk, or null",
    ),
    "layers": (_is_none_or_layers, "a list of at least one layer index (0, 1, ...) or null"),
    "mask_by_sim": (_is_bool, "true or false"),
    "sim_threshold": (lambda v: isinstance(v, float) and -1 <= v <= 1, "a cosine, -1 to 1"),
    "memory_device": (_is_none_or_device, "a torch device such as 'cpu' or 'cuda:0', or null"),
    "remove_special_ids": (_is_bool, "true or false"),
    "special_ids": (_is_none_or_ids, "a list of token ids or null"),
    "stride": (_is_positive, "a whole number of at least 1"),
    "max_length": (_is_positive, "a whole number of at least 1"),
    "sinks": (lambda v: v in ("all", "one"), "'all' or 'one'"),
    "carry_context": (_is_bool, "true or false"),
    "row_codec": (
        lambda v: v in ("exact", "float16", "bfloat16", "int8", "int4"),
        "'exact', 'float16', 'bfloat16', 'int8' or 'int4'",
    ),
    "index": (_is_text, "'auto' or a FAISS factory string"),
    "recall": (_is_share, "a share above 0 and up to 1"),
    "overfetch": (_is_positive, "a whole number of at least 1"),
    "cache_bytes": (_is_none_or_positive, "a number of bytes of at least 1, or null"),
}
