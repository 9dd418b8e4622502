"""The scores of one model on one task, with those of every query: finite, and adding up."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

METRIC_LABELS = {
    "ndcg_at_10": "nDCG@10",
    "map_at_1000": "MAP@1000",
    "mrr_at_10": "MRR@10",
    "recall_at_10": "Recall@10",
    "recall_at_100": "Recall@100",
}
# The parts of a student's test queries, in the order in which tables show them.
SHARED, UNSEEN = "shared", "unseen"
# MTEB rounds its means to 5 decimals and we the queries' scores to 6; a larger gap means that they belong to
# different runs.
TOLERANCE = 1e-5
_DECIMALS = 6


@dataclass
class TaskScores:
    """The scores of one model on one task, split and subset.

    Metrics that are not finite are dropped (MTEB's nAUC may be NaN, which JSON cannot hold) and every number becomes a
    Python float.

    Args:
        task: Name of the MTEB task or of the collection.
        split: Split of the judgements, such as `"test"`.
        subset: MTEB's subset, `"default"` where there is one only.
        main_metric: Key in `metrics` by which the task is ranked.
        metrics: Metric name as MTEB writes it, such as `"ndcg_at_10"`, to its value between 0 and 1.
        per_query: Query id to nDCG@10, rounded to 6 decimals; empty for a task that is not a retrieval task.
        dataset_revision: What was evaluated on: a Hub commit, or the fingerprint of the collection.
        seconds: Wall-clock seconds of MTEB's evaluation of the task, all its splits together.
        groups: Parts of the queries by what the student's training has seen: `"shared"` (a relevant document of the
            query was a training positive) and `"unseen"` (none was), each with at least one query id. Empty where it is
            not known what the model was trained on.
        training_queries: Ids of the test queries whose very text was a training query; they are in a group as well.
        query_metrics: Further metrics per query, such as `"recall_at_100"`, to query id to value.

    Raises:
        ValueError: If a query's score is not finite, the main metric is missing, the mean of `per_query` differs
            from `metrics["ndcg_at_10"]` by more than 1e-5, or a group or a metric does not hold the task's queries.
    """

    task: str
    split: str
    subset: str
    main_metric: str
    metrics: dict[str, float]
    per_query: dict[str, float]
    dataset_revision: str
    seconds: float
    groups: dict[str, list[str]] = field(default_factory=dict)
    training_queries: list[str] = field(default_factory=list)
    query_metrics: dict[str, dict[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Turn every number into a finite float and check that the queries add up to the whole."""
        self.metrics = {name: float(value) for name, value in self.metrics.items() if math.isfinite(value)}
        self.per_query = {query: round(float(score), _DECIMALS) for query, score in self.per_query.items()}
        self.query_metrics = {
            metric: {query: round(float(value), _DECIMALS) for query, value in values.items()}
            for metric, values in self.query_metrics.items()
        }
        self.seconds = float(self.seconds)
        where = f"{self.task} ({self.split})"
        for query, score in self.per_query.items():
            if not math.isfinite(score):
                raise ValueError(f"{where}: nDCG@10 of query {query!r} is {score}; every query needs a finite score")
        if self.main_metric not in self.metrics:
            raise ValueError(f"{where}: the main metric {self.main_metric!r} is missing or not finite")
        ndcg = self.metrics.get("ndcg_at_10")
        if self.per_query and ndcg is not None:
            mean = math.fsum(self.per_query.values()) / len(self.per_query)
            if abs(mean - ndcg) > TOLERANCE:
                raise ValueError(
                    f"{where}: the {len(self.per_query)} queries average to nDCG@10 {mean:.6f}, but the task's is "
                    f"{ndcg:.6f}; the two come from different runs or different queries"
                )
        self._check_parts(where)

    def _check_parts(self, where: str) -> None:
        """Stop where a group, or a metric per query, is about other queries than the task's."""
        for metric, values in self.query_metrics.items():
            if values.keys() != self.per_query.keys() or not all(map(math.isfinite, values.values())):
                raise ValueError(f"{where}: {metric} per query needs a finite value for each of the task's queries")
        grouped = [query for group in self.groups.values() for query in group]
        if not all(self.groups.values()) or len(set(grouped)) != len(grouped):
            raise ValueError(f"{where}: a group is empty, or a query stands in two; leave out empty groups")
        if unknown := [query for query in [*grouped, *self.training_queries] if query not in self.per_query]:
            raise ValueError(
                f"{where}: {len(unknown)} queries of the groups were not evaluated, such as {', '.join(unknown[:5])}"
            )

    def scores(self, metric: str = "ndcg_at_10") -> dict[str, float]:
        """Return a metric of every query.

        Args:
            metric: `"ndcg_at_10"`, or one of `query_metrics`: `"recall_at_10"`, `"recall_at_100"`, `"mrr_at_10"`.

        Raises:
            ValueError: If the metric was not kept per query, as in files of older versions.
        """
        if metric == "ndcg_at_10":
            return self.per_query
        if metric not in self.query_metrics:
            have = ", ".join(["ndcg_at_10", *self.query_metrics])
            raise ValueError(f"{self.task}: {metric} is not kept per query, only {have}; evaluate again to have it")
        return self.query_metrics[metric]

    def members(self, group: str | None = None) -> list[str]:
        """Return the ids of a group's queries; None for all.

        Raises:
            ValueError: If there is no such group.
        """
        if group is None:
            return list(self.per_query)
        if group not in self.groups:
            why = (
                "groups come with a student that carries hashes of its training texts, or with evaluate(..., exposure=)"
            )
            if self.groups and group in (SHARED, UNSEEN):
                other = next(iter(self.groups))
                count = len(self.groups[other])
                why = f"all {count} queries are {other}, by the student's hashes or evaluate(..., exposure=)"
            raise ValueError(
                f"{self.task} ({self.split}) has the groups {', '.join(self.groups) or 'none'}, not {group!r}; {why}"
            )
        return self.groups[group]

    def mean(self, group: str | None = None, metric: str = "ndcg_at_10") -> float:
        """Return the mean of a metric over one group of the queries.

        Args:
            group: `"shared"` or `"unseen"`, if `groups` has it; None for all queries.
            metric: A metric that is kept per query, see `scores`.

        Raises:
            ValueError: If there is no such group, or nothing is kept per query.

        Example:
            >>> {group: scores.mean(group) for group in scores.groups}  # doctest: +SKIP
        """
        values, queries = self.scores(metric), self.members(group)
        if not queries:
            raise ValueError(f"{self.task} ({self.split}) has no scores per query")
        return math.fsum(values[query] for query in queries) / len(queries)

    @property
    def ndcg_at_10(self) -> float:
        """nDCG@10 over all queries."""
        return self.metrics["ndcg_at_10"]

    @property
    def main_score(self) -> float:
        """Value of the task's main metric."""
        return self.metrics[self.main_metric]
