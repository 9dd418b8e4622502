"""How often 95 % intervals hold the true mean: the published study's differences per query, drawn again and again.

Each comparison of the study is taken for the truth, samples of its queries are drawn with replacement, and the share of
the intervals is counted that hold the mean of all. It should be .950. A minute or two on one core:

    python examples/interval_coverage.py

"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

STUDY = Path(__file__).parent / "study" / "published" / "study" / "per_query.parquet"
SIZES, SAMPLES, RESAMPLES = (20, 50, 104, 300), 400, 1000
Interval = Callable[[np.ndarray, np.random.Generator], tuple[float, float]]


def resampled(values: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Return bootstrap samples, (resamples, queries)."""
    return values[generator.integers(len(values), size=(RESAMPLES, len(values)))]


def t_interval(values: np.ndarray, _: np.random.Generator) -> tuple[float, float]:
    """Return Student's t interval, what `compare` gives."""
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return values.mean() - half, values.mean() + half


def percentile(values: np.ndarray, generator: np.random.Generator) -> tuple[float, float]:
    """Return the percentile bootstrap, what the published study gives."""
    low, high = np.percentile(resampled(values, generator).mean(1), [2.5, 97.5])
    return low, high


def bootstrap_t(values: np.ndarray, generator: np.random.Generator) -> tuple[float, float]:
    """Return the studentised bootstrap; samples in which nothing moved have no t."""
    drawn, error = resampled(values, generator), stats.sem(values)
    errors = stats.sem(drawn, axis=1)
    t = (drawn.mean(1) - values.mean())[errors > 1e-12] / errors[errors > 1e-12]
    low, high = np.percentile(t, [2.5, 97.5]) if len(t) else (0.0, 0.0)
    return values.mean() - high * error, values.mean() - low * error


def bca(values: np.ndarray, generator: np.random.Generator) -> tuple[float, float]:
    """Return the bias-corrected and accelerated bootstrap."""
    means, mean = resampled(values, generator).mean(1), values.mean()
    below = np.mean(means < mean) + np.mean(means == mean) / 2
    bias = stats.norm.ppf(np.clip(below, 1 / RESAMPLES, 1 - 1 / RESAMPLES))
    apart = values - mean
    scale = 6 * (apart**2).sum() ** 1.5
    acceleration = (apart**3).sum() / scale if scale else 0.0
    shifted = bias + stats.norm.ppf([0.025, 0.975])
    low, high = np.percentile(means, 100 * stats.norm.cdf(bias + shifted / (1 - acceleration * shifted)))
    return low, high


def differences(scores: pd.DataFrame, method: str, trained_on: str, evaluated_on: str) -> np.ndarray:
    """Return a method's difference to KL on each query."""
    part = scores[(scores.trained_on == trained_on) & (scores.evaluated_on == evaluated_on)]
    table = part.pivot_table(index="query_id", columns="method", values="ndcg_at_10", observed=True).astype(float)
    return np.round((table[method] - table["KL"]).dropna().to_numpy(), 6)


def held(truth: np.ndarray, size: int, interval: Interval, samples: int = SAMPLES) -> float:
    """Return the share of intervals that hold the mean."""
    generator = np.random.default_rng(0)
    found = [interval(truth[generator.integers(len(truth), size=size)], generator) for _ in range(samples)]
    return float(np.mean([low - 1e-12 <= truth.mean() <= high + 1e-12 for low, high in found]))


def main() -> None:
    """Print one table for each comparison, and Student's t over all of them."""
    scores = pd.read_parquet(STUDY)
    for trained_on in scores.trained_on.unique():
        truth = differences(scores, "PairDistill", trained_on, "insuranceqa")
        print(f"\nPairDistill − KL on InsuranceQA, trained on {trained_on}: {np.mean(truth != 0):.0%} of queries moved")
        for interval in (t_interval, percentile, bootstrap_t, bca):
            print(f"{interval.__name__:12}", *(f"{size}: {held(truth, size, interval):.3f}" for size in SIZES))
    everything = [
        truth
        for trained_on in scores.trained_on.unique()
        for evaluated_on in scores.evaluated_on.unique()
        for method in scores.method.unique()
        if method != "KL"
        if (truth := differences(scores, method, trained_on, evaluated_on)).any()
    ]
    print(f"\nStudent's t, all {len(everything)} comparisons with KL: mean and worst")
    for size in SIZES:
        shares = []
        for truth in everything:
            drawn = truth[np.random.default_rng(0).integers(len(truth), size=(1000, size))]
            half = stats.t.ppf(0.975, size - 1) * stats.sem(drawn, axis=1)
            shares.append(np.mean(np.abs(drawn.mean(1) - truth.mean()) <= half + 1e-12))
        print(f"{size:12}: {np.mean(shares):.3f} {np.min(shares):.3f}")


if __name__ == "__main__":
    main()
