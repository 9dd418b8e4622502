"""Differences with their intervals as a forest plot: inline SVG for the report, a picture for cards and papers."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from st_wkl.evaluation.effects import Effect, with_queries
from st_wkl.evaluation.results import SHARED, UNSEEN
from st_wkl.files import replacing
from st_wkl.metrics import METRIC_LABELS

_MARKS = {
    None: '<circle r="5.5" fill="currentColor"/>',
    SHARED: '<rect x="-5" y="-5" width="10" height="10" fill="var(--page)" stroke="currentColor" stroke-width="2"/>',
    UNSEEN: '<path d="M0-7 7 0 0 7-7 0Z" fill="var(--page)" stroke="currentColor" stroke-width="2"/>',
}


def forest_plot(effects: Sequence[Effect]) -> str:
    """Return the differences with their intervals as HTML with inline SVG: a row each, on one scale through zero.

    Args:
        effects: What `compare_all` returned.
    """
    ends = [0.0, *(e for effect in effects for e in (effect.difference.low, effect.difference.high))]
    low, high = min(ends), max(ends)
    margin = 0.06 * (high - low) or 0.01
    low, high = low - margin, high + margin

    def at(value: float) -> str:
        return f"{100 * (value - low) / (high - low):.2f}%"

    rows, previous = [], None
    for effect, queries in with_queries(effects):
        d, key = effect.difference, (effect.task, effect.model)
        if key != previous:
            rows.append(f"<h3>{escape(effect.model)} · {escape(effect.task)}</h3>")
        what = f"{queries} queries ({d.queries})"
        svg = (
            f'<svg role="img" aria-label="{escape(f"{d.mean:+.3f}, from {d.low:+.3f} to {d.high:+.3f}")}">'
            f'<line x1="0" x2="100%" y1="12" y2="12" stroke="var(--line)"/>'
            f'<line x1="{at(0)}" x2="{at(0)}" y1="1" y2="23" stroke="var(--soft)" stroke-dasharray="3 3"/>'
            f'<line x1="{at(d.low)}" x2="{at(d.high)}" y1="12" y2="12" stroke="currentColor" stroke-width="2.5"/>'
            f'<svg x="{at(d.mean)}" y="12" overflow="visible">{_MARKS[effect.group]}</svg></svg>'
        )
        numbers = f"{d.mean:+.3f} [{d.low:+.3f}, {d.high:+.3f}]"
        rows.append(f'<div class="row"><span>{what}</span>{svg}<span>{numbers}</span></div>')
        previous = key
    groups = [g for g in (None, SHARED, UNSEEN) if any(effect.group == g for effect in effects)]
    legend = "".join(f'<svg><svg x="8" y="8" overflow="visible">{_MARKS[g]}</svg></svg>{g or "all"}' for g in groups)
    caption = (
        f'<p class="soft legend">Difference in {_label(effects)} per query with 95 % t intervals; the dashed '
        f"line is no difference.{legend}</p>"
    )
    return "\n".join([*rows, caption])


def plot_effects(effects: Sequence[Effect], path: str | Path) -> Path:
    """Draw the forest plot as a picture, for cards and papers; readable in black and white.

    Args:
        effects: What `compare_all` returned.
        path: Where to, by its ending as PNG, SVG or PDF.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: There is no effect.

    Example:
        >>> plot_effects(compare_all(before, after), "effects.png")  # doctest: +SKIP
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install 'st-wkl[plots]'.") from error
    if not effects:
        raise ValueError("there is nothing to plot: compare_all found no effect")
    figure = Figure(figsize=(7, 0.8 + 0.34 * len(effects)), layout="constrained")
    axes = figure.subplots()
    marks = {None: ("o", "black"), SHARED: ("s", "white"), UNSEEN: ("D", "white")}
    several = len({effect.task for effect in effects}) > 1
    shown = with_queries(effects)
    for place, (effect, _) in enumerate(shown):
        d, (mark, fill) = effect.difference, marks[effect.group]
        axes.plot([d.low, d.high], [place, place], color="black", linewidth=1.5, zorder=1)
        axes.plot(d.mean, place, mark, color="black", markerfacecolor=fill, markersize=7, zorder=2)
    labels = [
        f"{e.model}{', ' + e.task if several else ''}: {queries} ({e.difference.queries})" for e, queries in shown
    ]
    axes.set_yticks(range(len(shown)), labels)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.axvline(0, color="grey", linestyle="--", linewidth=1)
    axes.set_xlabel(f"Difference in {_label(effects)} (95 % interval)")
    axes.spines[["top", "right"]].set_visible(False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format=Path(path).suffix.lstrip(".") or "png", dpi=150)
    return Path(path)


def _label(effects: Sequence[Effect]) -> str:
    metric = effects[0].difference.metric
    return METRIC_LABELS.get(metric, metric)
