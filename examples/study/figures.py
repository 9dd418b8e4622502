"""The study's three figures, readable in black and white."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt

# An interval over fewer queries is as wide as the picture.
FEWEST = 30
MARKS = ("o", "s", "^", "D", "v")
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.9",
    "figure.dpi": 150,
}


def differences_figure(own: dict[str, Any], parts: dict[str, Any], path: Path) -> None:
    """Draw every method's difference to KL with its interval, on shared and on unseen documents."""
    with plt.rc_context(STYLE):
        size = (3.4 * len(own) + 1.2, 1.2 + 0.21 * max(map(len, own.values())))
        figure, axes = plt.subplots(1, len(own), figsize=size, sharey=True, squeeze=False)
        for axis, (name, differences) in zip(axes[0], own.items(), strict=True):
            methods = list(differences)
            for offset, part, color, mark in ((0.17, "shared", "black", "o"), (-0.17, "unseen", "0.45", "s")):
                for place, method in enumerate(reversed(methods)):
                    found = differences[method][part]
                    if found is None or len(parts[name][part]) < FEWEST:
                        continue
                    error = [[found.mean - found.low], [found.high - found.mean]]
                    label = f"{part} documents" if place == 0 else None
                    fill = color if part == "shared" else "white"
                    axis.errorbar(
                        found.mean, place + offset, xerr=error, fmt=mark, color=color, mfc=fill, ms=4, lw=1, label=label
                    )
            axis.axvline(0, color="black", lw=0.8)
            axis.set_yticks(range(len(methods)), list(reversed(methods)))
            counts = ", ".join(f"{len(queries)} {part}" for part, queries in parts[name].items())
            axis.set_title(f"{name}\n{counts}", fontsize=9)
            axis.set_xlabel("nDCG@10 − that of KL")
        marks = dict(pair for axis in axes[0] for pair in zip(*reversed(axis.get_legend_handles_labels()), strict=True))
        figure.legend(marks.values(), marks.keys(), frameon=False, loc="upper center", ncols=2)
        _save(figure, path, top=0.94)


def correctness_figure(points: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw weighted KL's gain over KL by how right the teacher was about the query."""
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(5, 3.2))
        for number, (name, values) in enumerate(points.items()):
            places = np.arange(len(values)) + (number - (len(points) - 1) / 2) * 0.18
            means = [found.mean for found in values.values()]
            errors = [[f.mean - f.low for f in values.values()], [f.high - f.mean for f in values.values()]]
            color = str(0.3 * number)
            axis.errorbar(places, means, yerr=errors, fmt=MARKS[number], color=color, ms=5, lw=1, capsize=2, label=name)
        labels = list(max(points.values(), key=len))
        axis.set_xticks(range(len(labels)), labels)
        axis.axhline(0, color="black", lw=0.8)
        axis.set_xlabel("place of the best positive in the teacher's ranking of the list")
        axis.set_ylabel("nDCG@10, weighted KL − KL")
        axis.legend(frameon=False, fontsize=8)
        _save(figure, path)


def curves_figure(curves: dict[tuple[str, str], dict[str, Any]], path: Path) -> None:
    """Draw nDCG@10 against noise in the teacher, number of candidates, and temperature."""
    names = {"noise": "share of lists with shuffled scores", "candidates": "negatives in a list",
             "temperature": "student temperature"}  # fmt: skip
    if not curves:
        return
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(curves), figsize=(3.1 * len(curves), 2.9), squeeze=False)
        for axis, ((analysis, name), lines) in zip(axes[0], curves.items(), strict=True):
            for number, (method, points) in enumerate(lines.items()):
                places = sorted(points)
                means = [np.mean(points[place]) for place in places]
                spread = [np.std(points[place]) for place in places]
                line = ("-", "--", ":")[number % 3]
                axis.errorbar(
                    places, means, yerr=spread, fmt=MARKS[number] + line, color=str(0.35 * number), ms=4, lw=1.2,
                    capsize=2, label=method,
                )  # fmt: skip
            if analysis != "noise":
                axis.set_xscale("log")
                axis.set_xticks(places, [f"{place:g}" for place in places])
                axis.minorticks_off()
            axis.set_title(name, fontsize=9)
            axis.set_xlabel(names[analysis])
        axes[0][0].set_ylabel("nDCG@10, all test queries")
        axes[0][0].legend(frameon=False, fontsize=8)
        _save(figure, path)


def _save(figure: Any, path: Path, top: float = 1.0) -> None:
    figure.tight_layout(rect=(0, 0, 1, top))
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)
