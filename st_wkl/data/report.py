"""What a teacher has to teach: how far it agrees with the judgements, and how sharply it tells documents apart."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from st_wkl.files import replacing

if TYPE_CHECKING:
    from st_wkl.data.dataset import DistillationDataset

# Half of the entropy of "all documents alike": the teacher's order counts, and more than one document does.
_TARGET_ENTROPY = 0.5


@dataclass(frozen=True, repr=False)
class TeacherReport:
    """How a teacher's scores relate to the judgements, over lists of documents.

    Judgement numbers are over the lists with both a positive and another document. Unjudged documents count as not
    relevant, so a teacher that finds unjudged relevant documents looks worse than it is.

    Attributes:
        lists: Number of lists.
        constant_lists: Lists whose documents all have one score.
        precision_at_1: Share of lists whose best document is judged relevant. A tie with a negative counts as wrong.
        ndcg_at_10: nDCG@10 of the teacher's order, with linear graded gains over the list alone; ties count as wrong.
        contradicted_pairs: Share of the pairs of a positive and a negative whose order the teacher turns round.
        mean_spread: Mean of highest minus lowest score of a list.
        mean_margin: Mean of best positive minus best negative.
        lowest_score: Lowest of all scores.
        highest_score: Highest of all scores.
        temperature: Teacher temperature of `entropy`.
        entropy: Mean entropy of the softmax over a list, as a share of that of equal scores: 0 = one document has
            it all, 1 = all are alike.
        suggested_temperature: Teacher temperature with an entropy of one half, a start for a search; `None` if no
            temperature has it.
    """

    lists: int
    constant_lists: int
    precision_at_1: float | None
    ndcg_at_10: float | None
    contradicted_pairs: float | None
    mean_spread: float
    mean_margin: float | None
    lowest_score: float
    highest_score: float
    temperature: float
    entropy: float
    suggested_temperature: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return the values as JSON has them."""
        return dataclasses.asdict(self)

    def __repr__(self) -> str:
        """Return the report in sentences."""
        text = [
            f"{self.lists:,} lists, scores from {self.lowest_score:.2f} to {self.highest_score:.2f}, mean spread of a "
            f"list {self.mean_spread:.2f}; {self.constant_lists:,} lists have one score only."
        ]
        if self.precision_at_1 is not None:
            text.append(
                f"The teacher's best document is judged relevant in {self.precision_at_1:.1%} of the lists, nDCG@10 "
                f"over the list {self.ndcg_at_10:.3f}; it turns {self.contradicted_pairs:.1%} of the judged pairs "
                f"round, and the best positive stands {self.mean_margin:+.2f} from the best negative."
            )
        text.append(f"At temperature {self.temperature:g} the softmax over a list has {self.entropy:.0%} of the most")
        text[-1] += " entropy that it can have"
        if self.suggested_temperature is not None:
            text[-1] += f"; {self.suggested_temperature:.2g} gives one half, a start for a search"
        text[-1] += "."
        return " ".join(text)


def teacher_report(dataset: DistillationDataset, *, temperature: float = 1.0) -> TeacherReport:
    """Return how the scores of a dataset relate to its judgements.

    Args:
        dataset: Any distillation dataset.
        temperature: Teacher temperature for the entropy.

    Raises:
        ValueError: The dataset has no row, or the temperature is not above 0.

    Example:
        >>> print(teacher_report(DistillationDataset.load_from_disk("nfcorpus-distillation")))  # doctest: +SKIP
    """
    columns = dataset.train.with_format(None)[:]
    return report_on_lists(columns["scores"], columns["labels"], temperature=temperature)


