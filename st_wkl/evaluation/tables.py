"""Results as markdown tables, for the terminal, the card and the report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from st_wkl.evaluation.scores import METRIC_LABELS, SHARED, UNSEEN, TaskScores
from st_wkl.markdown import markdown_table, markdown_text

if TYPE_CHECKING:
    from st_wkl.evaluation.results import Results


def results_table(results: Mapping[str, Results]) -> str:
    """Return one markdown table for several results, a row per task and label.

    Where the parts of the queries that a student's training has touched are known, nDCG@10 is given three times: over
    all queries, over the shared and over the unseen ones, each with its number of queries. A row without parts of its
    own, such as the undistilled student's, is given over those of the other rows of its task, if they agree.

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
    groups = [common_groups([s for _, s in rows if _same(s, row)], row) for _, row in rows]
    shown = [group for group in (SHARED, UNSEEN) if any(group in of_row for of_row in groups)]
    header = ["Task", "Model", "Queries", *(METRIC_LABELS.get(m, m) for m in columns)]
    place = header.index("nDCG@10") + 1 if "nDCG@10" in header else len(header)
    header[place:place] = shown
    lines = [header, [":--", ":--", *["--:"] * (len(header) - 2)]]
    for (label, scores), parts in zip(rows, groups, strict=True):
        subset = "" if scores.subset == "default" else f", {scores.subset}"
        values = [f"{scores.metrics[m]:.4f}" if m in scores.metrics else "" for m in columns]
        queries = str(len(scores.per_query)) if scores.per_query else ""
        line = [markdown_text(f"{scores.task} ({scores.split}{subset})"), markdown_text(label), queries, *values]
        line[place:place] = [_part_cell(scores, parts.get(group, [])) for group in shown]
        lines.append(line)
    return markdown_table(lines)


def common_groups(entries: Iterable[TaskScores], scores: TaskScores) -> dict[str, list[str]]:
    """Return the groups to show `scores` by: its own, or those that all other entries with groups agree on.

    Args:
        entries: Scores of other models on the same task.
        scores: Scores of one model.

    Returns:
        Group to query ids; empty where the other entries differ, have none, or were evaluated on other queries.
    """
    if scores.groups:
        return scores.groups
    found = [entry.groups for entry in entries if entry.groups and entry.per_query.keys() == scores.per_query.keys()]
    as_sets = [{group: set(members) for group, members in groups.items()} for groups in found]
    return found[0] if found and all(groups == as_sets[0] for groups in as_sets) else {}


def _same(first: TaskScores, second: TaskScores) -> bool:
    keys = ("task", "split", "subset", "dataset_revision")
    return all(getattr(first, key) == getattr(second, key) for key in keys)


def _part_cell(scores: TaskScores, members: list[str]) -> str:
    if not members:
        return ""
    return f"{math.fsum(scores.per_query[query] for query in members) / len(members):.4f} ({len(members)})"
