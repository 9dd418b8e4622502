"""The results part of a model card: each number with its interval, over all queries and over their parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from st_wkl.evaluation.compare import paired_difference
from st_wkl.evaluation.results import METRIC_LABELS, Results, TaskScores, markdown_cell

_PARTS = {"shared": "its documents were in training", "unseen": "its documents were not"}
_MEANING = (
    "Part of the test queries have a relevant document that was also a positive of the training data; a student can "
    "have learnt that document by heart. **The row of documents that were not in training is the one to expect on a "
    "collection of your own.**"
)


def results_section(results: Mapping[str, Results]) -> str:
    """Return a table per task, with a column per label and rows for metrics and parts of the queries."""
    tasks: dict[tuple[str, str, str], dict[str, TaskScores]] = {}
    for label, entry in results.items():
        for scores in entry.tasks:
            tasks.setdefault((scores.task, scores.split, scores.subset), {})[label] = scores
    parts = [table for (task, split, subset), columns in tasks.items() for table in _task(task, split, subset, columns)]
    if any(scores.per_query for columns in tasks.values() for scores in columns.values()):
        parts.append("In brackets: 95 % interval of the mean, a bootstrap over queries.")
    if any(getattr(scores, "groups", None) for columns in tasks.values() for scores in columns.values()):
        parts.append(_MEANING)
    return "\n\n".join(parts)


def parts_of(columns: Mapping[str, TaskScores]) -> dict[str, list[str]]:
    """Return the parts of the queries that one of the columns knows, if all columns have these queries."""
    for scores in columns.values():
        groups: dict[str, list[str]] = getattr(scores, "groups", None) or {}
        if groups and all(other.per_query.keys() == scores.per_query.keys() for other in columns.values()):
            return groups
    return {}


def _task(task: str, split: str, subset: str, columns: Mapping[str, TaskScores]) -> Iterator[str]:
    yield f"**{markdown_cell(task)}** (split `{split}`{'' if subset == 'default' else f', subset `{subset}`'})"
    header = ["", "Queries", *columns]
    lines = [header, [":--", *["--:"] * (len(header) - 1)]]
    counts = {len(scores.per_query) for scores in columns.values() if scores.per_query}
    queries = " / ".join(f"{count:,}" for count in sorted(counts))
    metrics = [m for m in METRIC_LABELS if any(m in scores.metrics for scores in columns.values())]
    metrics += sorted({scores.main_metric for scores in columns.values()} - set(metrics))
    groups = parts_of(columns)
    for metric in metrics:
        label = METRIC_LABELS.get(metric, metric)
        lines.append([label, queries, *(_value(scores, metric) for scores in columns.values())])
        if metric == "ndcg_at_10":
            lines += [
                [f"{label}, {_PARTS.get(part, part)}", f"{len(ids):,}", *(_mean(s, ids) for s in columns.values())]
                for part, ids in groups.items()
            ]
    yield "\n".join("| " + " | ".join(markdown_cell(cell) for cell in line) + " |" for line in lines)


def _value(scores: TaskScores, metric: str) -> str:
    if metric not in scores.metrics:
        return ""
    value = f"{scores.metrics[metric]:.4f}"
    if metric != "ndcg_at_10" or not scores.per_query:
        return value
    return f"{value} {_interval(list(scores.per_query.values()))}"


def _mean(scores: TaskScores, ids: list[str]) -> str:
    values = [scores.per_query[query] for query in ids]
    return f"{sum(values) / len(values):.4f} {_interval(values)}"


def _interval(values: list[float]) -> str:
    found = paired_difference(values)  # from zero, which is the mean itself
    return f"[{found.low:.3f}, {found.high:.3f}]"
