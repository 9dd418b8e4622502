"""Scores of several teachers on one scale, and one score out of them. Lists of candidates in, lists out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_softmax

Calibration = Literal["none", "z-score", "min-max", "rank"]


def calibrate(scores: Sequence[float] | np.ndarray, method: Calibration = "none") -> np.ndarray:
    """Put one query's scores on a scale that another teacher's scores of the same query share.

    Args:
        scores: The scores of one query's candidates, shape (N,), finite.
        method: `"none"` leaves them; `"z-score"` gives mean 0 and standard deviation 1; `"min-max"` gives 0 to 1;
            `"rank"` gives 0 (lowest) to 1 (highest) at even steps, ties in the middle of theirs. A constant list
            says nothing about order and becomes zeros (z-score) or halves.

    Returns:
        float32 of shape (N,).

    Raises:
        ValueError: A score is not finite, or there is no such method.

    Example:
        >>> calibrate([4.0, -2.0, 1.0], "min-max")
        array([1. , 0. , 0.5], dtype=float32)
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or not np.isfinite(values).all():
        raise ValueError(f"Scores must be a list of finite numbers, got {_first_bad(values)}.")
    if method not in ("none", "z-score", "min-max", "rank"):
        raise ValueError(f'method must be "none", "z-score", "min-max" or "rank", got {method!r}.')
    if method == "none" or not values.size:
        return values.astype(np.float32)
    low, high = values.min(), values.max()
    if low == high:
        return np.full(len(values), 0.0 if method == "z-score" else 0.5, dtype=np.float32)
    if method == "z-score":
        # Scaled first: the square of a difference of 1e-200 would be 0.
        scaled = (values - low) / (high - low)
        result = (scaled - scaled.mean()) / scaled.std()
    elif method == "min-max":
        result = (values - low) / (high - low)
    else:
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        middle = np.cumsum(counts) - (counts + 1) / 2
        result = middle[inverse] / (len(values) - 1)
    return result.astype(np.float32)


