"""What a memory of many tokens costs: bytes, hours, machines and dollars. docs/scale.md has it.

    python scripts/cost_model.py                                   # print the tables
    python scripts/cost_model.py --write                           # put them into docs/scale.md
    python scripts/cost_model.py --gpu-dollars 1.90 --utilisation 0.3

Formulas are those of docs/scale.md; every price and speed is an `Assumptions` field and an option.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent.parent / "docs" / "scale.md"
BEGIN, END = "<!-- tables: scripts/cost_model.py --write -->", "<!-- end of tables -->"
TOKENS = (10**8, 10**9, 10**10)
CODECS = ("exact", "float16", "int8", "int4", "text")
LIST_ID_BYTES = 8  # FAISS's id of a key in an IVF list
STEP_BYTES = 2  # of a key that is kept in 8 bits a number


@dataclass(frozen=True)
class Model:
    """The shape of a model.

    Attributes:
        parameters: of all weights that a token is multiplied with.
        itemsize: bytes of a number of its keys and values.
        searched_heads: KV heads of its head profile.
        gpus: that hold it in half precision.
    """

    name: str
    layers: int
    kv_heads: int
    head_dim: int
    itemsize: int
    parameters: float
    searched_heads: int
    gpus: int = 1

    def row_bytes(self, codec: str) -> int:
        """Return what the store's files of rows take of one token."""
        heads, numbers = self.layers * self.kv_heads, 2 * self.head_dim  # a key and a value
        if codec == "text":
            return self.searched_heads * (self.head_dim + STEP_BYTES)
        of_head = {
            "exact": numbers * self.itemsize,
            "float16": 2 * numbers,
            "int8": numbers + 2,
            "int4": numbers // 2,
        }
        return heads * of_head[codec]

    @property
    def index_bytes(self) -> int:
        """What the FAISS files of the searched heads take of one token."""
        return self.searched_heads * (2 * self.head_dim + LIST_ID_BYTES)


MODELS = (
    Model("SmolLM2-135M", 30, 3, 64, 4, 135e6, 5),
    Model("Llama-3.1-8B", 32, 8, 128, 2, 8e9, 8),
    Model("Llama-3.1-70B", 80, 8, 128, 2, 70e9, 8, gpus=4),
)


def assumed(default: float, meaning: str) -> Any:
    """Return a field with what it means and where it is from."""
    return field(default=default, metadata={"meaning": meaning})


@dataclass(frozen=True)
class Assumptions:
    """Prices and speeds, which nobody has measured for you."""

    gpu_dollars: float = assumed(
        2.69, "dollars of one H100 SXM and hour (assumed; RunPod's by a blog of 22 May 2026)"
    )
    gpu_flops: float = assumed(
        989e12, "operations a second of it, dense bfloat16 (NVIDIA's figure, by secondary pages)"
    )
    utilisation: float = assumed(
        0.4, "share of them that reading long documents reaches (usual for 8B and more; assumed)"
    )
    most_tokens: float = assumed(
        50_000, "tokens that one process reads a second at most, however small the model (assumed)"
    )
    write_bytes: float = assumed(
        1e9, "bytes that one machine writes a second (a local NVMe disk; assumed)"
    )
    disk_dollars: float = assumed(
        0.08, "dollars of a gigabyte and month (assumed, as for cloud block storage)"
    )
    disk_bytes: float = assumed(8e12, "bytes of the disk of a machine (assumed)")
    ram_bytes: float = assumed(256e9, "bytes of its RAM that FAISS files may take (assumed)")
    machine_gpus: int = assumed(8, "GPUs of a machine that reads (assumed)")
    text_bytes: float = assumed(
        20,
        "bytes of text, tokens and offsets in the catalogue, a token (measured, English, SmolLM2)",
    )


@dataclass(frozen=True)
class Cost:
    """What a memory costs.

    Attributes:
        bytes: on the disks.
        index_bytes: of them, which are read for every question.
        gpu_hours: to read the documents.
        machines: that hold disks and index.
        read_dollars: once.
        disk_dollars: a month.
    """

    bytes: float
    index_bytes: float
    gpu_hours: float
    machines: int
    read_dollars: float
    disk_dollars: float


def cost(model: Model, codec: str, tokens: float, given: Assumptions) -> Cost:
    """Return what a memory of so many tokens costs; docs/scale.md explains each line."""
    row = model.row_bytes(codec)
    index = tokens * model.index_bytes
    total = tokens * (row + given.text_bytes) + index
    speed = model.gpus * given.gpu_flops * given.utilisation / (2 * model.parameters)
    seconds = tokens / min(speed, given.most_tokens)  # of one model, on its GPUs
    writers = given.machine_gpus / model.gpus  # models that share a machine's disk
    seconds = max(seconds, tokens * row * writers / given.write_bytes)
    hours = seconds * model.gpus / 3600
    machines = max(math.ceil(total / given.disk_bytes), math.ceil(index / given.ram_bytes))
    return Cost(
        total,
        index,
        hours,
        machines,
        hours * given.gpu_dollars,
        total / 1e9 * given.disk_dollars,
    )


def tables(given: Assumptions) -> str:
    """Return what is assumed and what follows, in Markdown."""
    parts = [_table(["assumption", "value", "what"], _assumptions(given))]
    rows = [
        [model.name, *(f"{model.row_bytes(codec):,}" for codec in CODECS), f"{model.index_bytes:,}"]
        for model in MODELS
    ]
    parts += ["Bytes a token:", _table(["model", *CODECS, "index"], rows)]
    head = ["model", "rows", "disks", "GPU hours", "read once", "disks, a month", "machines"]
    for tokens in TOKENS:
        rows = [
            [model.name, codec, *_cells(cost(model, codec, tokens, given))]
            for model in MODELS
            for codec in CODECS
            if codec != "exact" or model.itemsize != 2  # else float16's bytes
        ]
        parts += [f"{tokens:,} tokens:", _table(head, rows)]
    return "\n\n".join(parts)


def _assumptions(given: Assumptions) -> list[list[str]]:
    return [
        [each.name, f"{getattr(given, each.name):,.6g}", each.metadata["meaning"]]
        for each in dataclasses.fields(given)
    ]


def _cells(of: Cost) -> list[str]:
    return [
        _size(of.bytes),
        f"{of.gpu_hours:,.1f}" if of.gpu_hours < 100 else f"{of.gpu_hours:,.0f}",
        f"${of.read_dollars:,.0f}",
        f"${of.disk_dollars:,.0f}",
        f"{of.machines:,}",
    ]


def _size(num_bytes: float) -> str:
    for unit, scale in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:,.1f} {unit}"
    return f"{num_bytes / 1e6:,.0f} MB"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def written(text: str, given: Assumptions) -> str:
    """Return the page with the tables in their place."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{tables(given)}\n\n{END}{after}"


def main() -> None:
    """Print the tables, or write them into the page."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--write", action="store_true", help="put the tables into docs/scale.md")
    for each in dataclasses.fields(Assumptions):
        parser.add_argument(
            f"--{each.name.replace('_', '-')}",
            type=type(each.default),
            default=each.default,
            help=each.metadata["meaning"].replace("%", "%%"),
        )
    options = vars(parser.parse_args())
    write = options.pop("write")
    given = Assumptions(**options)
    if write:
        DOCS.write_text(written(DOCS.read_text(encoding="utf-8"), given), encoding="utf-8")
    else:
        print(tables(given))


if __name__ == "__main__":
    main()
