"""The results part of a model card: each number with its interval, over all queries and over their parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from st_wkl.evaluation.compare import Comparison, paired_difference
from st_wkl.evaluation.results import SHARED, UNSEEN, Results, TaskScores
from st_wkl.markdown import markdown_code, markdown_table, markdown_text
from st_wkl.metrics import METRIC_LABELS

_PARTS = {SHARED: "with a seen document", UNSEEN: "with none seen"}
# Of means that were rounded to 5 decimals on both sides.
_ROUNDING = 1e-4
_MEANING = (
    "Part of the test queries have a relevant document that was also a positive of the training data, a seen one; a "
    "student can have learnt it by heart. **The row with none seen is the one to expect on a collection "
    "of your own.**"
)


def results_section(results: Mapping[str, Results], told: str | None = None) -> str:
    """Return a table per task, with a column per label and rows for metrics and parts of the queries.

    Below each stands the paired difference between "after" and "before", of the parts, too.

    Args:
        results: Label of the column to results.
        told: The task whose difference over all queries is told elsewhere.

    Raises:
        ValueError: If two columns of a task were measured on different data.
    """
    tasks: dict[tuple[str, str, str], dict[str, TaskScores]] = {}
    for label, entry in results.items():
        for scores in entry.tasks:
            tasks.setdefault((scores.task, scores.split, scores.subset), {})[label] = scores
    for columns in tasks.values():
        _check_same_data(columns)
    parts: list[str] = []
    for (task, split, subset), columns in tasks.items():
        parts += [*_task(task, split, subset, columns), *_differences(columns, task == told)]
    if any(scores.per_query for columns in tasks.values() for scores in columns.values()):
        parts.append("In brackets: 95 % interval of the mean, a bootstrap over queries.")
    if any(len(parts_of(columns)) > 1 for columns in tasks.values()):
        parts.append(_MEANING)
    return "\n\n".join(parts)


def _check_same_data(columns: Mapping[str, TaskScores]) -> None:
    (first, one), *others = columns.items()
    for label, other in others:
        both = one.per_query and other.per_query
        if both and one.dataset_revision != other.dataset_revision and one.per_query.keys() != other.per_query.keys():
            raise ValueError(
                f"{one.task}: {first!r} ({len(one.per_query)} queries, data {one.dataset_revision}) and {label!r} "
                f"({len(other.per_query)} queries, data {other.dataset_revision}) were measured on different data and "
                "cannot stand side by side; evaluate both on the same"
            )


def compared_task(comparison: Comparison, results: Mapping[str, Results]) -> str | None:
    """Return the task that a comparison is of, as far as the results tell.

    Raises:
        ValueError: If it is not one between these results, as when those of two students are mixed.
    """
    before, after = results.get("before"), results.get("after")
    if before is None or after is None or comparison.group:
        return None
    means = {(scores.task, scores.split, scores.subset): scores.metrics for scores in before.tasks}
    pairs = [(means.get((s.task, s.split, s.subset), {}).get("ndcg_at_10"), s) for s in after.tasks]
    found = [
        (s.metrics["ndcg_at_10"] - mean, s.task) for mean, s in pairs if mean is not None and "ndcg_at_10" in s.metrics
    ]
    if found and comparison.metric == "ndcg_at_10":
        nearest, task = min(found, key=lambda difference: abs(difference[0] - comparison.mean))
        if abs(nearest - comparison.mean) > _ROUNDING:
            raise ValueError(
                f"the comparison says {comparison.mean:+.4f} nDCG@10, but {after.name!r} minus {before.name!r} is "
                f"{nearest:+.4f}: they belong to different students. Compare these two again"
            )
        return task
    return None


def parts_of(columns: Mapping[str, TaskScores]) -> dict[str, list[str]]:
    """Return the parts of the queries that one of the columns knows, if all columns have these queries."""
    for scores in columns.values():
        if scores.groups and all(other.per_query.keys() == scores.per_query.keys() for other in columns.values()):
            return scores.groups
    return {}


def _task(task: str, split: str, subset: str, columns: Mapping[str, TaskScores]) -> Iterator[str]:
    counts = sorted({len(scores.per_query) for scores in columns.values() if scores.per_query})
    about = [f"split {markdown_code(split)}", *([] if subset == "default" else [f"subset {markdown_code(subset)}"])]
    about += [f"{' or '.join(f'{count:,}' for count in counts)} queries"] if counts else []
    groups = parts_of(columns)
    if len(groups) == 1:  # which is all of them, so a row of its own would say the same again
        about.append(f"all {_PARTS[next(iter(groups))]}")
        groups = {}
    yield f"**{markdown_text(task)}** ({', '.join(about)})"
    header = ["", *map(markdown_text, columns)]
    lines = [header, [":--", *["--:"] * len(columns)]]
    metrics = [m for m in METRIC_LABELS if any(m in scores.metrics for scores in columns.values())]
    metrics += sorted({scores.main_metric for scores in columns.values()} - set(metrics))
    for metric in metrics:
        lines.append([METRIC_LABELS.get(metric, metric), *(_value(scores, metric) for scores in columns.values())])
        if metric == "ndcg_at_10":
            lines += [
                [f"· {len(ids):,} {_PARTS.get(part, part)}", *(_mean(s, ids) for s in columns.values())]
                for part, ids in groups.items()
            ]
    yield markdown_table(lines)


def _differences(columns: Mapping[str, TaskScores], told: bool) -> Iterator[str]:
    """Yield a sentence on the paired differences between the student before and after, if both were measured."""
    before, after = columns.get("before"), columns.get("after")
    if before is None or after is None or not before.per_query or before.per_query.keys() != after.per_query.keys():
        return
    parts = {} if told else {"on all queries": list(before.per_query)}
    groups = parts_of(columns)
    parts |= {_PARTS[part]: ids for part, ids in groups.items()} if len(groups) > 1 else {}
    found = []
    for what, ids in parts.items():
        d = paired_difference([after.per_query[query] - before.per_query[query] for query in ids])
        found.append(f"{d.mean:+.4f} {d.bounds()} {what}, p = {d.p_value:.2g}")
    if found:
        yield f"After − before, nDCG@10: {'; '.join(found)}."


def _value(scores: TaskScores, metric: str) -> str:
    if metric not in scores.metrics:
        return ""
    value = f"{scores.metrics[metric]:.4f}"
    if metric != "ndcg_at_10" or not scores.per_query:
        return value
    return f"{value}{_interval(list(scores.per_query.values()))}"


def _mean(scores: TaskScores, ids: list[str]) -> str:
    values = [scores.per_query[query] for query in ids]
    return f"{sum(values) / len(values):.4f}{_interval(values)}"


def _interval(values: list[float]) -> str:
    if len(values) == 1:
        return ""
    found = paired_difference(values, interval="percentile")  # from zero: the mean itself, which stays within 0 and 1
    return f"<br>[{found.low:.3f},&nbsp;{found.high:.3f}]"  # on a line of its own: broken inside, it cannot be read