def entropy_certainty(scores: Sequence[float] | np.ndarray, temperature: float = 1.0) -> float:
    """Return how sure a teacher is of one query's list: 1 minus the entropy of its softmax over the highest possible.

    1 means that all belief is in one candidate, 0 that all are alike. A list of one candidate gives 0: it says nothing.
    The idea of weighing teachers by it is that of MUKA (arXiv 2112.07327).

    Args:
        scores: Scores of one query's candidates, shape (N,), finite.
        temperature: Of the softmax; the larger, the less sure.

    Example:
        >>> round(entropy_certainty([10.0, 0.0, 0.0]), 3), entropy_certainty([1.0, 1.0])
        (0.999, 0.0)
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}.")
    values = np.asarray(scores, dtype=np.float64) / temperature
    if len(values) < 2:
        return 0.0
    shifted = values - values.max()
    log_p = shifted - np.log(np.exp(shifted).sum())
    entropy = -(np.exp(log_p) * log_p).sum()
    return float(min(1.0, max(0.0, 1.0 - entropy / np.log(len(values)))))


def combine(
    scores_by_teacher: Sequence[Sequence[float] | np.ndarray] | Mapping[str, Sequence[float] | np.ndarray],
    weights: Sequence[float] | None = None,
    *,
    certainty: bool = False,
    calibration: Calibration = "none",
    temperature: float = 1.0,
) -> np.ndarray:
    """Return the weighted mean of several teachers' scores of one query's candidates.

    Args:
        scores_by_teacher: For each teacher the scores of the same N candidates in the same order.
        weights: One weight for each teacher, not negative; they need not sum to 1. `None` weighs all alike.
        certainty: Multiply each weight by the teacher's `entropy_certainty` on this query. Where no teacher is sure at
            all, the plain weights hold.
        calibration: How each list is calibrated before it is mixed. Certainty is measured before, on the teacher's
            own scores: afterwards every teacher would look equally sure.
        temperature: Of the softmax in which certainty is measured.

    Returns:
        float32 of shape (N,).

    Raises:
        ValueError: Lists or weights do not fit each other, or a score is not finite; the message names the teacher.

    Example:
        >>> combine([[2.0, 0.0], [0.0, 1.0]], weights=[3, 1])
        array([1.5 , 0.25], dtype=float32)
    """
    named = scores_by_teacher if isinstance(scores_by_teacher, Mapping) else dict(enumerate(scores_by_teacher))
    lists = [np.asarray(scores, dtype=np.float64) for scores in named.values()]
    if not lists:
        raise ValueError("There are no teachers to combine.")
    for name, scores in zip(named, lists, strict=True):
        if scores.shape != lists[0].shape:
            raise ValueError(f"Teacher {name!r} has {scores.size} scores, the first has {lists[0].size}.")
        if not np.isfinite(scores).all():
            raise ValueError(f"Teacher {name!r} has the score {_first_bad(scores)}; scores must be finite.")
    shares = check_weights(weights, len(lists))
    if certainty:
        sure = shares * [entropy_certainty(scores, temperature) for scores in lists]
        shares = sure if sure.sum() > 0 else shares
    mixed = np.stack([calibrate(scores, calibration) for scores in lists])
    return ((shares / shares.sum()) @ mixed.astype(np.float64)).astype(np.float32)


def check_weights(weights: Sequence[float] | None, count: int) -> np.ndarray:
    """Return `count` weights as an array, or say what is wrong with them."""
    found = np.ones(count) if weights is None else np.asarray(weights, dtype=np.float64)
    if found.shape != (count,):
        raise ValueError(f"Got {found.size} weights for {count} teachers.")
    if not np.isfinite(found).all() or (found < 0).any() or not found.sum() > 0:
        raise ValueError(f"Weights must be finite, not negative and not all 0, got {found.tolist()}.")
    return found


def _first_bad(values: np.ndarray) -> str:
    bad = values[~np.isfinite(values)]
    return str(bad[0]) if bad.size else f"an array of shape {values.shape}"


@dataclass(frozen=True)
class FittedCalibration:
    """A teacher's logits t turned into scale · t + offset, as fitted on judged lists.

    The scale is positive, so the order stays: 1 / scale is the teacher temperature that the judgements ask for. The
    offset makes σ(scale · t + offset) the probability of relevance; 0 where a softmax was fitted, which ignores it.
    """

    scale: float
    offset: float
    method: Literal["temperature", "platt"]
    loss_before: float  # mean negative log-likelihood of the judgements with the teacher's own logits
    loss_after: float  # the same with the calibrated ones
    lists: int  # that took part; those without a positive or without a negative say nothing

    def __call__(self, scores: Sequence[float] | np.ndarray) -> np.ndarray:
        """Calibrate scores of any shape; float32."""
        return (self.scale * np.asarray(scores, dtype=np.float64) + self.offset).astype(np.float32)


def fit_calibration(
    scores: Sequence[Sequence[float] | np.ndarray],
    labels: Sequence[Sequence[int]],
    *,
    method: Literal["temperature", "platt"] = "temperature",
    anchor: float = 0.1,
) -> FittedCalibration:
    """Fit a teacher's scale to judged lists that no student is trained on or measured by.

    A reranker that was trained to sort is often far too sure, or not sure enough. `"temperature"` fits the softmax over
    each list, which the listwise losses use; `"platt"` the sigmoid of each logit, for preferences, thresholds and
    mixtures of teachers. Unjudged documents count as not relevant, so the fit errs towards a softer teacher.

    Args:
        scores: A teacher's raw logits of each list, such as `dev.train["scores"]` of a `DistillationDataset`.
        labels: Judged gains of the same documents; above 0 is relevant.
        method: What to fit.
        anchor: Weight of the KL divergence from the teacher's own distribution, which keeps a small dev set from
            throwing away what the teacher knows. 0 trusts the judgements alone.

    Raises:
        ValueError: Lists do not fit, a score is not finite, or no list has a positive and a negative.

    Source:
        Guo et al., ICML 2017 (https://arxiv.org/abs/1706.04599), and Platt scaling; the anchor to the teacher's own
        scores is that of online distillation (https://arxiv.org/abs/2409.12512).

    Example:
        >>> fitted = fit_calibration([[4.0, 0.0], [4.0, 0.0], [0.0, 4.0]], [[1, 0], [1, 0], [1, 0]], anchor=0)
        >>> round(fitted.scale, 2), bool(fitted.loss_after < fitted.loss_before)  # right in two of three lists
        (0.17, True)
    """
    if method not in ("temperature", "platt"):
        raise ValueError(f'method must be "temperature" or "platt", got {method!r}.')
    if not 0 <= anchor < np.inf:
        raise ValueError(f"anchor must be a finite number of at least 0, got {anchor}.")
    lists = _judged(scores, labels)
    if method == "temperature":
        shape = len(lists), max(len(values) for values, _ in lists)
        logits, target = np.full(shape, -np.inf), np.zeros(shape)
        for row, (values, positive) in enumerate(lists):
            logits[row, : len(values)], target[row, : len(values)] = values, positive / positive.sum()
    else:  # a softmax over (logit, 0) is the sigmoid
        logits, target = (np.concatenate([both[side] for both in lists]) for side in (0, 1))
        logits, target = np.stack([logits, 0 * logits], axis=1), np.stack([target, 1 - target], axis=1)
    there = np.isfinite(logits)
    log_p, target = log_softmax(logits, axis=1)[there], target[there]

    def losses(parameters: np.ndarray) -> tuple[float, float]:
        shifted = np.exp(parameters[0]) * logits
        shifted[:, 0] += parameters[1] if method == "platt" else 0.0
        log_q = log_softmax(shifted, axis=1)[there]
        return -float(target @ log_q) / len(logits), float(np.exp(log_p) @ (log_p - log_q)) / len(logits)

    start = np.zeros(2 if method == "platt" else 1)
    # Within a factor of 1000: lists that the teacher sorts perfectly would ask for an infinite scale.
    bounds = [(-np.log(1000), np.log(1000)), (-1000, 1000)][: len(start)]

    def objective(parameters: np.ndarray) -> float:
        judged, anchored = losses(parameters)
        return judged + anchor * anchored

    found = minimize(objective, start, method="L-BFGS-B", bounds=bounds).x
    return FittedCalibration(
        scale=float(np.exp(found[0])),
        offset=float(found[1]) if method == "platt" else 0.0,
        method=method,
        loss_before=losses(start)[0],
        loss_after=losses(found)[0],
        lists=len(lists),
    )


def _judged(
    scores: Sequence[Sequence[float] | np.ndarray], labels: Sequence[Sequence[int]]
) -> list[tuple[np.ndarray, np.ndarray]]:
    if len(scores) != len(labels):
        raise ValueError(f"Got {len(scores)} lists of scores and {len(labels)} of labels.")
    lists = []
    for row, (row_scores, row_labels) in enumerate(zip(scores, labels, strict=True)):
        values, positive = np.asarray(row_scores, dtype=np.float64), np.asarray(row_labels) > 0
        if values.shape != positive.shape or not np.isfinite(values).all():
            raise ValueError(f"List {row} has {positive.size} labels and the scores {_first_bad(values)}.")
        if positive.any() and not positive.all():
            lists.append((values, positive.astype(np.float64)))
    if not lists:
        raise ValueError(
            f"None of {len(scores)} lists has both a relevant and another document: nothing can be fitted."
        )
    return lists
