"""The one results object: what the terminal prints, the file keeps, the comparison reads and the card shows."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from st_wkl._versions import package_versions
from st_wkl.files import write_text
from st_wkl.markdown import markdown_table, markdown_text
from st_wkl.metrics import METRIC_LABELS

logger = logging.getLogger(__name__)

# 2 added groups, training queries, more metrics per query and the checksum; files of version 1 are read as they are.
SCHEMA_VERSION = 2
FILE_NAME = "results.json"
# The parts of a student's test queries, in the order in which tables show them.
SHARED, UNSEEN = "shared", "unseen"
# MTEB rounds its means to 5 decimals and we the queries' scores to 6; a larger gap means that they belong to
# different runs.
TOLERANCE = 1e-5
_DECIMALS = 6
_SHOWN_TASKS = 12


@dataclass(repr=False)
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
        if self.per_query and "ndcg_at_10" in self.metrics and abs(self.mean() - self.ndcg_at_10) > TOLERANCE:
            raise ValueError(
                f"{where}: the {len(self.per_query)} queries average to nDCG@10 {self.mean():.6f}, but the task's is "
                f"{self.ndcg_at_10:.6f}; the two come from different runs or different queries"
            )
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

    def __repr__(self) -> str:
        shown = [m for m in METRIC_LABELS if m in self.metrics] or [self.main_metric]
        values = ", ".join(f"{METRIC_LABELS.get(m, m)} {self.metrics[m]:.4f}" for m in shown)
        parts = ", ".join(f"{len(ids)} {group}" for group, ids in self.groups.items())
        queries = f", {len(self.per_query)} queries" * bool(self.per_query) + f" ({parts})" * bool(parts)
        return f"<TaskScores {self.title}: {values}{queries}>"

    @property
    def key(self) -> tuple[str, str, str]:
        """Task, split and subset."""
        return self.task, self.split, self.subset

    @property
    def title(self) -> str:
        """The task with its split, and the subset where there are several."""
        return f"{self.task} ({self.split}{'' if self.subset == 'default' else f', {self.subset}'})"

    def scores(self, metric: str = "ndcg_at_10") -> dict[str, float]:
        """Return a metric of every query: `"ndcg_at_10"`, or one of `query_metrics`.

        Raises:
            ValueError: If the metric was not kept per query, as in files of older versions.
        """
        kept = {"ndcg_at_10": self.per_query, **self.query_metrics}
        if metric not in kept:
            raise ValueError(
                f"{self.task}: {metric} is not kept per query, only {', '.join(kept)}; evaluate again to have it"
            )
        return kept[metric]

    def members(self, group: str | None = None) -> list[str]:
        """Return the ids of a group's queries, None for all; a ValueError says which groups there are."""
        if group is None:
            return list(self.per_query)
        if group not in self.groups:
            source = "a student that carries hashes of its training texts, or with evaluate(..., exposure=)"
            why = f"groups come with {source}"
            if self.groups and group in (SHARED, UNSEEN):
                other, ids = next(iter(self.groups.items()))
                why = f"all {len(ids)} queries are {other}, by the student's hashes or evaluate(..., exposure=)"
            raise ValueError(
                f"{self.task} ({self.split}) has the groups {', '.join(self.groups) or 'none'}, not {group!r}; {why}"
            )
        return self.groups[group]

    def mean(self, group: str | None = None, metric: str = "ndcg_at_10") -> float:
        """Return the mean of a metric, see `scores`, over one group of the queries, None for all.

        Raises:
            ValueError: If there is no such group, or nothing is kept per query.
        """
        return self.mean_over(self.members(group), metric)

    def mean_over(self, queries: Sequence[str], metric: str = "ndcg_at_10") -> float:
        """Return the mean of a metric over some queries, by their ids."""
        if not queries:
            raise ValueError(f"{self.task} ({self.split}) has no scores per query")
        values = self.scores(metric)
        return math.fsum(values[query] for query in queries) / len(queries)

    @property
    def ndcg_at_10(self) -> float:
        """nDCG@10 over all queries."""
        return self.metrics["ndcg_at_10"]

    @property
    def main_score(self) -> float:
        """Value of the task's main metric."""
        return self.metrics[self.main_metric]


