"""The one results object: what the terminal prints, the file keeps, the comparison reads and the card shows."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from platform import python_version
from typing import Any

from st_wkl._files import write_text
from st_wkl._versions import installed_versions

SCHEMA_VERSION = 1
FILE_NAME = "results.json"
METRIC_LABELS = {
    "ndcg_at_10": "nDCG@10",
    "map_at_1000": "MAP@1000",
    "mrr_at_10": "MRR@10",
    "recall_at_10": "Recall@10",
    "recall_at_100": "Recall@100",
}
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

    Raises:
        ValueError: If a query's score is not finite, the main metric is missing, or the mean of `per_query` differs
            from `metrics["ndcg_at_10"]` by more than 1e-5.
    """

    task: str
    split: str
    subset: str
    main_metric: str
    metrics: dict[str, float]
    per_query: dict[str, float]
    dataset_revision: str
    seconds: float

    def __post_init__(self) -> None:
        """Turn every number into a finite float and check that the queries add up to the whole."""
        self.metrics = {name: float(value) for name, value in self.metrics.items() if math.isfinite(value)}
        self.per_query = {query: round(float(score), _DECIMALS) for query, score in self.per_query.items()}
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

    @property
    def ndcg_at_10(self) -> float:
        """nDCG@10 over all queries."""
        return self.metrics["ndcg_at_10"]

    @property
    def main_score(self) -> float:
        """Value of the task's main metric."""
        return self.metrics[self.main_metric]


