"""The picture of aiter_targets.py: bars of each shape, AITER's, ours and the floor, on a logarithmic axis."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl

if TYPE_CHECKING:
    from aiter_targets import Row

from wave64.arch import lookup

mpl.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402
from matplotlib.patches import Patch  # noqa: E402
from matplotlib.ticker import FuncFormatter  # noqa: E402

THEIRS, OURS, MISSED, FLOOR = "#b5b9c2", "#2f6f9f", "#c8643c", "#222222"
HEIGHT, GAP = 0.38, 0.7  # of a bar; between families


def draw(rows: list[Row], path: Path) -> None:
    """Writes a PNG with a panel for each architecture."""
    archs = list(dict.fromkeys(row.arch for row in rows))
    longest = max(sum(row.arch == arch for row in rows) for arch in archs)
    figure, axes = plt.subplots(1, len(archs), figsize=(6.4 * len(archs), 1.6 + 0.33 * longest), squeeze=False,
                                layout="constrained")
    for axis, arch in zip(axes[0], archs, strict=True):
        _panel(axis, [row for row in rows if row.arch == arch])
        axis.set_title(f"{lookup(arch).product} ({arch})", loc="left", fontsize=11, fontweight="bold")
    handles = [Patch(color=THEIRS, label="AITER's assembly"),
               Patch(color=OURS, label="wave64, target reached or a tie"),
               Patch(color=MISSED, label="wave64, target missed"),
               Line2D([], [], color=FLOOR, marker="|", linestyle="", markersize=9, markeredgewidth=2,
                          label="floor: memory or matrix units at peak")]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.suptitle("Predicted microseconds, from executed machine code (no AMD GPU took part); shorter is better",
                    fontsize=11)
    figure.savefig(path, dpi=64, metadata={"Software": None})
    plt.close(figure)


def _panel(axis: Axes, rows: list[Row]) -> None:
    at, family, marks = 0.0, rows[0].family, []
    for row in rows:
        at += 1 + (GAP if row.family != family else 0)
        family = row.family
        marks.append(at)
        axis.barh(at - HEIGHT / 2, row.theirs, HEIGHT, color=THEIRS)
        axis.barh(at + HEIGHT / 2, row.ours, HEIGHT, color=MISSED if row.verdict.startswith("missed") else OURS)
        axis.plot([row.floor] * 2, [at - HEIGHT, at + HEIGHT], color=FLOOR, linewidth=2, solid_capstyle="butt")
        axis.text(max(row.ours, row.theirs) * 1.08, at, f"{row.ours / row.theirs:.2f}", va="center", fontsize=8)
    axis.set_yticks(marks, [row.what for row in rows], fontsize=8.5)
    axis.invert_yaxis()
    axis.set_xscale("log")
    smallest = min(min(row.theirs, row.ours) for row in rows)
    axis.set_xlim(min(2.0, smallest * 0.6), max(max(row.theirs, row.ours) for row in rows) * 2.2)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda us, _: f"{us:g}"))
    axis.set_xlabel("us; the number behind a pair of bars is ours / AITER's", fontsize=9)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", which="major", color="#e3e3e6", linewidth=0.8)
    axis.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
