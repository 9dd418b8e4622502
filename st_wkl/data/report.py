"""What a teacher has to teach: how far it agrees with the judgements, and how sharply it tells documents apart."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from st_wkl.data.arrow import Ragged, columns
from st_wkl.files import replacing

if TYPE_CHECKING:
    from st_wkl.data.dataset import DistillationDataset

# Half of the entropy of "all documents alike": the teacher's order counts, and more than one document does.
_TARGET_ENTROPY = 0.5
_AT_ONCE = 1 << 15  # scores: what fits a core's own cache


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

    def warning(self) -> str | None:
        """Return why there is little to learn from these scores, None where there is no such reason."""
        if self.constant_lists:
            return (
                f"The teacher gives all documents of {self.constant_lists:,} of {self.lists:,} queries one score. Such "
                "lists teach nothing. Check that it is a reranker and that the texts are not cut to nothing."
            )
        if self.lowest_score >= 0 and self.highest_score <= 1:
            return (
                "All teacher scores lie between 0 and 1, as after a sigmoid, which flattens the differences between "
                "good documents. Use raw logits, or a low teacher temperature."
            )
        return None

    def __repr__(self) -> str:
        """Return the report in sentences."""
        text = [f"{self.lists:,} lists, scores from {self.lowest_score:.2f} to {self.highest_score:.2f}."]
        if self.constant_lists:
            text.append(f"In {self.constant_lists:,} of them all documents have one score.")
        if self.precision_at_1 is not None:
            text.append(
                f"The teacher's best document is judged relevant in {self.precision_at_1:.1%} of the lists (nDCG@10 "
                f"{self.ndcg_at_10:.3f}), and {self.contradicted_pairs:.1%} of the pairs of a relevant and another "
                f"document stand the wrong way round; the best relevant one is {self.mean_margin:+.2f} from the best "
                "other."
            )
        text.append(f"Over a list, the softmax of the scores has {self.entropy:.0%} of the entropy of equal scores")
        text[-1] += f" at temperature {self.temperature:g}"
        if self.suggested_temperature is not None:
            text[-1] += f", and half of it at {self.suggested_temperature:.2g}, where a search can start"
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
        >>> print(teacher_report(DistillationDataset.load("nfcorpus-distillation")))  # doctest: +SKIP
    """
    scores, gains = _scores_and_gains(dataset)
    return report_on_lists(scores.values.to_numpy(), gains, lengths=scores.lengths, temperature=temperature)


def _scores_and_gains(dataset: DistillationDataset) -> tuple[Ragged, np.ndarray]:
    """Return the scores and the judged gains: none where some are the teacher's own, with which it would agree."""
    scores, labels = (Ragged(columns(dataset.train)[name]) for name in ("scores", "labels"))
    gains = labels.values.to_numpy()
    return scores, np.zeros_like(gains) if dataset.unjudged()["teacher_positives"] else gains


