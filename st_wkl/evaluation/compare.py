"""Is one model better than another? A paired comparison over the same queries."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from st_wkl.evaluation.results import Comparison, Results, TaskScores

# Random draws are made in blocks of about this many numbers: 10,000 resamples of 10,000 queries take 800 MB at once.
_BLOCK = 2_000_000
# Means of the same numbers in another order differ in the last bits; without this a sign flip that changes nothing
# could miss the count.
_EPSILON = 1e-12


def compare(
    before: Results,
    after: Results,
    *,
    task: str | None = None,
    query_ids: Iterable[str] | None = None,
    resamples: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """Compare two results query by query.

    The interval is the percentile bootstrap over queries (Sakai, SIGIR 2006), the p-value the two-sided paired
    randomisation test (Smucker et al., CIKM 2007) with the observed assignment counted in, `(count + 1) / (n + 1)`.

    Args:
        before: Results of the first model.
        after: Results of the second; differences are `after - before`.
        task: Name of the task; None for the only one that both have.
        query_ids: Restrict to these queries, for example one part of `shared_document_queries`. None for all.
        resamples: Number of bootstrap samples and of sign flips; 10,000 gives p-values down to 1e-4.
        seed: Seed of both.

    Returns:
        Mean difference in nDCG@10 with its 95 % interval, p-value, and the number of wins, ties and losses.

    Raises:
        ValueError: If the task is ambiguous, was evaluated on different data or on different queries, has no per-query
            scores, or `query_ids` is empty, repeats itself or names unknown queries.

    Example:
        >>> print(compare(evaluate("before", "NFCorpus"), evaluate("after", "NFCorpus")))  # doctest: +SKIP
    """
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}; it must be at least 1")
    first, second = _same_task(before, after, task)
    queries = _same_queries(first, second, query_ids)
    differences = np.array([second.per_query[query] - first.per_query[query] for query in queries])
    differences = np.round(differences, 6)  # the scores have 6 decimals; what lies below is float noise, not a win
    generator = np.random.default_rng(seed)
    low, high = _bootstrap_interval(differences, resamples, generator)
    return Comparison(
        mean=float(differences.mean()),
        low=low,
        high=high,
        p_value=_randomisation_p_value(differences, resamples, generator),
        queries=len(queries),
        wins=int((differences > 0).sum()),
        ties=int((differences == 0).sum()),
        losses=int((differences < 0).sum()),
    )


def _same_task(before: Results, after: Results, task: str | None) -> tuple[TaskScores, TaskScores]:
    """Return the entries of both results for the one task that they are compared on."""
    if task is None:
        common = sorted({t.task for t in before.tasks} & {t.task for t in after.tasks})
        if len(common) != 1:
            have = " and ".join(f"{r.name}: {', '.join(t.task for t in r.tasks) or 'none'}" for r in (before, after))
            raise ValueError(f"the two results share {len(common)} tasks, not one ({have}); name it with task=")
        task = common[0]
    first, second = before.task(task), after.task(task)
    for field in ("split", "subset", "dataset_revision"):
        left, right = getattr(first, field), getattr(second, field)
        if left != right:
            raise ValueError(
                f"{task}: {field} is {left!r} for {before.name} and {right!r} for {after.name}; "
                "evaluate both on the same data"
            )
    return first, second


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


def _blocks(resamples: int, queries: int) -> Iterator[int]:
    """Yield how many resamples to draw at once, so that a block holds at most `_BLOCK` numbers."""
    size = max(1, _BLOCK // queries)
    for start in range(0, resamples, size):
        yield min(size, resamples - start)


def _bootstrap_interval(differences: np.ndarray, resamples: int, generator: np.random.Generator) -> tuple[float, float]:
    """Return the 2.5 % and 97.5 % percentiles of the mean over queries drawn with replacement."""
    n = len(differences)
    means = [differences[generator.integers(n, size=(block, n))].mean(axis=1) for block in _blocks(resamples, n)]
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(low), float(high)


def _randomisation_p_value(differences: np.ndarray, resamples: int, generator: np.random.Generator) -> float:
    """Return how often random signs give a mean at least as far from 0 as the observed one."""
    n = len(differences)
    observed = abs(differences.mean())
    count = 0
    for block in _blocks(resamples, n):
        signs = generator.integers(0, 2, size=(block, n), dtype=np.int8) * 2 - 1
        count += int((np.abs(signs @ differences) / n >= observed - _EPSILON).sum())
    return (count + 1) / (resamples + 1)