def report_on_lists(
    scores: Sequence[Sequence[float] | np.ndarray],
    labels: Sequence[Sequence[int]],
    *,
    temperature: float = 1.0,
) -> TeacherReport:
    """Return the report on plain lists; see `TeacherReport`.

    Args:
        scores: Teacher scores of each list, finite.
        labels: Judged gains of each list, 0 where unjudged.
        temperature: Teacher temperature for the entropy.

    Raises:
        ValueError: There is no list, or the temperature is not above 0.

    Example:
        >>> report = report_on_lists([[5.0, 1.0, 0.0], [1.0, 2.0]], [[1, 0, 0], [1, 0]])
        >>> report.precision_at_1, report.mean_margin
        (0.5, 1.5)
    """
    if not len(scores):
        raise ValueError("There is no list to report on.")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be a positive finite number, got {temperature}.")
    lists = [np.asarray(values, dtype=np.float64) for values in scores]
    margins, gains, contradicted, pairs = [], [], 0, 0
    for values, judged in zip(lists, labels, strict=True):
        gain = np.asarray(judged)
        relevant = gain > 0
        if relevant.any() and not relevant.all():
            margins.append(float(values[relevant].max() - values[~relevant].max()))
            gains.append(_ndcg(values, np.maximum(gain, 0)))
            contradicted += int((values[relevant][:, None] < values[~relevant]).sum())
            pairs += int(relevant.sum() * (~relevant).sum())
    spreads = [float(values.max() - values.min()) for values in lists]
    return TeacherReport(
        lists=len(lists),
        constant_lists=sum(spread == 0 for spread in spreads),
        precision_at_1=float(np.mean([margin > 0 for margin in margins])) if margins else None,
        ndcg_at_10=float(np.mean(gains)) if margins else None,
        contradicted_pairs=contradicted / pairs if pairs else None,
        mean_spread=float(np.mean(spreads)),
        mean_margin=float(np.mean(margins)) if margins else None,
        lowest_score=float(min(values.min() for values in lists)),
        highest_score=float(max(values.max() for values in lists)),
        temperature=temperature,
        entropy=mean_entropy(lists, temperature),
        suggested_temperature=suggest_temperature(lists),
    )


def mean_entropy(scores: Sequence[Sequence[float] | np.ndarray], temperature: float = 1.0) -> float:
    """Return the mean over lists of the softmax's entropy, each as a share of log N; lists of one document left out.

    Args:
        scores: Scores of each list.
        temperature: Divides the scores.

    Example:
        >>> mean_entropy([[1.0, 1.0], [200.0, 0.0]])
        0.5
    """
    shares = []
    for values in scores:
        if len(values) > 1:
            logits = np.asarray(values, dtype=np.float64) / temperature
            weights = np.exp(logits - logits.max())
            # H = ln Z − Σ p·(x − max); no logarithm of a weight that underflowed
            entropy = math.log(weights.sum()) - float((weights * (logits - logits.max())).sum() / weights.sum())
            shares.append(entropy / math.log(len(logits)))
    return float(np.mean(shares)) if shares else 0.0


def suggest_temperature(
    scores: Sequence[Sequence[float] | np.ndarray], entropy: float = _TARGET_ENTROPY
) -> float | None:
    """Return the teacher temperature at which the softmax over a list has a given share of its entropy, on average.

    A rule of thumb to start a search from: near 0 the teacher says no more than a label, near 1 all documents look
    alike. Constant lists and lists of one document are left out.

    Args:
        scores: Scores of each list.
        entropy: Share of the entropy of equal scores, between 0 and 1.

    Returns:
        The temperature to three digits, `None` if every list is constant.

    Raises:
        ValueError: `entropy` is not between 0 and 1.
    """
    if not 0 < entropy < 1:
        raise ValueError(f"entropy is a share between 0 and 1, got {entropy}.")
    lists = [np.asarray(values, dtype=np.float64) for values in scores]
    lists = [values for values in lists if len(values) > 1 and values.max() > values.min()]
    if not lists:
        return None
    spread = float(np.mean([values.max() - values.min() for values in lists]))
    low, high = math.log(spread * 1e-5), math.log(spread * 1e5)
    if mean_entropy(lists, math.exp(low)) > entropy:  # equal best scores: no temperature parts them
        return None
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_entropy(lists, math.exp(middle)) < entropy else (low, middle)
    return float(f"{math.exp(high):.3g}")


