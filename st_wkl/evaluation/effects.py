"""What distillation has changed: several students, tasks and groups of queries against the undistilled student.

A single lucky task among ten is no finding, so p-values are corrected over all comparisons that stand side by side. And
a gain says little without what was there to gain, so it is measured against the teacher's lead as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from st_wkl.evaluation.compare import Comparison, blocks, compare, holm
from st_wkl.evaluation.results import Results
from st_wkl.evaluation.scores import METRIC_LABELS, SHARED, UNSEEN, TaskScores
from st_wkl.evaluation.tables import common_groups
from st_wkl.markdown import markdown_table


@dataclass(frozen=True)
class GapClosed:
    """How much of the teacher's lead over the undistilled student distillation has brought.

    Args:
        share: Gain of the student divided by the lead of the teacher: 0 for nothing gained, 1 for the teacher's level.
            None where the teacher is not better than the undistilled student, so that there is nothing to close.
        low: Lower end of the 95 % bootstrap percentile interval of the share. None where `share` is, or where the lead
            itself may be chance, so that a share of it has no bounds.
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


@dataclass(frozen=True)
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
        ValueError: If a student shares no task with `before`, or was evaluated on other data or queries.

    Example:
        >>> effects = compare_all(before, {"KL": kl, "weighted KL": weighted}, teacher=teacher)  # doctest: +SKIP
        >>> print(effects_table(effects))  # doctest: +SKIP
    """
    students = {after.name: after} if isinstance(after, Results) else dict(after)
    found: list[Effect] = []
    for scores in before.tasks:
        if not scores.per_query:
            continue
        rivals = {label: entry for label, one in students.items() if (entry := _entry_for(one, scores)) is not None}
        for label, entry in rivals.items():
            groups = common_groups([*rivals.values(), scores], entry)
            for group in (None, *(g for g in (SHARED, UNSEEN) if g in groups)):
                queries = list(scores.per_query) if group is None else groups[group]
                pair = [(before.name, scores), (label, entry)]
                effect = _effect(pair, queries, teacher, metric, resamples=resamples, seed=seed)
                found.append(replace(effect, group=group, difference=replace(effect.difference, group=group)))
    for label, one in students.items():
        if not any(effect.model == label for effect in found):
            have = " and ".join(f"{r.name}: {', '.join(t.task for t in r.tasks) or 'none'}" for r in (before, one))
            raise ValueError(f"{label} shares no retrieval task with {before.name} ({have}); evaluate both on the same")
    return _corrected(found)


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
        seed: Seed of the bootstrap.

    Raises:
        ValueError: If the three have no query in common.

    Example:
        >>> gap_closed({"q1": 0.2, "q2": 0.4}, {"q1": 0.3, "q2": 0.5}, {"q1": 0.6, "q2": 0.8}).share
        0.25
    """
    queries = [query for query in teacher if query in before and query in after]
    if not queries:
        raise ValueError("the teacher has no query in common with the students; evaluate it on the same queries")
    gain = np.array([after[query] - before[query] for query in queries])
    lead = np.array([teacher[query] - before[query] for query in queries])
    mean_lead, n = float(lead.mean()), len(queries)
    if mean_lead <= 1e-9:
        return GapClosed(None, None, None, mean_lead, n, "the teacher is not better than the undistilled student")
    share = round(float(gain.mean()) / mean_lead, 6)
    generator = np.random.default_rng(seed)
    leads, gains = [], []
    for block in blocks(resamples, n):
        drawn = generator.integers(n, size=(block, n))
        leads.append(lead[drawn].mean(axis=1))
        gains.append(gain[drawn].mean(axis=1))
    all_leads, all_gains = np.concatenate(leads), np.concatenate(gains)
    if np.percentile(all_leads, 2.5) <= 0:
        return GapClosed(share, None, None, mean_lead, n, "no interval: the teacher's lead may be chance")
    low, high = np.percentile(all_gains[all_leads > 0] / all_leads[all_leads > 0], [2.5, 97.5])
    return GapClosed(share, float(low), float(high), mean_lead, n)


