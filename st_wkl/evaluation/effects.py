"""What distillation has changed: several students, tasks and groups of queries against the undistilled student.

A single lucky task among ten is no finding, so p-values are corrected over all comparisons that stand side by side. And
a gain says little without what was there to gain, so it is measured against the teacher's lead as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from st_wkl.evaluation.compare import Comparison, blocks, check_results, compared, holm, tasks_of
from st_wkl.evaluation.results import SHARED, UNSEEN, Results, TaskScores, common_groups
from st_wkl.markdown import markdown_table
from st_wkl.metrics import METRIC_LABELS


@dataclass(frozen=True)
class GapClosed:
    """How much of the teacher's lead over the undistilled student distillation has brought.

    Args:
        share: Gain of the student divided by the lead of the teacher: 0 for nothing gained, 1 for the teacher's level.
            None where the teacher is not better than the undistilled student, so that there is nothing to close.
        low: Lower end of its 95 % bootstrap percentile interval. None where `share` is, or where the lead itself may be
            chance, so that a share of it has no bounds.
        high: Upper end of it.
        lead: Mean lead of the teacher over the undistilled student.
        queries: Number of queries: those that the teacher was measured on.
        reason: Why `share` or its interval is undefined; empty otherwise.
    """

    share: float | None
    low: float | None
    high: float | None
    lead: float
    queries: int
    reason: str = ""

    def __str__(self) -> str:
        """Return the words that a table's cell or a sentence takes."""
        if self.share is None:
            return f"undefined: {self.reason}"
        interval = f" ({self.reason})" if self.low is None else f" [{self.low:.0%}, {self.high:.0%}]"
        return f"{self.share:.0%}{interval}"


@dataclass(frozen=True, repr=False)
class Effect:
    """One student on one task and one group of queries, against the undistilled student and the teacher.

    Args:
        task: Name of the task.
        split: Split of the judgements.
        subset: MTEB's subset.
        model: Label of the student.
        group: `"shared"` or `"unseen"`; None for all queries.
        before: Mean of the undistilled student.
        after: Mean of the student.
        difference: The paired comparison of the two.
        p_holm: Its p-value, corrected by Holm over all students and tasks of the same group of queries.
        gap: The share of the teacher's lead that was closed; None if no teacher was given.
    """

    task: str
    split: str
    subset: str
    model: str
    group: str | None
    before: float
    after: float
    difference: Comparison
    p_holm: float
    gap: GapClosed | None = None

    def __repr__(self) -> str:
        gap = f", of the teacher's lead {self.gap}" if self.gap else ""
        return f"<Effect {self.model} on {self.task}: {self.before:.4f} → {self.after:.4f}, {self.difference}{gap}>"


def compare_all(
    before: Results,
    after: Results | Mapping[str, Results],
    *,
    teacher: Results | None = None,
    metric: str = "ndcg_at_10",
    resamples: int = 10_000,
    seed: int = 0,
) -> list[Effect]:
    """Compare one or several students with the undistilled one, on every task that they share, group by group.

    Args:
        before: Results of the undistilled student.
        after: Results of a student, or label to results of several.
        teacher: Results of the teacher, on all queries of a task or on a sample of them; those of reranking a task
            count for the task. Tasks that it lacks get no share of the gap.
        metric: What to compare, see `TaskScores.scores`.
        resamples: Number of sign flips, and of bootstrap samples for the share of the gap.
        seed: Seed of both.

    Returns:
        Task by task and student by student: all queries, then the shared and the unseen ones where these are known.

    Raises:
        TypeError: If one of them is no `Results`.
        ValueError: If a student shares no task with `before`, or was evaluated on other data or queries.

    Example:
        >>> effects = compare_all(before, {"KL": kl, "weighted KL": weighted}, teacher=teacher)  # doctest: +SKIP
        >>> print(effects_table(effects))  # doctest: +SKIP
    """
    students = dict(after) if isinstance(after, Mapping) else {getattr(after, "name", "after"): after}
    check_results(("before", before), *([] if teacher is None else [("teacher", teacher)]), *students.items())
    effects: list[Effect] = []
    for first in (scores for scores in before.tasks if scores.per_query):
        rivals = {label: scores for label, one in students.items() for scores in one.tasks if scores.key == first.key}
        ceiling = None if teacher is None else _ceiling(teacher, first)
        for label, second in rivals.items():
            groups = common_groups([*rivals.values(), first], second)
            for group in (None, *(g for g in (SHARED, UNSEEN) if g in groups)):
                queries = list(first.per_query) if group is None else groups[group]
                pair = (before, first), (students[label], second)
                found = compared(*pair, label, queries, group, metric, resamples, seed)
                gap = None
                if ceiling is not None and (asked := ceiling.scores(metric).keys() & set(queries)):
                    lead = {query: value for query, value in ceiling.scores(metric).items() if query in asked}
                    gap = gap_closed(first.scores(metric), second.scores(metric), lead, resamples=resamples, seed=seed)
                means = (first.mean_over(queries, metric), second.mean_over(queries, metric))
                effects.append(Effect(*first.key, label, group, *means, found, found.p_value, gap))
    for label, one in students.items():
        if not any(effect.model == label for effect in effects):
            have = tasks_of(before, one)
            raise ValueError(f"{label} shares no retrieval task with {before.name} ({have}); evaluate both on the same")
    by_group = {group: [e.difference.p_value for e in effects if e.group == group] for group in (None, SHARED, UNSEEN)}
    corrected = {group: iter(holm(p_values)) for group, p_values in by_group.items()}
    return [replace(effect, p_holm=next(corrected[effect.group])) for effect in effects]