def plot_report(dataset: DistillationDataset, path: str | os.PathLike[str]) -> Path:
    """Draw the scores, the margins and the entropy of a dataset, in a form that survives a black-and-white printer.

    Args:
        dataset: Any distillation dataset.
        path: File to write, `.png`, `.pdf` or `.svg`.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: The dataset has no row.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install 'st-wkl[plots]'.") from error
    report = teacher_report(dataset)
    columns = dataset.train.with_format(None)[:]
    lists = [np.asarray(values, dtype=np.float64) for values in columns["scores"]]
    relevant = [np.asarray(gains) > 0 for gains in columns["labels"]]
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    _plot_scores(axes[0], np.concatenate(lists), np.concatenate(relevant))
    _plot_margins(axes[1], lists, relevant)
    _plot_entropy(axes[2], lists, report)
    teacher = dataset.provenance.get("teacher", {})
    teacher = teacher.get("model", "teacher") if isinstance(teacher, dict) else "teacher"
    collection = dataset.provenance.get("collection", {}).get("name", "dataset")
    figure.suptitle(f"{Path(str(teacher)).name} on {collection}, {report.lists:,} lists", parse_math=False)
    path = Path(path)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format=path.suffix.lstrip(".") or "png")
    return path


def _plot_scores(axes: Any, values: np.ndarray, relevant: np.ndarray) -> None:
    bins = np.linspace(values.min(), values.max() + 1e-9, 41)
    groups = (
        ("not judged relevant", ~relevant, {"histtype": "stepfilled", "color": "0.8", "edgecolor": "0.4"}),
        ("judged relevant", relevant, {"histtype": "step", "color": "black", "linewidth": 1.8}),
    )
    for label, group, style in groups:
        if group.any():
            weights = np.full(int(group.sum()), 100 / group.sum())
            axes.hist(values[group], bins=bins, weights=weights, label=f"{label} ({group.sum():,})", **style)
    axes.set(xlabel="teacher score", ylabel="% of the documents", title="Scores")
    axes.legend(frameon=False, fontsize="small")


def _plot_margins(axes: Any, lists: Sequence[np.ndarray], relevant: Sequence[np.ndarray]) -> None:
    margins = np.array(
        [v[r].max() - v[~r].max() for v, r in zip(lists, relevant, strict=True) if r.any() and not r.all()]
    )
    axes.set(xlabel="best positive − best negative", ylabel="lists", title="Margins")
    if len(margins):
        limit = max(abs(margins).max(), 1e-9)
        bins = np.linspace(-limit, limit, 41)  # an edge at 0: no bar holds both right and wrong lists
        axes.hist(margins[margins <= 0], bins=bins, color="white", edgecolor="black", hatch="////")
        axes.hist(margins[margins > 0], bins=bins, color="0.8", edgecolor="black")
        wrong = float((margins <= 0).mean())
        axes.axvline(0, color="black", linewidth=1)
        axes.text(
            0.03, 0.95, f"contradicts the\nlabels: {wrong:.0%}", transform=axes.transAxes, va="top", fontsize="small"
        )
        axes.text(
            0.97, 0.95, f"agrees: {1 - wrong:.0%}", transform=axes.transAxes, va="top", ha="right", fontsize="small"
        )
        axes.margins(y=0.25)


def _plot_entropy(axes: Any, lists: Sequence[np.ndarray], report: TeacherReport) -> None:
    centre = report.suggested_temperature or 1.0
    temperatures = np.geomspace(min(centre, 1) / 30, max(centre, 1) * 30, 40)
    axes.plot(temperatures, [mean_entropy(lists, float(value)) for value in temperatures], color="black")
    axes.set(xscale="log", ylim=(0, 1.02), xlabel="teacher temperature", ylabel="entropy / log N", title="Sharpness")
    axes.axvline(1, color="0.5", linestyle=":", label="1")
    if report.suggested_temperature is not None:
        axes.axvline(centre, color="black", linestyle="--", label=f"half entropy: {centre:.2g}")
    axes.legend(frameon=False, fontsize="small")


def _ndcg(scores: np.ndarray, gains: np.ndarray, depth: int = 10) -> float:
    # Of equal scores the less relevant first: a teacher that gives everything one score is not right.
    order = np.lexsort((gains, -scores))[:depth]
    ideal = np.sort(gains)[::-1][:depth]
    discounts = 1 / np.log2(np.arange(2, depth + 2))
    return float((gains[order] * discounts[: len(order)]).sum() / (ideal * discounts[: len(ideal)]).sum())