def report_on_lists(
    scores: Sequence[Sequence[float] | np.ndarray] | np.ndarray,
    labels: Sequence[Sequence[int]] | np.ndarray,
    *,
    lengths: np.ndarray | None = None,
    temperature: float = 1.0,
) -> TeacherReport:
    """Return the report on plain lists; see `TeacherReport`.

    Args:
        scores: Teacher scores of each list, finite; or, with `lengths`, of all lists one after another.
        labels: Judged gains likewise, 0 where unjudged.
        lengths: How many documents each list has.
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
    lists = _Lists(scores, lengths)
    gains = np.concatenate([np.asarray(part) for part in labels]) if lengths is None else np.asarray(labels)
    spreads = lists.each(np.ptp)
    judged = _Judged(lists, gains)
    return TeacherReport(
        lists=len(lists.lengths),
        constant_lists=int((spreads == 0).sum()),
        precision_at_1=float(np.mean(judged.margins > 0)) if len(judged.margins) else None,
        ndcg_at_10=float(np.mean(judged.ndcg)) if len(judged.margins) else None,
        contradicted_pairs=judged.contradicted / judged.pairs if judged.pairs else None,
        mean_spread=float(np.mean(spreads)),
        mean_margin=float(np.mean(judged.margins)) if len(judged.margins) else None,
        lowest_score=float(lists.values.min()),
        highest_score=float(lists.values.max()),
        temperature=temperature,
        entropy=_entropy(lists, temperature),
        suggested_temperature=_suggest(lists, _TARGET_ENTROPY),
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
    return _entropy(_Lists(scores), temperature)


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
    return _suggest(_Lists(scores), entropy)


class _Lists:
    """Lists as blocks of one length, in which the sums of a row are to the last bit those of the list alone."""

    def __init__(
        self, scores: Sequence[Sequence[float] | np.ndarray] | np.ndarray, lengths: np.ndarray | None = None
    ) -> None:
        if lengths is None:
            lengths = np.array([len(values) for values in scores], int)
            scores = np.concatenate([np.zeros(0), *(np.asarray(values, np.float64) for values in scores)])
        self.values, self.lengths = np.asarray(scores), lengths
        self.starts = np.cumsum(lengths) - lengths

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield places of lists of one length, and the places of their documents."""
        order = np.argsort(self.lengths, kind="stable")
        for rows in np.split(order, np.flatnonzero(np.diff(self.lengths[order])) + 1):
            length = int(self.lengths[rows[0]]) if len(rows) else 0
            step = max(1, _AT_ONCE // max(1, length))
            for start in range(0, len(rows) if length else 0, step):
                part = rows[start : start + step]
                yield part, self.starts[part][:, None] + np.arange(length)

    def each(self, number: Callable[..., Any]) -> np.ndarray:
        """Return a number of each list; `number` gets `(k, n)` scores of lists of one length, and axis 1."""
        found = np.zeros(len(self.lengths))
        for rows, places in self.blocks():
            found[rows] = number(self.values[places].astype(np.float64), axis=1)
        return found

    def take(self, kept: np.ndarray) -> _Lists:
        """Return some of the lists."""
        return _Lists(self.values[np.repeat(kept, self.lengths)], self.lengths[kept])


def _entropy(lists: _Lists, temperature: float) -> float:
    def shares(values: np.ndarray, axis: int) -> Any:
        if values.shape[1] < 2:
            return 0.0
        logits = values / temperature
        logits -= logits.max(axis=axis, keepdims=True)
        weights = np.exp(logits)
        total = weights.sum(axis=axis)
        # H = ln Z − Σ p·(x − max); no logarithm of a weight that underflowed. numpy's logarithm differs in last bits.
        entropy = np.array([*map(math.log, total.tolist())]) - (weights * logits).sum(axis=axis) / total
        return entropy / math.log(values.shape[1])

    found = lists.each(shares)[lists.lengths > 1]
    return float(np.mean(found)) if len(found) else 0.0


def _suggest(lists: _Lists, entropy: float) -> float | None:
    spreads = lists.each(np.ptp)
    if not (spreads > 0).any():
        return None
    lists, spread = lists.take(spreads > 0), float(np.mean(spreads[spreads > 0]))
    low, high = math.log(spread * 1e-5), math.log(spread * 1e5)
    if _entropy(lists, math.exp(low)) > entropy:  # equal best scores: no temperature parts them
        return None
    for _ in range(40):
        if f"{math.exp(low):.3g}" == f"{math.exp(high):.3g}":
            break
        middle = (low + high) / 2
        low, high = (middle, high) if _entropy(lists, math.exp(middle)) < entropy else (low, middle)
    return float(f"{math.exp(high):.3g}")


class _Judged:
    """What judgements say of the lists with both a positive and another document."""

    def __init__(self, lists: _Lists, gains: np.ndarray) -> None:
        margins, ndcg = (np.full(len(lists.lengths), np.nan) for _ in range(2))
        self.contradicted = self.pairs = 0
        for rows, places in lists.blocks():
            relevant = gains[places] > 0
            both = relevant.any(axis=1) & ~relevant.all(axis=1)
            rows, places, relevant = rows[both], places[both], relevant[both]
            values = lists.values[places].astype(np.float64)
            best = [np.where(side, values, -np.inf).max(axis=1, initial=-np.inf) for side in (relevant, ~relevant)]
            margins[rows] = best[0] - best[1]
            ndcg[rows] = _ndcg(values, np.maximum(gains[places], 0))
            for place in range(values.shape[1]):
                worse = (values[:, place, None] < values) & ~relevant
                self.contradicted += int(worse[relevant[:, place]].sum())
            self.pairs += int((relevant.sum(axis=1) * (~relevant).sum(axis=1)).sum())
        judged = ~np.isnan(margins)
        self.margins, self.ndcg = margins[judged], ndcg[judged]


def _ndcg(scores: np.ndarray, gains: np.ndarray, depth: int = 10) -> np.ndarray:
    # Of equal scores the less relevant first: a teacher that gives everything one score is not right.
    order = np.lexsort((gains, -scores))[:, :depth]
    ideal = np.sort(gains)[:, ::-1][:, :depth]
    discounts = 1 / np.log2(np.arange(2, order.shape[1] + 2))
    found = np.take_along_axis(gains, order, axis=1)
    return (found * discounts).sum(axis=1) / np.ascontiguousarray(ideal * discounts).sum(axis=1)


def scores_by_label(scores: np.ndarray, relevant: np.ndarray, *, bins: int = 12, width: int = 20) -> str:
    """Return how the scores of relevant and of other documents lie, as bars of text, which every page can show.

    Args:
        scores: Teacher scores of any number of documents.
        relevant: Whether each is judged relevant.
        bins: Ranges of the score, one a line.
        width: Length of the longest bar, in characters.

    Example:
        >>> scores, relevant = np.array([2.0, 1.0, 0.0, 0.0]), np.array([True, False, False, False])
        >>> print(scores_by_label(scores, relevant, bins=2, width=4))
              score | relevant (1) | other (3)
        1.00 … 2.00 | ████ 100 %   | █ 33 %
        0.00 … 1.00 |              | ███ 67 %
    """
    edges = np.linspace(scores.min(), scores.max(), bins + 1)
    rows = [["score"], *([f"{low:.2f} … {high:.2f}"] for low, high in itertools.pairwise(edges))]
    sides = {"relevant": scores[relevant], "other": scores[~relevant]}
    shares = {name: np.histogram(values, edges)[0] / max(1, len(values)) for name, values in sides.items()}
    longest = max(found.max() for found in shares.values()) or 1.0
    for name, found in shares.items():
        rows[0].append(f"{name} ({len(sides[name]):,})")
        for row, share in zip(rows[1:], found, strict=True):
            row.append(
                f"{'█' * max(1, round(width * share / longest))} {share:.0%}".replace("%", " %") if share else ""
            )
    first, second = (max(len(row[place]) for row in rows) for place in (0, 1))
    lines = [f"{row[0]:>{first}} | {row[1]:<{second}} | {row[2]}".rstrip() for row in [rows[0], *rows[:0:-1]]]
    return "\n".join(lines)


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
    scores, gains = _scores_and_gains(dataset)
    lists = _Lists(scores.values.to_numpy(), scores.lengths)
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    _plot_scores(axes[0], lists.values, gains > 0)
    _plot_margins(axes[1], _Judged(lists, gains).margins)
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


def _plot_margins(axes: Any, margins: np.ndarray) -> None:
    axes.set(xlabel="best positive − best negative", ylabel="lists", title="Margins")
    if len(margins):
        limit = max(abs(margins).max(), 1e-9)
        bins = np.linspace(-limit, limit, 41)  # an edge at 0: no bar holds both right and wrong lists
        axes.hist(margins[margins <= 0], bins=bins, color="white", edgecolor="black", hatch="////")
        axes.hist(margins[margins > 0], bins=bins, color="0.8", edgecolor="black")
        wrong = float((margins <= 0).mean())
        axes.axvline(0, color="black", linewidth=1)
        style = {"transform": axes.transAxes, "va": "top", "fontsize": "small"}
        axes.text(0.03, 0.95, f"contradicts the\nlabels: {wrong:.0%}", **style)
        axes.text(0.97, 0.95, f"agrees: {1 - wrong:.0%}", ha="right", **style)
        axes.margins(y=0.25)


def _plot_entropy(axes: Any, lists: _Lists, report: TeacherReport) -> None:
    centre = report.suggested_temperature or 1.0
    temperatures = np.geomspace(min(centre, 1) / 30, max(centre, 1) * 30, 40)
    axes.plot(temperatures, [_entropy(lists, float(value)) for value in temperatures], color="black")
    axes.set(xscale="log", ylim=(0, 1.02), xlabel="teacher temperature", ylabel="entropy / log N", title="Sharpness")
    axes.axvline(1, color="0.5", linestyle=":", label="1")
    if report.suggested_temperature is not None:
        axes.axvline(centre, color="black", linestyle="--", label=f"half entropy: {centre:.2g}")
    axes.legend(frameon=False, fontsize="small")
