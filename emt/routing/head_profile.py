"""`HeadProfile`: the few heads of a model that tell which passage a prompt is about.

Source: Wu et al., Retrieval Head Mechanistically Explains Long-Context Factuality (arXiv
2404.15574): few heads of a model retrieve, whatever the text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from emt.errors import ConfigError
from memory_backends import MemoryLayout
from memory_backends.store.sketch import Sketch

VERSION = 2


@dataclass(frozen=True)
class ProfiledHead:
    """A retrieval head: the query head `head` of a layer.

    Attributes:
        hit_rate: share of the questions of the profile whose passage this head alone ranked first.
    """

    layer: int
    head: int
    hit_rate: float


@dataclass(frozen=True, eq=False)
class HeadProfile:
    """Which heads route, and how their queries are made comparable.

    Attributes:
        model: the model's name, for people.
        sketch: of the weights that the heads were ranked with, by which the profile is found for
            the same model in another form; None if nothing is known of them.
        heads: the best first.
        means: (n, D) float32, the mean unit query of each head over many questions. What all
            questions have in common says nothing about their subjects, so it is subtracted.
        distance: tokens; all queries are rotated as if they stood so far behind a memory, so that
            the length of a prompt does not matter.
        source: which questions the heads were ranked by, for people.
    """

    model: str
    sketch: Sketch | None
    heads: tuple[ProfiledHead, ...]
    means: Tensor
    distance: int
    source: str = ""

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers of these heads, ascending."""
        return tuple(sorted({head.layer for head in self.heads}))

    @property
    def fingerprint(self) -> str:
        """A hash of all that is written of the profile, 16 hexadecimal digits."""
        text = json.dumps(self.to_json(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def groups(
        self, query_heads: Mapping[int, int], layout: MemoryLayout
    ) -> dict[tuple[int, int], list[tuple[int, Tensor]]]:
        """Return the profile's heads by the KV head that they share, in order of layers.

        Args:
            query_heads: layer -> how many query heads the model has there.
            layout: of the memory.

        Returns:
            (layer, KV head) -> (query head, its mean (D,)) of each head of the profile, best first.
        """
        groups: dict[tuple[int, int], list[tuple[int, Tensor]]] = {}
        for head, mean in zip(self.heads, self.means, strict=True):
            size = query_heads[head.layer] // layout.layers[head.layer].num_key_value_heads
            groups.setdefault((head.layer, head.head // size), []).append((head.head, mean))
        return dict(sorted(groups.items(), key=lambda item: item[0]))

    def key_value_heads(
        self, query_heads: Mapping[int, int], layout: MemoryLayout
    ) -> dict[int, list[int]]:
        """Return the KV heads that are searched: layer -> heads, ascending."""
        kv_heads: dict[int, list[int]] = {}
        for layer_idx, kv_head in self.groups(query_heads, layout):
            kv_heads.setdefault(layer_idx, []).append(kv_head)
        return kv_heads

    def to_json(self) -> dict[str, Any]:
        """Return the profile as plain JSON types."""
        return {
            "version": VERSION,
            "model": self.model,
            "sketch": None if self.sketch is None else self.sketch.to_json(),
            "source": self.source,
            "distance": self.distance,
            "heads": [
                {
                    "layer": head.layer,
                    "head": head.head,
                    "hit_rate": round(head.hit_rate, 4),
                    "mean": [round(value, 4) for value in mean],
                }
                for head, mean in zip(self.heads, self.means.tolist(), strict=True)
            ],
        }

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """Read what `to_json` wrote.

        Raises:
            ConfigError: `data` is something else, or of another version.
        """
        version = data.get("version") if isinstance(data, dict) else None
        if isinstance(version, int) and version != VERSION:
            raise ConfigError(
                f"expected a head profile of version {VERSION}; got {version!r}. Make it again "
                "with `emt profile`."
            )
        try:
            if version != VERSION:
                raise ValueError(f"version {version!r:.40}")
            heads = data["heads"]
            means = torch.tensor([head["mean"] for head in heads], dtype=torch.float32)
            if means.ndim != 2 or not bool(torch.isfinite(means).all()):
                raise ValueError("the means of its heads differ in length, or are not numbers")
            sketch = None if data["sketch"] is None else Sketch.from_json(data["sketch"])
            distance = int(data["distance"])
            if distance < 0:
                raise ValueError(f"a distance of {distance}")
            return cls(
                str(data["model"]),
                sketch,
                tuple(
                    ProfiledHead(int(head["layer"]), int(head["head"]), float(head["hit_rate"]))
                    for head in heads
                ),
                means,
                distance,
                str(data.get("source", "")),
            )
        except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ConfigError(
                f"this is no head profile ({reason:.200}). Make one with `emt profile`."
            ) from error

    @classmethod
    def read(cls, path: Path | str) -> Self:
        """Read a profile's file.

        Raises:
            ConfigError: the file cannot be read, or has no profile.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ConfigError(f"head profile '{path}' cannot be read: {error}") from error
        try:
            return cls.from_json(data)
        except ConfigError as error:
            raise ConfigError(f"'{path}': {error}") from error

    def write(self, path: Path | str) -> None:
        """Write the profile to a file that `read` reads.

        Raises:
            ConfigError: the file cannot be written.
        """
        try:
            Path(path).write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"head profile '{path}' cannot be written: {error}") from error

    def check(self, query_heads: Mapping[int, int], layout: MemoryLayout) -> None:
        """Refuse a profile of a model of another shape; arguments are those of `groups`.

        Raises:
            ConfigError: a head of the profile does not exist, or has another size.
        """
        for head in self.heads:
            layer = layout.layers.get(head.layer)
            if layer is None or not 0 <= head.head < query_heads.get(head.layer, 0):
                raise ConfigError(
                    f"the profile of {self.model} names layer {head.layer}, head {head.head}; this "
                    "model has no such head. Make a profile of it with `emt profile`."
                )
            if layer.head_dim != self.means.shape[1]:
                raise ConfigError(
                    f"the profile of {self.model} is of heads with {self.means.shape[1]} dims; "
                    f"this model's have {layer.head_dim}. Make one of it with `emt profile`."
                )
