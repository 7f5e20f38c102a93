"""`HeadProfile`: the few heads of a model that know which passage is meant, and how to ask them.

Source: Wu et al., Retrieval Head Mechanistically Explains Long-Context Factuality (arXiv
2404.15574): few heads of a model retrieve, whatever the text.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from emt.errors import ConfigError
from memory_backends import MemoryLayout

VERSION = 1


@dataclass(frozen=True)
class ProfiledHead:
    """A query head that retrieves.

    Attributes:
        layer: the model's layer.
        head: which of its query heads.
        hit_rate: share of the questions of the profile whose passage this head alone named first.
    """

    layer: int
    head: int
    hit_rate: float


@dataclass(frozen=True, eq=False)
class HeadProfile:
    """Which heads route, and how their queries are made comparable.

    Attributes:
        model: a name, for people.
        weights: fingerprint of the weights it was found with.
        heads: the best first.
        means: (n, D) float32, the mean unit query of each head over many questions. What all
            questions have in common says nothing about what is asked, so it is taken off.
        distance: tokens; all queries are turned as if they stood so far behind a memory, so that a
            long prompt asks like a short one.
        source: what it was made from, for people.
    """

    model: str
    weights: str
    heads: tuple[ProfiledHead, ...]
    means: Tensor
    distance: int
    source: str = ""

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers with such heads, ascending."""
        return tuple(sorted({head.layer for head in self.heads}))

    @property
    def fingerprint(self) -> str:
        """What tells this profile from others."""
        written = json.dumps(self.to_json(), sort_keys=True)
        return hashlib.sha256(written.encode()).hexdigest()[:16]

    def key_value_heads(
        self, num_query_heads: Mapping[int, int], layout: MemoryLayout
    ) -> dict[int, list[int]]:
        """Return the KV heads that are searched: layer -> heads, ascending.

        Args:
            num_query_heads: layer -> its query heads.
            layout: the shape of the memory.
        """
        found: dict[int, set[int]] = {}
        for head in self.heads:
            group = num_query_heads[head.layer] // layout.layers[head.layer].num_key_value_heads
            found.setdefault(head.layer, set()).add(head.head // group)
        return {layer: sorted(heads) for layer, heads in sorted(found.items())}

    def to_json(self) -> dict[str, Any]:
        """Return the profile as plain JSON types."""
        return {
            "version": VERSION,
            "model": self.model,
            "weights": self.weights,
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
            ConfigError: it is something else, or of a newer version.
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
            distance = int(data["distance"])
            if distance < 0:
                raise ValueError(f"a distance of {distance}")
            return cls(
                str(data["model"]),
                str(data["weights"]),
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
            ConfigError: it cannot be read, or is none.
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
            ConfigError: it cannot be written.
        """
        try:
            Path(path).write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"head profile '{path}' cannot be written: {error}") from error

    def check(self, num_query_heads: Mapping[int, int], layout: MemoryLayout) -> None:
        """Refuse a profile of a model of other shape.

        Args:
            num_query_heads: layer -> its query heads.
            layout: the shape of the memory.

        Raises:
            ConfigError: saying what does not fit.
        """
        for head in self.heads:
            layer = layout.layers.get(head.layer)
            if layer is None or not 0 <= head.head < num_query_heads.get(head.layer, 0):
                raise ConfigError(
                    f"the profile of {self.model} names layer {head.layer}, head {head.head}; this "
                    "model has no such head. Make a profile of it with `emt profile`."
                )
            if layer.head_dim != self.means.shape[1]:
                raise ConfigError(
                    f"the profile of {self.model} is of heads with {self.means.shape[1]} dims; "
                    f"this model's have {layer.head_dim}. Make one of it with `emt profile`."
                )


@functools.cache
def shipped_profiles() -> dict[str, HeadProfile]:
    """Return the profiles that come with emt, by the fingerprint of their weights."""
    folder = resources.files("emt.profiles") / "shipped"
    if not folder.is_dir():
        return {}
    found = [
        HeadProfile.from_json(json.loads(file.read_text(encoding="utf-8")))
        for file in folder.iterdir()
        if file.name.endswith(".json")
    ]
    return {profile.weights: profile for profile in found}
