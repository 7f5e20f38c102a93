"""`MemoryConfig`: every setting of a memory, checked when it is made."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch

from emt.config import yaml_form
from emt.config.model_config import GROUP
from emt.config.setting import check_names, documented, setting, settings_of
from emt.config.uncertainty import Uncertainty
from emt.errors import ConfigError
from memory_backends import memory_types

_RowCodec = Literal["auto", "exact", "float16", "bfloat16", "int8", "int5.5", "int4", "text"]


def _is_device(name: str) -> bool:
    try:
        torch.device(name)
    except RuntimeError:
        return False
    return True


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """Settings of a memory.

    Raises:
        ConfigError: a value of a wrong type or out of range.

    Source:
        Klett and Ahle, Extended Mind Transformers (arXiv 2406.02332), for the names of the settings
        that have a published name, and for `PUBLISHED_METHOD`; the others are ours.
    """

    memory_type: str = setting(
        "manual",
        "'manual' keeps rows as tensors and searches them exactly; 'vector_db' keeps them in a "
        "store on disk, searched by FAISS; 'sharded' makes a store of several such, which are "
        "searched at the same time. A sharded store is opened as such whatever is said here: "
        "'manual' or 'vector_db' is how its shards are searched. Others can be registered with "
        "memory_backends.register_searcher.",
        published=("memory_type",),
        values="'manual', 'vector_db', 'sharded' or the name of a registered searcher",
        accepts=lambda name: name in memory_types(),
    )
    path: str | None = setting(
        None,
        "The store's directory: opened if it exists, else made by the first write. null keeps the "
        "memory for the life of the process only. The command line sets it with --store.",
        values="a directory name",
    )
    enabled: bool = setting(
        True,
        "Whether the model reads its memories. false for the plain model; the memories are kept.",
        changeable=True,
        published=("use_external_mind",),
    )
    mode: Literal["token", "passage", "auto"] = setting(
        "auto",
        "'passage' finds the passages that a prompt is about, and lets every layer attend to their "
        "rows in order. 'token' is the published method: each query retrieves single memories. "
        "'auto' is 'passage' wherever passages can be found: with a head profile of the model (emt "
        "profile), or by words, which need a tokenizer.",
        changeable=True,
        as_published="token",
    )

    stride: int = setting(
        512,
        "Tokens between the starts of two encoding windows.",
        group="reading",
        published=("stride",),
    )
    max_length: int | Literal["auto"] = setting(
        "auto",
        "Tokens in an encoding window: at least stride, at most the model's positions. 'auto' for "
        "3072, or the model's positions where those are fewer; a stride that is too long for them "
        "is shortened.",
        group="reading",
        published=("max_length",),
        as_published=3072,
    )
    carry_context: bool | Literal["auto"] = setting(
        "auto",
        "Encode each token once: a window attends to the rows kept of the windows before it, "
        "instead of reading their tokens again. 'auto' where the model allows it.",
        group="reading",
        as_published=False,
    )
    remove_special_ids: bool = setting(
        True,
        "Drop the rows of special tokens after encoding.",
        group="reading",
        published=("remove_special_ids", "remove_special_tokens"),
    )
    special_ids: tuple[int, ...] | None = setting(
        None,
        "Which ids are special. null for all special ids of the tokenizer given to attach, or the "
        "model's own bos, eos and pad ids without a tokenizer.",
        group="reading",
        published=("tokenizer_all_special_ids",),
        values="a list of token ids",
    )

    topk: int | Literal["auto"] = setting(
        4,
        "Memories that each query attends to, at every layer and head. 'auto' for one in 500 "
        "of those in the memory, at least 4 and at most 12.",
        group="token",
        changeable=True,
        published=("topk",),
        as_published=10,
    )
    uncertainty: Uncertainty | None = setting(
        None,
        "Redo a step of generate whose next-token entropy is above entropy (in nats) with more "
        "memories: topk of them, which must be above the setting topk. For example "
        "{entropy: 1.0, topk: 12}. null for never.",
        group="token",
        changeable=True,
        values="a mapping of entropy and topk",
    )
    layers: tuple[int, ...] | None = setting(
        None,
        "Model layers that read memories, such as [15, 16, 17]. null for every full-attention "
        "layer.",
        group="token",
        changeable=True,
        published=("use_external_mind_by_layer",),
        values="a list of at least one layer index (0, 1, ...)",
        accepts=bool,
    )
    heads: Literal["all", "profile"] = setting(
        "all",
        "Which query heads of these layers read memories. 'profile' for those of the head profile "
        "only: few, which find what is asked about. The others attend to the local context, so a "
        "step is hardly slower than the plain model's, text that the memory has nothing about "
        "stays nearly as it was, and only their KV heads have an index. All heads until there is a "
        "head profile of the model, which save makes.",
        group="token",
        changeable=True,
    )
    mask_by_sim: bool = setting(
        False,
        "Leave out retrieved memories whose cosine similarity is not above sim_threshold.",
        group="token",
        changeable=True,
        published=("mask_by_sim",),
    )
    sim_threshold: float = setting(
        0.25,
        "The cosine similarity that mask_by_sim goes by.",
        group="token",
        changeable=True,
        published=("sim_threshold",),
        values="a cosine, -1 to 1",
        accepts=lambda cosine: -1 <= cosine <= 1,
    )

    routing: Literal["all", "words", "values", "heads", "both"] = setting(
        "all",
        "What finds passages: 'words' (BM25 over the stored text), 'values' (means of the stored "
        "values of late layers, which find other words for the same), 'heads' (the model's "
        "retrieval heads), 'both' (words and heads) or 'all' three. Until there is a head profile "
        "of the model, 'both' and 'all' do without heads.",
        group="passage",
        changeable=True,
    )
    passage_rows: int = setting(
        384,
        "Rows of all passages of a prompt together, at most; half of them where only one of "
        "several places is likely.",
        group="passage",
        changeable=True,
    )
    max_passages: int = setting(
        3,
        "Passages of a prompt, at most. Places near each other make one passage, and the best "
        "passage is the longest.",
        group="passage",
        changeable=True,
    )
    candidates: int = setting(
        12,
        "Places found that are judged by asking back: how likely the question is after the stored "
        "rows of each. They are put in order by that, too. 0 for none: then every prompt is given "
        "passages, in the order in which they were found.",
        group="passage",
        changeable=True,
        values="a whole number of at least 0",
        accepts=lambda count: count >= 0,
    )
    relevance: float | None = setting(
        2.0,
        "Recall passages only for prompts that one of them makes likelier by at least so much, in "
        "nats a token, as the mean of the three tokens that gain most. Below 4, what passages of "
        "other documents explain as well is taken off. Other prompts are answered by the plain "
        "model. null recalls passages for every prompt.",
        group="passage",
        changeable=True,
        values="a number of nats",
        accepts=math.isfinite,
    )
    reroute: int | None = setting(
        None,
        "Find passages again after every so many generated tokens, with what was generated. If "
        "they are about something else, they replace the recalled ones, row for row. Needs one "
        "sequence for each prompt, and a cache. null for never.",
        group="passage",
        changeable=True,
    )
    profile: str | None = setting(
        None,
        "File of the head profile. null for the store's own, else the model's: one that is in the "
        "user's cache or comes with emt.",
        group="passage",
        values="a file name",
    )

    index: str = setting(
        "auto",
        "For 'vector_db': a FAISS factory string, such as 'Flat' (exact), 'IVF1024,SQfp16' or "
        "'HNSW32'. 'auto' is exact while the memory is small, and IVF in a larger one.",
        group="search",
        values="'auto' or a FAISS factory string",
    )
    search_recall: float = setting(
        0.95,
        "Share of the attention to the exact ten nearest rows, attention sinks aside, that the "
        "search of a plain IVF index, such as that of 'auto', is calibrated to find.",
        group="search",
        values="a share above 0 and up to 1",
        accepts=lambda share: 0 < share <= 1,
    )
    overfetch: int = setting(
        4,
        "For an index of coarse codes: how many times topk candidates are ranked again by their "
        "exact keys.",
        group="search",
    )
    sinks: Literal["all", "one"] = setting(
        "one",
        "Which attention sinks (rows that are attended to whatever is asked, as measured when a "
        "document is read) are found. 'all' for every row, as published; 'one' for those of the "
        "first document only, since the sinks of many documents hijack retrieval.",
        group="search",
        as_published="all",
    )

    row_codec: _RowCodec = setting(
        "auto",
        "How a new store keeps keys and values: in the model's own dtype ('exact'), as 'float16' "
        "or 'bfloat16', or quantised to so many bits a number ('int8', 'int4'; 'int5.5' for mode "
        "passage). 'text' keeps none of them, only text, tokens and the keys of the heads that are "
        "searched, some 1 to 3 % of the bytes: the model reads recalled passages again, which "
        "takes longer before the first token; it needs mode passage, and does not find by "
        "'values'. 'auto' is 'float16' for a model in float32, else 'exact'. A store that exists "
        "keeps its codec. 'manual' without a path keeps rows exactly, and save writes them with "
        "this codec.",
        group="store",
        as_published="exact",
    )
    reread_context: int = setting(
        128,
        "For a 'text' store: tokens before a part of a passage that are read with it, besides its "
        "document's first four. More is slower, and nearer to what a store that keeps rows has.",
        group="store",
        values="a whole number of at least 0",
        accepts=lambda count: count >= 0,
    )
    reread_bytes: int = setting(
        2**30,
        "For a 'text' store: bytes of RAM for the rows of passages that were read again, those "
        "that were used last. They need not be read when they are asked for once more.",
        group="store",
        values="a number of bytes of at least 0",
        accepts=lambda count: count >= 0,
    )
    memory_device: str | None = setting(
        None,
        "Where 'manual' keeps its tensors; null for the CPU. For 'vector_db', a GPU that keeps "
        "copies of the indexes and rows of as many layers as fit, the deepest first. The CPU "
        "searches the other layers, and all while removed rows wait for save. Needs FAISS with GPU "
        "support (emt[gpu]), and as index 'auto', 'Flat' or a plain IVF.",
        group="store",
        published=("memory_device",),
        values="a torch device such as 'cpu' or 'cuda:0'",
        accepts=_is_device,
    )
    cache_bytes: int | None = setting(
        None,
        "Bytes of RAM for FAISS files and mapped rows while serving, on Linux. IVF indexes that "
        "take more than half of it stay on the disk, mapped. Other kinds of index, and what was "
        "added since the last save, are in RAM whatever the limit. null for no limit.",
        group="store",
        values="a number of bytes of at least 1",
    )
    num_shards: int = setting(
        4,
        "For 'sharded': how many shards a new store has. It never changes. "
        "The command line sets it with --shards.",
        group="store",
    )
    missing_shards: Literal["error", "warn"] = setting(
        "error",
        "What to do when a shard of a sharded store is not there, is damaged, or does not answer: "
        "'error', or 'warn' to answer from the others and say which are missing.",
        group="store",
    )
    shard_seconds: float | None = setting(
        None,
        "Seconds that a shard has to answer before it counts as missing; null for no limit.",
        group="store",
        values="a number of seconds above 0",
        accepts=lambda seconds: 0 < seconds < math.inf,
    )
    ray: str | None = setting(
        None,
        "Search the shards of a sharded store in Ray actors: 'local' starts Ray on this machine, "
        "'auto' or an address joins a cluster. null opens them in this process. Needs emt[ray].",
        group="store",
        values="an address, 'auto' or 'local'",
    )
    remote_token_mode: bool = setting(
        False,
        "Allow token mode over shards in Ray actors, which sends messages at every layer of every "
        "step.",
        group="store",
    )

    def __post_init__(self) -> None:
        for name, each in SETTINGS.items():
            object.__setattr__(self, name, each.checked(getattr(self, name)))
        if self.max_passages > self.passage_rows:
            raise ConfigError(
                f"passage_rows ({self.passage_rows}) must have a row for each of max_passages "
                f"({self.max_passages}). Raise the one or lower the other."
            )
        if isinstance(self.max_length, int) and self.max_length < self.stride:
            raise ConfigError(
                f"max_length ({self.max_length}) must be at least stride ({self.stride}): "
                "shorter windows would leave out the tokens in between. "
                "Raise max_length or lower stride."
            )
        if self.ray is not None and self.mode == "token" and not self.remote_token_mode:
            raise ConfigError(
                "token mode over shards in Ray actors (`ray`) waits for messages at every layer of "
                "every step. Use passage mode, or set remote_token_mode to true."
            )
        topk = 0 if isinstance(self.topk, str) else self.topk
        if self.uncertainty is not None and self.uncertainty.topk <= topk:
            raise ConfigError(
                f"uncertainty's topk ({self.uncertainty.topk}) must be above topk ({self.topk}): "
                "a step is redone to retrieve more. Raise the one or lower the other."
            )

    @property
    def voices(self) -> frozenset[str]:
        """What finds passages: some of "words", "values" and "heads"."""
        several = {"all": ("words", "values", "heads"), "both": ("words", "heads")}
        return frozenset(several.get(self.routing, (self.routing,)))

    def topk_of(self, num_rows: int) -> int:
        """Return how many memories a query retrieves where there are `num_rows`.

        Source:
            Klett and Ahle, Extended Mind Transformers (arXiv 2406.02332), for "auto".
        """
        if isinstance(self.topk, str):
            return min(max(min(round(num_rows / 500), 12), 4), num_rows)
        return min(self.topk, num_rows)

    @classmethod
    def published(cls, **settings: Any) -> Self:
        """Return the settings of the published method, except for those that are given.

        Raises:
            ConfigError: an unknown name, or a value of a wrong type or out of range.
        """
        return cls.from_dict(settings, defaults=PUBLISHED_METHOD)

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some settings changed.

        Raises:
            ConfigError: an unknown name, or a value of a wrong type or out of range.
        """
        check_names(changes, SETTINGS)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return all settings as plain YAML types, flat."""
        values = dataclasses.asdict(self)
        return {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any], *, defaults: Mapping[str, Any] | None = None
    ) -> Self:
        """Make a config from plain types: settings in their groups, as in YAML, or flat.

        Args:
            values: settings.
            defaults: settings by name, which hold where `values` say nothing.

        Raises:
            ConfigError: an unknown key, one in a wrong group or given twice, or a value of a wrong
                type or out of range.
        """
        settings = {**(defaults or {}), **yaml_form.flat(values, SETTINGS)}
        check_names(settings, SETTINGS)
        return cls(**settings)

    @classmethod
    def from_yaml(cls, path: Path | str, *, defaults: Mapping[str, Any] | None = None) -> Self:
        """Read a config; settings that the file does not name are as in `defaults`, or the class.

        Args:
            path: a file as `to_yaml` writes it; settings may also stand at its top level. A group
                `model` is for the command line (`ModelConfig`).
            defaults: settings by name.

        Raises:
            ConfigError: the file is missing or not a YAML mapping, or what `from_dict` refuses.
        """
        values = yaml_form.load(path)
        values.pop(GROUP, None)
        try:
            return cls.from_dict(values, defaults=defaults)
        except ConfigError as error:
            raise ConfigError(f"config '{path}': {error}") from error

    def to_yaml(self, path: Path | str) -> None:
        """Write all settings, explained and in their groups, to a file that `from_yaml` reads."""
        Path(path).write_text(yaml_form.dump(self.to_dict(), SETTINGS), encoding="utf-8")


SETTINGS = settings_of(MemoryConfig)
"""The settings by name, in the order in which `MemoryConfig` declares them."""

PUBLISHED_METHOD = {
    name: each.as_published for name, each in SETTINGS.items() if each.as_published is not None
}
"""The settings of the published method, where the defaults differ from it."""

MemoryConfig.__doc__ = documented(MemoryConfig.__doc__ or "", SETTINGS)
