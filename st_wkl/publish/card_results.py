"""What a card shows of results: a table with intervals and differences, a picture of several tasks, BM25's lead."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from st_wkl.evaluation.compare import paired_difference
from st_wkl.evaluation.effects import compare_all
from st_wkl.evaluation.report import plot_effects
from st_wkl.evaluation.results import SHARED, UNSEEN, Results, TaskScores
from st_wkl.markdown import markdown_table, markdown_text
from st_wkl.metrics import METRIC_LABELS

PICTURE = "differences.png"
_PARTS = {SHARED: "with a seen document", UNSEEN: "with none seen"}


def measured(results: Mapping[str, Results]) -> dict[str, Any]:
    """Return what the card shows of results: one table of nDCG@10, one of other metrics, and what to read into them.

    Raises:
        ValueError: If two columns of a task were measured on different data.
    """
    tasks: dict[tuple[str, str, str], dict[str, TaskScores]] = {}
    for label, entry in results.items():
        for scores in entry.tasks:
            tasks.setdefault((scores.task, scores.split, scores.subset), {})[label] = scores
    compared = "before" in results and "after" in results
    head = ["", *map(markdown_text, results), *(["after − before"] if compared else [])]
    main = [head, [":--", *["--:"] * (len(head) - 1)]]
    others = [line[: len(results) + 1] for line in main]
    seen: dict[str, tuple[str, int, int]] = {}
    baselines: list[str] = []
    all_parts: list[str] = []
    for (task, split, subset), found in tasks.items():
        _check_same_data(found)
        columns = {label: found.get(label) for label in results}
        name = ", ".join([task, *([split] if split != "test" else []), *([subset] if subset != "default" else [])])
        parts = _parts(found)
        shared = len(parts.get(_PARTS[SHARED], ()))
        queries = sorted({len(scores.per_query) for scores in found.values() if scores.per_query})
        seen.setdefault(task, (task, min(queries, default=0), shared))
        metrics = {metric for scores in found.values() for metric in scores.metrics}
        first = "ndcg_at_10" if "ndcg_at_10" in metrics else next(iter(found.values())).main_metric
        shown = [m for m in [*METRIC_LABELS, *{s.main_metric for s in found.values()}] if m in metrics]
        for metric in dict.fromkeys([first, *shown]):
            told = f"{markdown_text(name)}, {METRIC_LABELS.get(metric, metric)}"
            if metric == first and queries:
                told += f", {' or '.join(f'{count:,}' for count in queries)} queries"
                told += next((f", all {part}" for part in parts if len(parts) == 1), "")
            row = [told, *(_value(scores, metric) for scores in columns.values())]
            if metric != first:
                others.append(row)
            else:
                main.append(
                    [*row, *([_difference(columns, None) if metric == "ndcg_at_10" else ""] if compared else [])]
                )
        if len(parts) > 1 and first == "ndcg_at_10":
            for part, ids in parts.items():
                values = [_mean(s.per_query[query] for query in ids) if s else "" for s in columns.values()]
                difference = [_difference(columns, ids)] if compared else []
                main.append([f"· {len(ids):,} {part}", *values, *difference])
            all_parts.append(task)
        baselines += _ahead(name, columns, results)
    return {
        "table": markdown_table(main) if tasks else "",
        "others": markdown_table(others) if len(others) > 2 else "",
        "measured_on": list(seen.values()),
        "two_parts": bool(all_parts),
        "bracketed": any(few for _, few, _ in seen.values()),
        "baselines": baselines,
    }


def _parts(columns: Mapping[str, TaskScores]) -> dict[str, list[str]]:
    """Return the parts of the queries that one of the columns knows, if all columns have these queries."""
    alike = len({frozenset(scores.per_query) for scores in columns.values()}) == 1
    groups = next((scores.groups for scores in columns.values() if scores.groups and alike), {})
    return {_PARTS[group]: ids for group, ids in groups.items()}


def _ahead(task: str, columns: Mapping[str, TaskScores | None], results: Mapping[str, Results]) -> Iterator[str]:
    """Say where BM25, which needs no training, is ahead of this model."""
    after = columns.get("after")
    for label, scores in columns.items():
        if not (after and scores and results[label].name.lower().startswith("bm25")):
            continue
        if after.per_query and after.per_query.keys() == scores.per_query.keys():
            d = paired_difference([scores.per_query[query] - after.per_query[query] for query in after.per_query])
            if d.mean > 0:
                yield (
                    f"{markdown_text(task)}: {markdown_text(results[label].name)}, which needs no training, is "
                    f"{d.mean:.4f} nDCG@10 ahead of this model, {d.bounds()}, p = {d.p_value:.2g}."
                )


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


def _difference(columns: Mapping[str, TaskScores | None], ids: Sequence[str] | None) -> str:
    """Return the paired difference between the student before and after on some queries, if both were measured."""
    before, after = columns["before"], columns["after"]
    if not before or not after or not before.per_query or before.per_query.keys() != after.per_query.keys():
        return ""
    d = paired_difference([after.per_query[query] - before.per_query[query] for query in ids or before.per_query])
    return f"{d.mean:+.4f}<br>{_unbroken(d.bounds())}<br>p = {d.p_value:.2g}"


def _value(scores: TaskScores | None, metric: str) -> str:
    if scores is None or metric not in scores.metrics:
        return ""
    ranked = metric == "ndcg_at_10" and scores.per_query
    return f"{scores.metrics[metric]:.4f}{_interval(list(scores.per_query.values())) if ranked else ''}"


def _mean(values: Iterable[float]) -> str:
    found = list(values)
    return f"{sum(found) / len(found):.4f}{_interval(found)}"


def _interval(values: list[float]) -> str:
    if len(values) == 1:
        return ""
    found = paired_difference(values, interval="percentile")  # from zero: the mean itself, which stays within 0 and 1
    return f"<br>{_unbroken(f'[{found.low:.3f}, {found.high:.3f}]')}"  # broken inside, it cannot be read


def _unbroken(text: str) -> str:
    return text.replace(" ", "&nbsp;")


def draw(folder: Path, results: Mapping[str, Results]) -> str:
    """Draw the differences of several tasks beside the card, where matplotlib is installed."""
    tasks = [{scores.task for scores in results[when].tasks} for when in ("before", "after") if when in results]
    if len(tasks) < 2 or len(set.intersection(*tasks)) < 2 or importlib.util.find_spec("matplotlib") is None:
        return ""
    return plot_effects(compare_all(results["before"], {"after": results["after"]}), folder / PICTURE).name