def effects_table(effects: Iterable[Effect]) -> str:
    """Return the effects as a markdown table, one row each.

    Args:
        effects: What `compare_all` returned.

    Example:
        >>> print(effects_table(compare_all(before, after)))  # doctest: +SKIP
    """
    effects = list(effects)
    rows = with_queries(effects)
    label = METRIC_LABELS.get(effects[0].difference.metric, effects[0].difference.metric) if effects else "nDCG@10"
    header = ["Task", "Model", "Queries", "Before", "After", f"Δ {label} [95 %]", "p", "p (Holm)", "W / T / L"]
    with_gap = any(effect.gap for effect in effects)
    lines = [header + ["Gap closed"] * with_gap, [":--", ":--", ":--", *["--:"] * (len(header) - 3 + with_gap)]]
    for effect, queries in rows:
        d = effect.difference
        line = [f"{effect.task} ({effect.split})", effect.model, f"{queries} ({d.queries})"]
        line += [f"{effect.before:.4f}", f"{effect.after:.4f}", f"{d.mean:+.4f} [{d.low:+.4f}, {d.high:+.4f}]"]
        line += [f"{d.p_value:.2g}", f"{effect.p_holm:.2g}", f"{d.wins} / {d.ties} / {d.losses}"]
        lines.append(line + [str(effect.gap) if effect.gap else ""] * with_gap)
    return markdown_table(lines)


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


def _effect(
    pair: Sequence[tuple[str, TaskScores]],
    queries: list[str],
    teacher: Results | None,
    metric: str,
    *,
    resamples: int,
    seed: int,
) -> Effect:
    """Return the effect of the second of a pair on some queries, whose p-value is not corrected yet."""
    (_, first), (label, second) = pair
    sides = [Results(model={"name": key, "revision": ""}, tasks=[one]) for key, one in pair]
    difference = compare(sides[0], sides[1], query_ids=queries, metric=metric, resamples=resamples, seed=seed)
    x, y = first.scores(metric), second.scores(metric)
    ceiling = None if teacher is None else _ceiling(teacher, first)
    gap = None
    if ceiling is not None:
        of_teacher = {query: value for query, value in ceiling.scores(metric).items() if query in set(queries)}
        gap = gap_closed(x, y, of_teacher, resamples=resamples, seed=seed) if of_teacher else None
    return Effect(
        task=first.task,
        split=first.split,
        subset=first.subset,
        model=label,
        group=None,
        before=float(np.mean([x[query] for query in queries])),
        after=float(np.mean([y[query] for query in queries])),
        difference=difference,
        p_holm=difference.p_value,
        gap=gap,
    )


def _corrected(effects: list[Effect]) -> list[Effect]:
    """Return the effects with Holm's correction over those that share a group of queries."""
    corrected = dict(enumerate(effects))
    for group in {effect.group for effect in effects}:
        places = [place for place, effect in enumerate(effects) if effect.group == group]
        p_values = holm([effects[place].difference.p_value for place in places])
        corrected |= {place: replace(effects[place], p_holm=p) for place, p in zip(places, p_values, strict=True)}
    return [corrected[place] for place in range(len(effects))]


def _entry_for(results: Results, wanted: TaskScores) -> TaskScores | None:
    """Return the entry of the same task, split and subset."""
    keys = ("task", "split", "subset")
    return next((t for t in results.tasks if all(getattr(t, key) == getattr(wanted, key) for key in keys)), None)


def _ceiling(teacher: Results, wanted: TaskScores) -> TaskScores | None:
    """Return the teacher's entry for a task; a reranker's is called after its first stage as well."""

    def base(entry: TaskScores) -> tuple[str, str, str]:
        return entry.split, entry.subset, entry.dataset_revision.split("+candidates")[0]

    for entry in teacher.tasks:
        same_task = entry.task == wanted.task or entry.task.startswith(f"{wanted.task}-rerank-")
        if same_task and base(entry) == base(wanted) and entry.per_query:
            return entry
    return None
