"""Training as a picture: the loss and its terms, agreement with the teacher, and the dev split."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from st_wkl.files import replacing
from st_wkl.training.logs import AGREEMENT, MEAN_WEIGHT

PLOT_FILE = "training.png"
_BOOKKEEPING = {"epoch", "step", "learning_rate", "grad_norm", "num_input_tokens_seen", "loss", AGREEMENT, MEAN_WEIGHT}
# Told apart without colour, in print and by everybody.
_STYLES = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"), ((0, (1, 3)), "v"))


def plot_training(history: Iterable[Mapping[str, Any]], path: str | Path) -> Path | None:
    """Draw a trainer's log history: loss (and its terms), teacher agreement, mean weight, dev metrics.

    Lines differ in dashes and markers, not in colour alone. matplotlib is imported here, and its global state is left
    as it was.

    Args:
        history: `trainer.state.log_history`, or that of a checkpoint's `trainer_state.json`.
        path: A `.png`, `.svg` or `.pdf` file, written in one step.

    Returns:
        The path; None where the history holds no line with a loss or a metric, so there is nothing to draw.

    Raises:
        ImportError: If matplotlib is not installed (`pip install "st-wkl[plots]"`).

    Example:
        >>> plot_training(trainer.state.log_history, "training.png")  # doctest: +SKIP
    """
    panels = [panel for panel in _panels(list(history)) if panel[1]]
    if not panels:
        return None
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('The training plot needs matplotlib: pip install "st-wkl[plots]".') from error
    figure = Figure(figsize=(6.4, 2.4 * len(panels)), layout="tight")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (title, lines) in zip(axes, panels, strict=True):
        for number, (label, points) in enumerate(sorted(lines.items())):
            dashes, marker = _STYLES[number % len(_STYLES)]
            shade = str(0.15 * (number % 4))
            steps, values = zip(*points, strict=True)
            every = max(1, len(points) // 12)
            axis.plot(steps, values, linestyle=dashes, marker=marker, markevery=every, color=shade, label=label, ms=4)
        axis.set_ylabel(title)
        axis.grid(True, color="0.9")
        axis.spines[["top", "right"]].set_visible(False)
        if len(lines) > 1 or title != next(iter(lines)):
            axis.legend(frameon=False, fontsize="small")
    axes[-1].set_xlabel("optimizer step")
    path = Path(path)
    with replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix.lstrip(".") or "png", dpi=120)
    return path


def _panels(history: list[Mapping[str, Any]]) -> list[tuple[str, dict[str, list[tuple[int, float]]]]]:
    """Return title and lines of each panel, a line being label and points."""
    training = [entry for entry in history if "loss" in entry]
    evaluation = [entry for entry in history if any(key.startswith("eval_") for key in entry)]
    terms = {key for entry in training for key, value in entry.items() if _is_number(value)} - _BOOKKEEPING
    metrics = {key for entry in evaluation for key in entry if "_at_" in key}
    losses = {"loss": _points(training, "loss"), **{term: _points(training, term) for term in terms}}
    losses |= {"dev loss": points} if (points := _points(evaluation, "eval_loss")) else {}
    return [
        ("loss", {label: points for label, points in losses.items() if points}),
        (
            "teacher",
            {
                label: points
                for label, key in (("agreement", AGREEMENT), ("mean weight", MEAN_WEIGHT))
                if (points := _points(training, key))
            },
        ),
        ("dev", {_label(key): _points(evaluation, key) for key in metrics}),
    ]


def _points(entries: list[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    # A resumed run may say a step twice; the last word counts.
    found = {int(entry["step"]): float(entry[key]) for entry in entries if _is_number(entry.get(key))}
    return sorted(found.items())


def _label(key: str) -> str:
    return key.removeprefix("eval_").replace("_ndcg_at_", " nDCG@").replace("_recall_at_", " recall@")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
