"""Gains must be corrected for the number of tasks that were tried, and measured by what there was to gain."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from st_wkl.evaluation import Results, TaskScores, compare, compare_all, effects_table, gap_closed
from st_wkl.evaluation.compare import holm


def scores(values: np.ndarray, task: str = "one", **changes: Any) -> TaskScores:
    per_query = {f"q{i}": float(v) for i, v in enumerate(values)}
    fields: dict[str, Any] = {"task": task, "split": "test", "subset": "default", "main_metric": "ndcg_at_10"}
    fields |= {"metrics": {"ndcg_at_10": math.fsum(per_query.values()) / len(per_query)}, "per_query": per_query}
    return TaskScores(**{**fields, "dataset_revision": "abc", "seconds": 0.0, **changes})


def model(name: str, *tasks: TaskScores) -> Results:
    return Results(model={"name": name, "revision": "r"}, tasks=list(tasks))


@pytest.fixture
def three() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return scores per query of the undistilled student, the student and the teacher."""
    generator = np.random.default_rng(3)
    before = generator.uniform(0.2, 0.6, 80)
    return before, before + generator.normal(0.05, 0.1, 80), before + generator.normal(0.2, 0.1, 80)


def test_every_task_student_and_group_once(three: Any) -> None:
    """The table of a study: nothing is forgotten, and what is tested more often is corrected harder."""
    x, y, _ = three
    groups = {"shared": [f"q{i}" for i in range(50)], "unseen": [f"q{i}" for i in range(50, 80)]}
    before = model("before", scores(x), scores(x, "two"))
    students = {
        "KL": model("a", scores(y, groups=groups), scores(x + 0.001, "two")),
        "CKL": model("b", scores((x + y) / 2), scores(y, "two")),
    }
    effects = compare_all(before, students, resamples=2000)
    expected = [("one", m, g) for m in ("KL", "CKL") for g in (None, "shared", "unseen")]
    assert [(e.task, e.model, e.group) for e in effects] == [*expected, ("two", "KL", None), ("two", "CKL", None)]
    of_all = [e for e in effects if e.group is None]
    assert [e.p_holm for e in of_all] == holm([e.difference.p_value for e in of_all])
    unseen = next(e for e in effects if e.group == "unseen")
    truth = compare(before, students["KL"], task="one", group="unseen", resamples=2000)
    assert unseen.difference == truth
    assert unseen.after - unseen.before == pytest.approx(truth.mean)
    table = effects_table(effects)
    assert len(table.splitlines()) == 2 + 8
    assert "| one (test) | KL | unseen (30) |" in table
    assert "Gap closed" not in table


def test_a_group_of_all_queries_is_one_row(three: Any) -> None:
    """On a collection that training never saw every query is unseen: the same numbers twice would look like two."""
    x, y, _ = three
    everything = {"unseen": [f"q{i}" for i in range(80)]}
    effects = compare_all(model("a", scores(x)), model("b", scores(y, groups=everything)), resamples=200)
    assert [effect.group for effect in effects] == [None, "unseen"], "for who computes with them"
    table = effects_table(effects)
    assert len(table.splitlines()) == 2 + 1
    assert "| one (test) | b | all = unseen (80) |" in table


def test_the_share_of_the_gap(three: Any) -> None:
    """Half of the way to the teacher is 50 %, and the interval must be of the ratio, not of the gain alone."""
    x, y, z = three
    before, after, teacher = (dict(scores(values).per_query) for values in three)
    ours = gap_closed(before, after, teacher)
    assert ours.share == pytest.approx((y - x).mean() / (z - x).mean(), abs=1e-4)
    assert ours.low is not None
    assert ours.high is not None
    assert ours.low < ours.share < ours.high  # type: ignore[operator]
    generator = np.random.default_rng(1)
    drawn = generator.integers(80, size=(20_000, 80))
    low, high = np.percentile((y - x)[drawn].mean(1) / (z - x)[drawn].mean(1), [2.5, 97.5])
    assert (ours.low, ours.high) == pytest.approx((low, high), abs=0.02)
    half = dict(scores((x + z) / 2).per_query)
    exact = gap_closed(before, half, teacher)
    assert (exact.share, exact.low, exact.high) == pytest.approx((0.5, 0.5, 0.5), abs=1e-3)


def test_no_gap_no_share(three: Any) -> None:
    """A weak teacher would give -300 % or 900 %; neither is a result."""
    x, y, _ = three
    before, after = scores(x).per_query, scores(y).per_query
    worse = gap_closed(before, after, scores(x - 0.1).per_query)
    assert (worse.share, worse.low) == (None, None)
    assert str(worse) == "undefined: the teacher is not better than the undistilled student"
    noise = np.random.default_rng(5).normal(0, 0.5, 80)
    unsure = gap_closed(before, after, {f"q{i}": v for i, v in enumerate(x + noise - noise.mean() + 0.01)})
    assert unsure.share is not None
    assert unsure.low is None
    assert "may be chance" in str(unsure)
    with pytest.raises(ValueError, match="no query in common"):
        gap_closed(before, after, {"q999": 1.0})


@settings(max_examples=25, deadline=None)
@given(st.floats(-2, 3))
def test_a_constant_share_is_found_exactly(share: float) -> None:
    """If every query moves by the same share of its gap, that share and a closed interval are the answer."""
    before = {f"q{i}": 0.1 * i for i in range(8)}
    teacher = {query: value + 0.3 for query, value in before.items()}
    after = {query: value + share * 0.3 for query, value in before.items()}
    ours = gap_closed(before, after, teacher, resamples=50)
    assert (ours.share, ours.low, ours.high) == pytest.approx((share, share, share), abs=1e-5)


def test_a_teacher_that_reranks_a_sample_counts_for_the_task(three: Any) -> None:
    """Teachers are slow: they rerank candidates, of some queries, and their task is named after that."""
    x, y, z = three
    sample = scores(z[:40], "one-rerank-bm25-top100", dataset_revision="abc+candidates.0123")
    effects = compare_all(model("b", scores(x)), model("a", scores(y)), teacher=model("t", sample), resamples=500)
    assert effects[0].gap is not None
    assert effects[0].gap.queries == 40
    assert effects[0].gap.share == pytest.approx((y - x)[:40].mean() / (z - x)[:40].mean(), abs=1e-4)
    assert "Gap closed" in effects_table(effects)
    other = scores(z, "one-rerank-bm25-top100", dataset_revision="xyz+candidates.0123")
    foreign = compare_all(model("b", scores(x)), model("a", scores(y)), teacher=model("t", other), resamples=500)
    assert foreign[0].gap is None, "a ceiling on other data is none"


def test_nothing_in_common_is_said(three: Any) -> None:
    """An empty table would look like an evaluation without effects."""
    x, y, _ = three
    with pytest.raises(ValueError, match=r"KL shares no retrieval task with b \(b: one and a: two\)"):
        compare_all(model("b", scores(x)), {"KL": model("a", scores(y, "two"))})
    with pytest.raises(ValueError, match="dataset_revision is 'abc' for b and 'xyz' for KL"):
        compare_all(model("b", scores(x)), {"KL": model("a", scores(y, dataset_revision="xyz"))})
