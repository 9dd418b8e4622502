"""Is one model better than another? A paired comparison over the same queries."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np

from st_wkl.evaluation.results import Results, TaskScores
from st_wkl.metrics import METRIC_LABELS

# Random draws are made in blocks of about this many numbers: 10,000 resamples of 10,000 queries take 800 MB at once.
_BLOCK = 2_000_000
# Means of the same numbers in another order differ in the last bits; without this a sign flip that changes nothing
# could miss the count.
_EPSILON = 1e-12
# From here on every comparison of the published study held the true mean in 90 % of its intervals or more.
FEW_QUERIES = 50
Interval = Literal["t", "percentile"]


@dataclass(frozen=True)
class PairedDifference:
    """A mean of paired differences and what chance could have made of it.

    Args:
        mean: Mean difference.
        low: Lower end of the mean's 95 % interval of the kind `interval`; -inf for a single pair, which has none.
        high: Upper end of it; inf for a single pair.
        p_value: Two-sided paired randomisation (sign-flip) test of "no difference".
        interval: `"t"` or `"percentile"`, see `paired_difference`.
    """

    mean: float
    low: float
    high: float
    p_value: float
    interval: Interval = field(default="t", kw_only=True)

    @property
    def holds_0(self) -> bool:
        """Whether the interval holds no difference."""
        return self.low <= 0 <= self.high

    def bounds(self, decimals: int = 4) -> str:
        """Return the interval in brackets, or that there is none."""
        if math.isinf(self.low):
            return "no interval of one query"
        return f"[{self.low:+.{decimals}f}, {self.high:+.{decimals}f}]"


@dataclass(frozen=True, repr=False)
class Comparison(PairedDifference):
    """The paired difference between two results, after minus before: a `PairedDifference`, and what it is of.

    Args:
        queries: Number of queries.
        wins: Queries on which `after` is better.
        ties: Queries on which both are equal to 6 decimals.
        losses: Queries on which `before` is better.
        metric: What was compared.
        group: The group of the queries that it was compared on; None for all, or for queries that were given.
        task: Name of the task; empty only where a comparison was not made by `compare`. So are those that follow.
        split: Split of the judgements.
        subset: MTEB's subset.
        models: Names of before and after.
        revisions: Their revisions, as in the results.
    """

    queries: int
    wins: int
    ties: int
    losses: int
    metric: str = "ndcg_at_10"
    group: str | None = None
    task: str = ""
    split: str = ""
    subset: str = ""
    models: tuple[str, str] = ("", "")
    revisions: tuple[str, str] = ("", "")

    def __str__(self) -> str:
        """Return the line that a person reads."""
        queries = f"{self.queries} {self.group} queries" if self.group else f"{self.queries} queries"
        bounds = self.bounds() if math.isinf(self.low) else f"95 % interval {self.bounds()}"
        return (
            f"{self.mean:+.4f} {self.label}, {bounds}, p = {self.p_value:.2g}, "
            f"{queries} ({self.wins} wins, {self.ties} ties, {self.losses} losses)"
            + (f"; too few queries: below {FEW_QUERIES} the interval may be too narrow" if self.too_few else "")
            + ("; the interval leaves out 0 and p does not: go by p" if self.may_be_chance and not self.holds_0 else "")
        )

    def __repr__(self) -> str:
        what = f" {self.task}, {self.models[0]} → {self.models[1]}:" if self.task else ""
        return f"<Comparison{what} {self}>"

    @property
    def label(self) -> str:
        """The metric as tables call it."""
        return METRIC_LABELS.get(self.metric, self.metric)

    @property
    def may_be_chance(self) -> bool:
        """Whether chance could have made the difference: the interval holds 0, or p is .05 or more.

        Over few queries the two need not agree. Student's t takes the differences for normal; the test, which turns
        their signs at random, takes nothing for granted, so that p counts.
        """
        return self.holds_0 or self.p_value >= 0.05

    @property
    def too_few(self) -> bool:
        """Whether there are too few queries for the interval to be relied on."""
        return self.queries < FEW_QUERIES


def paired_difference(
    differences: Sequence[float], *, resamples: int = 10_000, seed: int = 0, interval: Interval = "t"
) -> PairedDifference:
    """Return the mean of paired differences with its 95 % interval and p-value.

    The interval is Student's t over the pairs, the closest to 95 % where few queries move. Where 28 % did, it held the
    true mean in .950, .948, .963, .955 of samples of 20, 50, 104, 300 queries; the percentile bootstrap in .860, .912,
    .915, .927, bootstrap-t in .835, .875, .892, .917, BCa in .787, .848, .877, .920
    (`examples/interval_coverage.py`). Below 50 queries the worst comparison of the study fell under .90, so these are
    called too few. The p-value is the two-sided paired randomisation test (Smucker et al., CIKM 2007) with the observed
    assignment counted in, `(count + 1) / (n + 1)`.

    Args:
        differences: One number per query, after minus before, in any order that is the same each time.
        resamples: Number of sign flips (and bootstrap samples); 10,000 gives p-values down to 1e-4.
        seed: Seed of both.
        interval: `"t"`, or `"percentile"`: the percentile bootstrap (Sakai, SIGIR 2006) of the published study.

    Raises:
        ValueError: If there is no difference, one is not finite, `resamples` is below 1, or there is no such interval.

    Example:
        >>> paired_difference([0.5] * 5).bounds()
        '[+0.5000, +0.5000]'
    """
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}; it must be at least 1")
    values = np.asarray(differences, dtype=float)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"differences has the shape {values.shape}; give one number per query, and at least one")
    if not np.isfinite(values).all():
        position = int(np.flatnonzero(~np.isfinite(values))[0])
        raise ValueError(f"difference {position} is {values[position]}; leave out queries that have no score")
    if interval not in get_args(Interval):
        raise ValueError(f"interval is {interval!r}; it must be one of {', '.join(get_args(Interval))}")
    generator, mean, n = np.random.default_rng(seed), float(values.mean()), len(values)
    low, high = -math.inf, math.inf
    if interval == "percentile":
        drawn = [values[generator.integers(n, size=(block, n))].mean(axis=1) for block in blocks(resamples, n)]
        low, high = (low, high) if n == 1 else map(float, np.percentile(np.concatenate(drawn), [2.5, 97.5]))
    elif n > 1:
        from scipy.stats import t

        half = float(t.ppf(0.975, n - 1) * values.std(ddof=1) / np.sqrt(n))
        low, high = mean - half, mean + half
    count = 0
    for block in blocks(resamples, n):
        signs = generator.integers(0, 2, size=(block, n), dtype=np.int8) * 2 - 1
        count += int((np.abs(signs @ values) / n >= abs(values.mean()) - _EPSILON).sum())
    return PairedDifference(mean, low, high, (count + 1) / (resamples + 1), interval=interval)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for testing several hypotheses at once, in the order given.

    Holm's step-down method (Scandinavian Journal of Statistics 1979) bounds the chance of any false discovery, whatever
    the dependence between the tests.

    Raises:
        ValueError: If a p-value is not within [0, 1].

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    wrong = [p for p in p_values if not 0 <= p <= 1]
    if wrong:
        raise ValueError(f"{wrong[0]} is not a p-value: it must lie within [0, 1]")
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, p_values[i] * (len(p_values) - rank)))
        corrected[i] = largest
    return corrected


def compare(
    before: Results,
    after: Results,
    *,
    task: str | None = None,
    query_ids: Iterable[str] | None = None,
    group: str | None = None,
    metric: str = "ndcg_at_10",
    resamples: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """Compare two results query by query, with interval and p-value of `paired_difference`.

    Args:
        before: Results of the first model.
        after: Results of the second; differences are `after - before`.
        task: Name of the task; None for the only one that both have.
        query_ids: Restrict to these queries, for example those of one language. None for all.
        group: Restrict to one group of the queries, `"shared"` or `"unseen"`, as `after` has it, or else `before`.
        metric: What to compare; a metric that both keep per query, see `TaskScores.scores`.
        resamples: Number of sign flips; 10,000 gives p-values down to 1e-4.
        seed: Seed of the sign flips.

    Raises:
        TypeError: If `before` or `after` is no `Results`.
        ValueError: If the task is ambiguous, was evaluated on different data or on different queries, has no per-query
            scores, `query_ids` is empty, repeats itself or names unknown queries, or there is no such group.

    Example:
        >>> print(compare(evaluate("before", "NFCorpus"), evaluate("after", "NFCorpus")))  # doctest: +SKIP
    """
    check_results(("before", before), ("after", after))
    if task is None:
        common = sorted({t.task for t in before.tasks} & {t.task for t in after.tasks})
        if len(common) != 1:
            raise ValueError(
                f"the two results share {len(common)} tasks, not one ({tasks_of(before, after)}); name it with task="
            )
        task = common[0]
    first, second = before.task(task), after.task(task)
    if group is not None:
        if query_ids is not None:
            raise ValueError("give query_ids or group, not both")
        query_ids = (second if second.groups or not first.groups else first).members(group)
    return compared((before, first), (after, second), after.name, query_ids, group, metric, resamples, seed)


def check_results(*given: tuple[str, object]) -> None:
    """Stop at what is no results, by the name of the argument or the label that it was given under."""
    for what, one in given:
        if not isinstance(one, Results):
            raise TypeError(
                f"{what} is a {type(one).__name__}; compare Results: what evaluate returns, or Results.load reads"
            )


def tasks_of(*results: Results) -> str:
    """Return a phrase on the tasks that each of the results has."""
    return " and ".join(f"{r.name}: {', '.join(t.task for t in r.tasks) or 'none'}" for r in results)


def compared(
    before: tuple[Results, TaskScores],
    after: tuple[Results, TaskScores],
    label: str,
    query_ids: Iterable[str] | None,
    group: str | None,
    metric: str,
    resamples: int,
    seed: int,
) -> Comparison:
    """Compare two entries for one task on all or some queries, or say what makes them no pair; `label` is after's."""
    (one, first), (other, second) = before, after
    for name in ("split", "subset", "dataset_revision"):
        left, right = getattr(first, name), getattr(second, name)
        if left != right:
            raise ValueError(
                f"{first.task}: {name} is {left!r} for {one.name} and {right!r} for {label}; "
                "evaluate both on the same data"
            )
    queries = _same_queries(first, second, query_ids)
    x, y = first.scores(metric), second.scores(metric)
    # The scores have 6 decimals; what lies below is float noise, not a win.
    differences = np.round([y[query] - x[query] for query in queries], 6)
    found = paired_difference(differences.tolist(), resamples=resamples, seed=seed)
    counts = (int((differences > 0).sum()), int((differences == 0).sum()), int((differences < 0).sum()))
    return Comparison(
        *(found.mean, found.low, found.high, found.p_value, len(queries), *counts, metric, group, *first.key),
        models=(one.name, other.name),
        revisions=(str(one.model.get("revision", "")), str(other.model.get("revision", ""))),
    )


def _same_queries(first: TaskScores, second: TaskScores, query_ids: Iterable[str] | None) -> list[str]:
    """Return the ids to compare on, or say which queries do not match."""
    different = sorted(first.per_query.keys() ^ second.per_query.keys())
    if different:
        raise ValueError(
            f"{first.task}: {len(different)} queries were evaluated for one model only, such as "
            f"{', '.join(different[:5])}; evaluate both on the same queries"
        )
    queries = list(first.per_query) if query_ids is None else list(query_ids)
    if not queries:
        raise ValueError(f"{first.task}: there is no query to compare on")
    unknown = [query for query in queries if query not in first.per_query]
    if unknown:
        raise ValueError(
            f"{first.task}: {len(unknown)} of query_ids were not evaluated, such as {', '.join(unknown[:5])}"
        )
    if len(set(queries)) != len(queries):
        raise ValueError(f"{first.task}: query_ids holds {len(queries) - len(set(queries))} ids more than once")
    return queries


def blocks(resamples: int, queries: int) -> Iterator[int]:
    """Yield how many resamples to draw at once, so that a block holds at most `_BLOCK` numbers."""
    size = max(1, _BLOCK // queries)
    for start in range(0, resamples, size):
        yield min(size, resamples - start)