@dataclass
class Results:
    """Everything that one evaluation of one model says; saved as strict JSON.

    Args:
        model: `name`, `revision` (a hash of weights and settings) and `class` of the model, and what else describes it.
        tasks: One entry per task, split and subset.
        versions: Package name to version, of those that decide a score.
        created: When, ISO 8601 in UTC.

    Example:
        >>> results = Results.load("student/results.json")  # doctest: +SKIP
        >>> results.ndcg_at_10, results.task("scifact").metrics["recall_at_100"]  # doctest: +SKIP
    """

    model: dict[str, Any]
    tasks: list[TaskScores]
    versions: dict[str, str] = field(default_factory=lambda: package_versions())
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    @property
    def name(self) -> str:
        """Name of the model."""
        return str(self.model["name"])

    @property
    def ndcg_at_10(self) -> float:
        """nDCG@10 of the only task; with several tasks use `results.task(name).ndcg_at_10`."""
        return self.task().ndcg_at_10

    def task(self, name: str | None = None, *, split: str | None = None, subset: str | None = None) -> TaskScores:
        """Return the scores of one task.

        Args:
            name: Task name; None for the only one.
            split: Needed where the task was evaluated on several splits.
            subset: Needed where the task has several subsets.

        Raises:
            ValueError: If no task or more than one fits; the message lists what there is.
        """
        wanted = {"task": name, "split": split, "subset": subset}
        found = [t for t in self.tasks if all(v is None or getattr(t, k) == v for k, v in wanted.items())]
        if len(found) == 1:
            return found[0]
        what = ", ".join(f"{k} {v!r}" for k, v in wanted.items() if v is not None) or "one task"
        have = ", ".join(f"{t.task} ({t.split}, {t.subset})" for t in self.tasks) or "nothing"
        raise ValueError(f"results of {self.name}: {len(found)} entries fit {what}, not one; there is {have}")

    def table(self) -> str:
        """Return the scores as a markdown table, one row per task."""
        return results_table({self.name: self})

    def save(self, path: str | Path) -> Path:
        """Write the results in one step and return the file.

        Args:
            path: A `.json` file, or a folder that gets `results.json`.
        """
        payload = {"format": "st-wkl results", "schema_version": SCHEMA_VERSION, **asdict(self)}
        text = json.dumps(payload, indent=2, ensure_ascii=False, allow_nan=False)
        return write_text(results_file(path), text + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Results:
        """Read results that `save` wrote.

        Args:
            path: The file, or the folder that holds `results.json`.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is truncated, is no results file, was written by a newer st_wkl, or contradicts
                itself; the message says what to do.
        """
        file = results_file(path)
        try:
            payload = json.loads(file.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
        except (json.JSONDecodeError, UnicodeDecodeError, _NotStrictJSON) as error:
            raise ValueError(
                f"{file} is damaged or incomplete ({error}); delete it and run the evaluation again"
            ) from error
        if not isinstance(payload, dict) or "schema_version" not in payload:
            raise ValueError(f"{file} is not a results file of st_wkl: it has no schema_version; check the path")
        schema = payload["schema_version"]
        if not isinstance(schema, int) or schema > SCHEMA_VERSION:
            raise ValueError(
                f"{file} has schema_version {schema!r}, this st_wkl reads up to {SCHEMA_VERSION}; "
                "upgrade with `pip install -U st-wkl`"
            )
        try:
            return _results_from(payload)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{file} cannot be used: {reason}; run the evaluation again") from error


@dataclass(frozen=True)
class Comparison:
    """The paired difference in nDCG@10 between two results, after minus before.

    Args:
        mean: Mean difference over the queries.
        low: Lower end of the 95 % bootstrap percentile interval of the mean.
        high: Upper end of it.
        p_value: Two-sided paired randomisation (sign-flip) test of "no difference".
        queries: Number of queries.
        wins: Queries on which `after` is better.
        ties: Queries on which both are equal to 6 decimals.
        losses: Queries on which `before` is better.
    """

    mean: float
    low: float
    high: float
    p_value: float
    queries: int
    wins: int
    ties: int
    losses: int

    def __str__(self) -> str:
        """Return the line that a person reads."""
        return (
            f"{self.mean:+.4f} nDCG@10, 95 % interval [{self.low:+.4f}, {self.high:+.4f}], p = {self.p_value:.2g}, "
            f"{self.queries} queries ({self.wins} wins, {self.ties} ties, {self.losses} losses)"
        )


def results_table(results: Mapping[str, Results]) -> str:
    """Return one markdown table for several results, a row per task and label.

    Args:
        results: Label of the row, such as `"before"`, to results.

    Returns:
        A table whose lines end in newlines except for the last. Columns are the usual ranking metrics that occur, and
        the main metric of tasks that are ranked by another one.

    Example:
        >>> print(results_table({"before": before, "after": after}))  # doctest: +SKIP
    """
    rows = [(label, scores) for label, entry in results.items() for scores in entry.tasks]
    # Rows of one task stand together, in the order in which the tasks first occur.
    order = {(s.task, s.split, s.subset): position for position, (_, s) in reversed(list(enumerate(rows)))}
    rows.sort(key=lambda row: order[row[1].task, row[1].split, row[1].subset])
    columns = [m for m in METRIC_LABELS if any(m in s.metrics for _, s in rows)]
    columns += sorted({s.main_metric for _, s in rows} - set(columns))
    header = ["Task", "Model", "Queries", *(METRIC_LABELS.get(m, m) for m in columns)]
    lines = [header, [":--", ":--", *["--:"] * (len(header) - 2)]]
    for label, scores in rows:
        subset = "" if scores.subset == "default" else f", {scores.subset}"
        values = [f"{scores.metrics[m]:.4f}" if m in scores.metrics else "" for m in columns]
        queries = str(len(scores.per_query)) if scores.per_query else ""
        lines.append([f"{scores.task} ({scores.split}{subset})", label, queries, *values])
    return "\n".join("| " + " | ".join(markdown_cell(cell) for cell in line) + " |" for line in lines)


def markdown_cell(text: str) -> str:
    """Return `text` so that it stays inside one cell of a markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def results_file(path: str | Path) -> Path:
    """Return the file that `path` means: itself if it ends in .json, otherwise `results.json` inside it."""
    path = Path(path)
    return path if path.suffix == ".json" else path / FILE_NAME


def package_versions(packages: Iterable[str] = ()) -> dict[str, str]:
    """Return the versions of what decides a score."""
    names = packages or ("mteb", "sentence-transformers", "transformers", "torch", "numpy", "pytrec-eval-terrier")
    return {"python": python_version(), **installed_versions(("st-wkl", *names))}


class _NotStrictJSON(ValueError):
    """A number that strict JSON does not have."""


def _refuse_constant(constant: str) -> float:
    raise _NotStrictJSON(f"it holds {constant}, which is no JSON number")


def _results_from(payload: dict[str, Any]) -> Results:
    """Build results from parsed JSON; a KeyError, TypeError or ValueError says what does not fit."""
    model, versions = payload["model"], payload["versions"]
    if not isinstance(model, dict) or not isinstance(model["name"], str) or not isinstance(model["revision"], str):
        raise TypeError("`model` needs a name and a revision")
    if not isinstance(payload["tasks"], list) or not isinstance(versions, dict):
        raise TypeError("`tasks` must be a list and `versions` a mapping")
    tasks = [TaskScores(**task) for task in payload["tasks"]]
    return Results(model=model, tasks=tasks, versions=versions, created=str(payload["created"]))
