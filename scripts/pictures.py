"""Draw the pictures of docs/benchmarks.md from what is measured: `make pictures`.

    python scripts/pictures.py [FOLDER]

* `quality.svg`: right answers and found passages, from the results of `comparison`;
* `cost.svg`: decode steps over rows, from the table of benchmarks/store.md;
* `bytes.svg`: bytes of a million tokens by codec, as the codecs count them.

Grey text and colours that colour-blind readers tell apart stand on no ground of their own, so that
they are read on light and on dark pages.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import matplotlib as mpl
import matplotlib.pyplot as plt
from experiments.results import read_results
from experiments.statistics import mean_interval

from memory_backends.layout import LayerLayout, MemoryLayout
from memory_backends.rows.coding import record_bytes

ROOT = Path(__file__).parent.parent
GREY = "#808080"
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7")  # of Okabe and Ito
HATCHES = ("", "//", "..", "xx")
MODELS = {  # layers, KV heads, dims of a head
    "SmolLM2-135M": (30, 3, 64),
    "Qwen2.5-0.5B": (24, 2, 64),
    "Qwen2.5-1.5B": (28, 2, 128),
    "Llama-3-8B": (32, 8, 128),
}
CODECS = ("float16", "int8", "int5.5", "int4")
RESULTS = {
    "SmolLM2-135M\nSQuAD, 55k tokens": ("comparison", "squad"),
    "Qwen2.5-Coder-0.5B\nchanged facts, 16k": ("comparison_qwen", "counterfactual"),
}


def main() -> None:
    """Draw all pictures into a folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "docs" / "images")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    mpl.rcParams |= {
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor"), GREY),
        **dict.fromkeys(("xtick.color", "ytick.color"), GREY),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 11,
        "svg.hashsalt": "emt",  # the same picture of the same numbers
        "svg.fonttype": "none",
    }
    for name, draw in {"quality": quality, "cost": cost, "bytes": sizes}.items():
        _save(draw, folder / f"{name}.svg")
        print(folder / f"{name}.svg")


def quality(axes: Any) -> None:
    """Draw what share of questions is found and right, with 95 % intervals."""
    bars = {(label, condition): [] for label in ("found", "right") for condition in ("emt", "RAG")}
    for folder, of_set in RESULTS.values():
        _, items = read_results(ROOT / "benchmarks" / "results" / folder / "results.jsonl")
        for (label, condition), shares in bars.items():
            name = "passages" if condition == "emt" else "rag_hybrid"
            values = [
                100.0 * bool(item[label])
                for item in items.values()
                if item.get("set") == of_set and item.get("condition") == name
            ]
            shares.append(mean_interval(values))
    for number, (label, shares) in enumerate(bars.items()):
        means = [share.mean for share in shares]
        errors = [
            [share.mean - share.low for share in shares],
            [share.high - share.mean for share in shares],
        ]
        at = [place + (number - 1.5) * 0.2 for place in range(len(RESULTS))]
        _bar(axes, at, means, 0.18, number, f"{label[0]}, {label[1]}", yerr=errors)
    axes.set_xticks(range(len(RESULTS)), list(RESULTS))
    axes.set_ylabel("% of 24 questions")
    axes.set_ylim(0, 105)


def cost(axes: Any) -> None:
    """Draw the time of a decode step of token mode, as a multiple of the plain model's."""
    table = (ROOT / "benchmarks" / "store.md").read_text(encoding="utf-8")
    (header,) = re.findall(r"^\| (\|.*rows) \|$", table, flags=re.M)
    rows = [int(each.replace(",", "")) for each in re.findall(r"([\d,]+) rows", header)]
    for number, name in enumerate(("manual", "exact", "auto")):
        (line,) = re.findall(rf"^\| ms/step: {name} \|(.*)$", table, flags=re.M)
        ratios = [float(each) for each in re.findall(r"\(([\d.]+)", line)]
        label = {"manual": "manual", "exact": "vector_db, Flat", "auto": "vector_db, auto"}[name]
        marker = "os^"[number]
        axes.plot(rows, ratios, color=COLOURS[number], marker=marker, label=label)
    axes.axhline(1, color=GREY, linestyle=":", linewidth=1)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_yticks([1, 2, 5, 10, 20, 40], ["1", "2", "5", "10", "20", "40"])
    axes.set_xlabel("rows (one a token)")
    axes.set_ylabel("decode step of token mode,\ntimes the plain model's")


def sizes(axes: Any) -> None:
    """Draw the bytes of a million tokens."""
    for number, codec in enumerate(CODECS):
        gigabytes = [_bytes_a_token(*shape, codec) / 1e3 for shape in MODELS.values()]
        at = [place + (number - 1.5) * 0.2 for place in range(len(MODELS))]
        _bar(axes, at, gigabytes, 0.18, number, codec)
    axes.set_xticks(range(len(MODELS)), list(MODELS))
    axes.set_yscale("log")
    axes.set_yticks([5, 10, 20, 50, 100], ["5", "10", "20", "50", "100"])
    axes.set_ylabel("GB a million tokens")


def _bytes_a_token(num_layers: int, num_heads: int, head_dim: int, codec: str) -> int:
    layer = LayerLayout(num_heads, head_dim, head_dim)
    layout = MemoryLayout(dict.fromkeys(range(num_layers), layer), torch.float16)
    return sum(record_bytes(layout, codec).values())


def _bar(
    axes: Any,
    at: list[float],
    heights: list[float],
    width: float,
    number: int,
    label: str,
    **more: Any,
) -> None:
    style = {"color": COLOURS[number], "hatch": HATCHES[number], "edgecolor": "white"}
    more |= {"error_kw": {"ecolor": GREY, "capsize": 3}} if "yerr" in more else {}
    axes.bar(at, heights, width, label=label, linewidth=0, **style, **more)


def _save(draw: Callable[[Any], None], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7.5, 4))
    draw(axes)
    axes.legend(frameon=False, fontsize=9, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1))
    figure.tight_layout()
    figure.savefig(path, transparent=True, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