def gap_closed(
    before: Mapping[str, float],
    after: Mapping[str, float],
    teacher: Mapping[str, float],
    *,
    resamples: int = 10_000,
    seed: int = 0,
) -> GapClosed:
    """Return which share of the teacher's lead over the undistilled student the student has gained.

    The interval is the percentile bootstrap of the ratio of the two mean differences, over queries, all three models
    resampled together. Where the teacher leads in fewer than 97.5 % of the samples it has none: the ratio then runs off
    to infinity on both sides (Fieller's problem).

    Args:
        before: Query id to score of the undistilled student.
        after: The same of the student.
        teacher: The same of the teacher, for all queries or a sample.
        resamples: Number of bootstrap samples.
        seed: Their seed.

    Raises:
        ValueError: If the three have no query in common.

    Example:
        >>> gap_closed({"q1": 0.2, "q2": 0.4}, {"q1": 0.3, "q2": 0.5}, {"q1": 0.6, "q2": 0.8}).share
        0.25
    """
    queries = [query for query in teacher if query in before and query in after]
    if not queries:
        raise ValueError("the teacher has no query in common with the students; evaluate it on the same queries")
    # One row of gains, one of leads.
    both = np.array([[one[query] - before[query] for query in queries] for one in (after, teacher)])
    gain, lead = map(float, both.mean(axis=1))
    n = len(queries)
    if lead <= 1e-9:
        return GapClosed(None, None, None, lead, n, "the teacher is not better than the undistilled student")
    share, generator = round(gain / lead, 6), np.random.default_rng(seed)
    drawn = [both[:, generator.integers(n, size=(block, n))].mean(axis=2) for block in blocks(resamples, n)]
    gains, leads = np.concatenate(drawn, axis=1)
    if np.percentile(leads, 2.5) <= 0:
        return GapClosed(share, None, None, lead, n, "no interval: the teacher's lead may be chance")
    low, high = np.percentile(gains[leads > 0] / leads[leads > 0], [2.5, 97.5])
    return GapClosed(share, float(low), float(high), lead, n)


def effects_table(effects: Iterable[Effect]) -> str:
    """Return what `compare_all` found as a markdown table, one row each."""
    header, rows = effect_rows(list(effects))
    return markdown_table([header, [":--", ":--", ":--", *["--:"] * (len(header) - 3)], *rows])


def effect_rows(effects: Sequence[Effect]) -> tuple[list[str], list[list[str]]]:
    """Return the header and the cells of `effects_table`, as they are for any kind of table."""
    with_gap = any(effect.gap for effect in effects)
    label = effects[0].difference.label if effects else METRIC_LABELS["ndcg_at_10"]
    header = ["Task", "Model", "Queries", "Before", "After", f"Δ {label} [95 %]", "p", "p (Holm)", "W / T / L"]
    rows = []
    for effect, queries in with_queries(effects):
        d = effect.difference
        row = [f"{effect.task} ({effect.split})", effect.model, f"{queries} ({d.queries})"]
        row += [f"{effect.before:.4f}", f"{effect.after:.4f}", f"{d.mean:+.4f} {d.bounds()}"]
        row += [f"{d.p_value:.2g}", f"{effect.p_holm:.2g}", f"{d.wins} / {d.ties} / {d.losses}"]
        rows.append(row + [str(effect.gap or "")] * with_gap)
    return header + ["Gap closed"] * with_gap, rows


def go_by_p(effects: Sequence[Effect]) -> str:
    """Return a sentence on the differences whose interval is made of too few queries, or is no proof by its p."""
    few = [
        f"{effect.model} ({queries})"
        for effect, queries in with_queries(effects)
        if effect.difference.too_few or (effect.difference.may_be_chance and not effect.difference.holds_0)
    ]
    return f"Too few queries for these intervals, go by p: {', '.join(dict.fromkeys(few))}." if few else ""


def with_queries(effects: Sequence[Effect]) -> list[tuple[Effect, str]]:
    """Return the effects to show, each with what its queries are called.

    Where all queries of a task are in one group, that is said once, as in `"all = unseen"`, not in two equal rows.
    """

    def key(effect: Effect) -> tuple[str, ...]:
        return effect.task, effect.split, effect.subset, effect.model

    totals = {key(effect): effect.difference.queries for effect in effects if effect.group is None}
    whole = {key(e): e.group for e in effects if e.group and e.difference.queries == totals.get(key(e))}
    return [
        (effect, effect.group or (f"all = {whole[key(effect)]}" if key(effect) in whole else "all"))
        for effect in effects
        if effect.group is None or effect.group != whole.get(key(effect))
    ]


def _ceiling(teacher: Results, wanted: TaskScores) -> TaskScores | None:
    """Return the teacher's entry for a task; a reranker's is called after its first stage as well."""

    def base(entry: TaskScores) -> tuple[str, str, str]:
        return entry.split, entry.subset, entry.dataset_revision.split("+candidates")[0]

    for entry in teacher.tasks:
        same_task = entry.task == wanted.task or entry.task.startswith(f"{wanted.task}-rerank-")
        if same_task and base(entry) == base(wanted) and entry.per_query:
            return entry
    return None
