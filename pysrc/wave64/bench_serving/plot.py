"""Latency against load, of the runs in a file of JSON lines."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from wave64.bench_serving.datasets import BadSetting

Json = dict[str, Any]

PANELS = (("ttft", "time to first token (ms)"), ("itl", "gap between tokens (ms)"))
CURVES = (("median", "median", "o-", 1.0), ("p99", "99th percentile", "s--", 0.55))
COLORS = ("#c8102e", "#00629b", "#3d8b37", "#b8860b", "#6a3d9a", "#444444")


def check() -> None:
    """Raises BadSetting if it cannot be drawn here."""
    if find_spec("matplotlib") is None:
        raise BadSetting('--plot: matplotlib is not installed: pip install "wave64[bench]"')


def curves(path: Path) -> dict[str, list[Json]]:
    """The runs of a file by what is to be one curve, each in order of its load; without those that answered nothing."""
    found: dict[str, list[Json]] = {}
    for text in path.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        if line["completed"]:
            name = f"{line['tag'] or line['backend']}, {line['dataset_name']}"
            if line["dataset_name"] not in ("sharegpt", "custom", "generated-shared-prefix"):
                name += f" {line['random_input_len']}/{line['random_output_len']}"
            found.setdefault(name, []).append(line)
    return {name: sorted(lines, key=lambda line: (line["max_concurrency"] or float("inf"), line["request_rate"]))
            for name, lines in found.items()}  # fmt: skip


def load_of(line: Json) -> str:
    """What load a run was under, in short."""
    limit, rate = line["max_concurrency"], line["request_rate"]
    if limit is not None:
        return f"{limit}"
    return "all at once" if rate == float("inf") else f"{rate:g}/s"


def draw(path: Path, target: Path) -> None:
    """Writes a PNG (or what the target's ending says)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator

    found = curves(path)
    figure = Figure(figsize=(11, 4.8), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (kind, title) in zip(figure.subplots(1, 2), PANELS, strict=True):
        for color, (name, lines) in zip(COLORS * len(found), found.items(), strict=False):
            x = [line["output_throughput"] for line in lines]
            for field, word, style, alpha in CURVES:
                y = [line[f"{field}_{kind}_ms"] for line in lines]
                axes.plot(x, y, style, color=color, alpha=alpha, label=f"{name}: {word}", markersize=4)
            for at, line in zip(x, lines, strict=True):
                axes.annotate(load_of(line), (at, line[f"median_{kind}_ms"]), textcoords="offset points",
                              xytext=(0, 6), ha="center", fontsize=8, color=color)  # fmt: skip
        axes.set_xlabel("output tokens per second")
        axes.set_ylabel(title)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda ms, _: f"{ms:g}"))
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda ms, _: ""))
        axes.grid(True, which="both", color="#e4e4e4", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, frameon=False, fontsize=8, loc="outside lower center", ncols=2)
    figure.suptitle("Latency against load (at the points: requests at a time, or per second)", fontsize=11)
    figure.savefig(target)