@dataclass(repr=False)
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
    versions: dict[str, str] = field(default_factory=package_versions)
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def __repr__(self) -> str:
        """Return the table, cut where there are many tasks."""
        lines = self.table().splitlines()
        more = len(lines) - 2 - _SHOWN_TASKS
        if more > 0:
            lines = [*lines[: 2 + _SHOWN_TASKS], f"and {more} more; .table() shows all"]
        about = f"{self.model.get('class', 'model')}, revision {str(self.model.get('revision'))[:12]}, {self.created}"
        return "\n".join([f"Results of {self.name} ({about})", *lines])

    def _repr_html_(self) -> str:
        """Return the table as a notebook shows it."""
        header, rows = score_rows({self.name: self})
        cells = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
        head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
        return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"

    @property
    def name(self) -> str:
        """Name of the model."""
        return str(self.model["name"])

    @property
    def ndcg_at_10(self) -> float:
        """nDCG@10 of the only task; with several tasks use `results.task(name).ndcg_at_10`."""
        return self.task().ndcg_at_10

    def task(self, name: str | None = None, *, split: str | None = None, subset: str | None = None) -> TaskScores:
        """Return the scores of one task: the only one, or the only one of that name, split and subset.

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
        """Write the results to a `.json` file, or into a folder as `results.json`, in one step; return the file."""
        content = asdict(self)
        payload = {"format": "st-wkl results", "schema_version": SCHEMA_VERSION, "checksum": _checksum(content)}
        text = json.dumps({**payload, **content}, indent=2, ensure_ascii=False, allow_nan=False)
        return write_text(results_file(path), text + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Results:
        """Read results that `save` wrote: the file, or the folder that holds `results.json`.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is truncated, is no results file, was written by a newer st_wkl, or contradicts
                itself; the message says what to do.
        """
        file = results_file(path)
        if not file.is_file():
            what = "a file of another kind" if Path(path).is_file() else f"a folder without {FILE_NAME}"
            raise FileNotFoundError(
                f"{path} is {what if Path(path).exists() else 'not there'}; results are a .json file, or a folder with "
                f"{FILE_NAME}. `st-wkl evaluate MODEL TASK --output FILE.json` writes them."
            )
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


def _results_from(payload: dict[str, Any]) -> Results:
    """Build results from parsed JSON; a KeyError, TypeError or ValueError says what does not fit."""
    model, versions = payload["model"], payload["versions"]
    if not isinstance(model, dict) or not isinstance(model["name"], str) or not isinstance(model["revision"], str):
        raise TypeError("`model` needs a name and a revision")
    if not isinstance(payload["tasks"], list) or not isinstance(versions, dict):
        raise TypeError("`tasks` must be a list and `versions` a mapping")
    tasks = [TaskScores(**task) for task in payload["tasks"]]
    if payload["schema_version"] > 1 and payload["checksum"] != _checksum(payload):
        raise ValueError(
            "its model and scores were not written together, as when the results of two students are mixed in one file"
        )
    return Results(model=model, tasks=tasks, versions=versions, created=str(payload["created"]))


def _checksum(content: Mapping[str, Any]) -> str:
    """Return a hash of a model and its scores, which belong together."""
    text = json.dumps([content["model"], content["tasks"]], sort_keys=True, allow_nan=False)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


class _NotStrictJSON(ValueError):
    """A number that strict JSON does not have."""


def _refuse_constant(constant: str) -> float:
    raise _NotStrictJSON(f"it holds {constant}, which is no JSON number")


def results_file(path: str | Path) -> Path:
    """Return the file that `path` means: itself if it ends in .json, otherwise `results.json` inside it."""
    path = Path(path).expanduser()
    return path if path.suffix == ".json" else path / FILE_NAME


def check_replaceable(path: str | Path) -> None:
    """Raise FileExistsError, before any work, if results written to `path` would replace a file of somebody else."""
    file = results_file(path)
    if file.exists():
        try:
            Results.load(file)
        except ValueError as error:
            raise FileExistsError(f"{file} would be replaced: {error}, or choose another output") from error


def saved(results: Results, output: str | Path | None) -> Results:
    """Write the results where the caller wants them; scores that cannot be written are shown in the error."""
    if output is not None:
        try:
            logger.info("results written to %s", results.save(output))
        except OSError as error:
            error.add_note(f"The results could not be written to {output}. They are:\n{results.table()}")
            raise
    return results


def results_table(results: Mapping[str, Results]) -> str:
    """Return one markdown table for several results, a row per task and label.

    Where the parts of the queries that a student's training has touched are known, nDCG@10 is given three times: over
    all queries, over the shared and over the unseen ones, each with its number of queries. A row without parts of its
    own, such as the undistilled student's, is given over those of the other rows of its task, if they agree.

    Columns are the usual ranking metrics that occur, and the main metric of tasks that are ranked by another one.

    Args:
        results: Label of the row, such as `"before"`, to results.

    Example:
        >>> print(results_table({"before": before, "after": after}))  # doctest: +SKIP
    """
    header, rows = score_rows(results)
    rule = [":--", ":--", *["--:"] * (len(header) - 2)]
    return markdown_table([header, rule, *([*map(markdown_text, row[:2]), *row[2:]] for row in rows)])


def score_rows(results: Mapping[str, Results]) -> tuple[list[str], list[list[str]]]:
    """Return the header and the cells of `results_table`, as they are for any kind of table."""
    entries = [(label, scores) for label, one in results.items() for scores in one.tasks]
    # Rows of one task stand together, in the order in which the tasks first occur.
    order = {scores.key: place for place, (_, scores) in reversed(list(enumerate(entries)))}
    entries.sort(key=lambda entry: order[entry[1].key])
    metrics = [m for m in METRIC_LABELS if any(m in scores.metrics for _, scores in entries)]
    metrics += sorted({scores.main_metric for _, scores in entries} - set(metrics))
    groups = [common_groups([other for _, other in entries if _same_data(other, one)], one) for _, one in entries]
    shown = [group for group in (SHARED, UNSEEN) if any(group in parts for parts in groups)]
    place = 3 + (metrics.index("ndcg_at_10") + 1 if "ndcg_at_10" in metrics else len(metrics))
    header = ["Task", "Model", "Queries", *(METRIC_LABELS.get(m, m) for m in metrics)]
    header[place:place] = shown
    rows = []
    for (label, scores), parts in zip(entries, groups, strict=True):
        values = [f"{scores.metrics[m]:.4f}" if m in scores.metrics else "" for m in metrics]
        row = [scores.title, label, str(len(scores.per_query) or ""), *values]
        row[place:place] = [
            f"{scores.mean_over(ids):.4f} ({len(ids)})" if (ids := parts.get(group)) else "" for group in shown
        ]
        rows.append(row)
    return header, rows


def common_groups(entries: Iterable[TaskScores], scores: TaskScores) -> dict[str, list[str]]:
    """Return the groups to show `scores` by: its own, or those that all other entries of its task agree on."""
    if scores.groups:
        return scores.groups
    found = [entry.groups for entry in entries if entry.groups and entry.per_query.keys() == scores.per_query.keys()]
    as_sets = [{group: set(members) for group, members in groups.items()} for groups in found]
    return found[0] if found and all(groups == as_sets[0] for groups in as_sets) else {}


def _same_data(first: TaskScores, second: TaskScores) -> bool:
    return (first.key, first.dataset_revision) == (second.key, second.dataset_revision)
