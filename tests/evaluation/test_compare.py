"""The paired comparison must give the textbook's numbers and refuse pairs that are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import bootstrap, permutation_test, ttest_1samp

from st_wkl.evaluation import (
    Results,
    TaskScores,
    compare,
    compare_all,
    effects_table,
    shared_document_queries,
)
from st_wkl.evaluation.compare import holm, paired_difference
from st_wkl.evaluation.effects import go_by_p

STUDY = Path(__file__).parents[2] / "examples/study/published/study/per_query.parquet"


def results(per_query: dict[str, float], name: str = "model", **changes: Any) -> Results:
    values: dict[str, Any] = {
        "task": "tiny",
        "split": "test",
        "subset": "default",
        "main_metric": "ndcg_at_10",
        "metrics": {"ndcg_at_10": float(np.mean(list(per_query.values()) or [0.5]))},
        "per_query": per_query,
        "dataset_revision": "abc",
        "seconds": 0.0,
    }
    return Results(model={"name": name, "revision": "r"}, tasks=[TaskScores(**{**values, **changes})])


def pair(queries: int, effect: float) -> tuple[Results, Results]:
    generator = np.random.default_rng(7)
    before = generator.random(queries)
    after = np.clip(before + generator.normal(effect, 0.2, queries), 0, 1)
    return tuple(results({f"q{i}": float(s) for i, s in enumerate(side)}) for side in (before, after))  # type: ignore[return-value]


@pytest.mark.parametrize(("queries", "effect"), [(30, 0.05), (200, 0.02), (200, 0.0)])
def test_agrees_with_scipy(queries: int, effect: float) -> None:
    """The interval and the p-value are only worth printing if they are the standard ones."""
    before, after = pair(queries, effect)
    x = np.array(list(before.task().per_query.values()))
    y = np.array(list(after.task().per_query.values()))
    ours = compare(before, after, resamples=20_000)
    assert ours.mean == pytest.approx(y.mean() - x.mean(), abs=1e-6)
    interval = bootstrap((y - x,), np.mean, method="percentile", n_resamples=20_000, rng=1).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((interval.low, interval.high), abs=0.1 * (ours.high - ours.low) / 2)
    test = permutation_test(
        (y, x),
        lambda a, b, axis: np.mean(a - b, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=20_000,
        rng=2,
    )
    # scipy doubles the smaller tail, we count both: equal in the limit, twice the sampling error here.
    assert ours.p_value == pytest.approx(test.pvalue, abs=0.02)


def test_small_samples_have_the_exact_p_value() -> None:
    """Five wins of five have p = 2/32; a one-sided test or a forgotten tie would give another number."""
    before = results({f"q{i}": 0.0 for i in range(5)})
    after = results({f"q{i}": 0.5 for i in range(5)})
    ours = compare(before, after, resamples=50_000)
    assert ours.p_value == pytest.approx(2 / 32, abs=0.004)
    assert (ours.low, ours.high) == (0.5, 0.5)


def test_equal_models_do_not_differ() -> None:
    """No difference must give p = 1 and an interval of zero width, not NaN."""
    same = results({"q1": 0.1, "q2": 0.2})
    ours = compare(same, same)
    assert (ours.mean, ours.low, ours.high, ours.p_value) == (0, 0, 0, 1)
    assert (ours.wins, ours.ties, ours.losses, ours.queries) == (0, 2, 0, 2)


def test_the_smallest_p_value_is_not_zero() -> None:
    """A p-value of 0 does not exist; with 999 flips and the observed one, it is at least 1/1000."""
    before, after = results({f"q{i}": 0.0 for i in range(60)}), results({f"q{i}": 1.0 for i in range(60)})
    assert compare(before, after, resamples=999).p_value == 1 / 1000


def test_pairs_by_query_id_and_counts_wins() -> None:
    """Two files may list their queries in another order."""
    before, after = results({"q1": 0.1, "q2": 0.5, "q3": 0.3}), results({"q3": 0.3, "q2": 0.4, "q1": 0.9})
    ours = compare(before, after)
    assert (ours.wins, ours.ties, ours.losses) == (1, 1, 1)
    assert ours.mean == pytest.approx(0.7 / 3)


def test_same_seed_same_numbers() -> None:
    """A table that is printed twice must not change."""
    before, after = pair(50, 0.05)
    assert compare(before, after, seed=3) == compare(before, after, seed=3)
    assert compare(before, after, seed=3) != compare(before, after, seed=4)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=40))
def test_swapping_the_models_mirrors_the_result(scores: list[tuple[float, float]]) -> None:
    """Which model is called "before" must only change the sign."""
    before, after = (results({f"q{i}": s[side] for i, s in enumerate(scores)}) for side in (0, 1))
    forth, back = compare(before, after, resamples=200), compare(after, before, resamples=200)
    assert forth.mean == -back.mean
    assert (forth.wins, forth.losses) == (back.losses, back.wins)
    assert forth.p_value == back.p_value
    assert (forth.low, forth.high) == pytest.approx((-back.high, -back.low))
    assert forth.low - 1e-9 <= forth.mean <= forth.high + 1e-9 or len(scores) < 10


def test_many_queries_are_drawn_in_blocks() -> None:
    """The blocks that bound memory must add up to the asked number of resamples."""
    before, after = pair(3000, 0.01)
    ours = compare(before, after, resamples=1999)
    assert ours.p_value * 2000 == pytest.approx(round(ours.p_value * 2000))
    assert ours.low < ours.mean < ours.high


def test_a_part_of_the_queries() -> None:
    """The gain on unseen documents is the number that most reports lack."""
    before, after = results({"q1": 0.0, "q2": 0.5}), results({"q1": 1.0, "q2": 0.5})
    assert compare(before, after, query_ids=["q1"]).mean == 1.0
    assert compare(before, after, query_ids=["q2"]).mean == 0.0


@pytest.mark.parametrize(
    ("other", "arguments", "message"),
    [
        (results({"q1": 0.5, "q9": 0.5}), {}, "2 queries were evaluated for one model only, such as q2, q9"),
        (results({"q1": 0.5, "q2": 0.5}, dataset_revision="xyz"), {}, "dataset_revision is 'abc' for model and 'xyz'"),
        (results({"q1": 0.5, "q2": 0.5}, split="dev"), {}, "split is 'test' for model and 'dev'"),
        (results({"q1": 0.5, "q2": 0.5}, task="scifact"), {}, r"share 0 tasks.*tiny and model: scifact"),
        (results({"q1": 0.5, "q2": 0.5}), {"task": "scifact"}, "0 entries fit task 'scifact'"),
        (results({"q1": 0.5, "q2": 0.5}), {"query_ids": ["q1", "q7"]}, "1 of query_ids were not evaluated, such as q7"),
        (results({"q1": 0.5, "q2": 0.5}), {"query_ids": []}, "no query to compare on"),
        (results({"q1": 0.5, "q2": 0.5}), {"query_ids": ["q1", "q1"]}, "1 ids more than once"),
        (results({"q1": 0.5, "q2": 0.5}), {"resamples": 0}, "at least 1"),
    ],
)
def test_what_is_no_pair_is_refused(other: Results, arguments: dict[str, Any], message: str) -> None:
    """A difference between different queries or data looks like a number and means nothing."""
    with pytest.raises(ValueError, match=message):
        compare(results({"q1": 0.5, "q2": 0.5}), other, **arguments)


def test_tasks_without_queries_are_refused() -> None:
    """STS has no queries; comparing nothing must not give a mean of NaN."""
    empty = results({})
    with pytest.raises(ValueError, match="no query to compare on"):
        compare(empty, empty)


def test_the_common_task_is_found() -> None:
    """With one task in common nothing needs naming; with two the caller must choose."""
    one, two = results({"q1": 0.2}), results({"q1": 0.4})
    one.tasks += results({"q5": 0.5}, task="other").tasks
    assert compare(one, two).mean == pytest.approx(0.2)
    two.tasks += results({"q5": 0.5}, task="other").tasks
    with pytest.raises(ValueError, match="share 2 tasks"):
        compare(one, two)
    assert compare(one, two, task="other").mean == 0


def test_shared_documents_are_those_with_a_gain() -> None:
    """A judged but irrelevant training document says nothing about the query's answer."""
    qrels = {"q1": {"d1": 2}, "q2": {"d2": 1, "d1": 0}, "q3": {"d3": 1, "d1": 1}, "q4": {"d1": 0}}
    assert shared_document_queries(qrels, {"d1"}) == (["q1", "q3"], ["q2"])
    assert shared_document_queries(qrels, []) == ([], ["q1", "q2", "q3"])


def test_the_core_of_the_comparison_stands_alone() -> None:
    """Scripts that hold differences and no results files must get the very same statistics."""
    before, after = pair(40, 0.05)
    x, y = before.task().per_query, after.task().per_query
    core = paired_difference([round(y[q] - x[q], 6) for q in x])
    ours = compare(before, after)
    assert (core.mean, core.low, core.high, core.p_value) == (ours.mean, ours.low, ours.high, ours.p_value)
    for wrong, message in (([], "at least one"), ([0.1, float("nan")], "difference 1 is nan")):
        with pytest.raises(ValueError, match=message):
            paired_difference(wrong)


def test_holm_is_the_textbooks() -> None:
    """Many tasks make a lucky one; the correction must be Holm's, monotone, capped and in the order given."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
    with pytest.raises(ValueError, match=r"1\.5 is not a p-value"):
        holm([0.1, 1.5])


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_never_lowers_and_keeps_the_order(p_values: list[float]) -> None:
    """A corrected p-value below the raw one, or in another order, would be wrong for any input."""
    corrected = holm(p_values)
    assert all(p <= c <= 1 for p, c in zip(p_values, corrected, strict=True))
    ranked = [c for _, c in sorted(zip(p_values, corrected, strict=True))]
    assert ranked == sorted(ranked)


def test_intervals_hold_the_mean_where_few_queries_moved() -> None:
    """The percentile bootstrap held it in 90.8 % at 20 queries; an interval of 95 % must be one."""
    scores = pd.read_parquet(STUDY).query("trained_on == 'nfcorpus' and evaluated_on == 'insuranceqa'")
    table = scores.pivot(index="query_id", columns="method", values="ndcg_at_10").astype(float)
    truth, generator = (table["PairDistill"] - table["KL"]).to_numpy(), np.random.default_rng(0)
    for queries in (20, 50, 104, 300):
        samples = [generator.choice(truth, queries).tolist() for _ in range(1000)]
        found = [paired_difference(sample, resamples=1) for sample in samples]  # the p-value does not matter here
        held = float(np.mean([one.low <= truth.mean() <= one.high for one in found]))
        assert held == pytest.approx(0.95, abs=0.02), queries
    values = [0.1, 0.3, -0.2, 0.25, 0.0]
    scipys = ttest_1samp(values, 0).confidence_interval(0.95)
    assert paired_difference(values).low == pytest.approx(scipys.low)
    assert paired_difference(values).high == pytest.approx(scipys.high)


def test_few_queries_are_said_and_the_published_method_stays() -> None:
    """Below 50 queries no method holds what it says; the study's tables keep theirs, by name."""
    assert "; too few queries: below 50" in str(compare(*pair(49, 0.05)))
    assert "too few" not in str(compare(*pair(50, 0.05)))
    values = [0.1, 0.3, -0.2, 0.25, 0.0]
    old = paired_difference(values, interval="percentile")
    assert (old.low, old.high) == pytest.approx((-0.08, 0.24), abs=0.02)
    with pytest.raises(ValueError, match="interval is 'bca'; it must be one of t, percentile"):
        paired_difference(values, interval="bca")  # type: ignore[arg-type]


def test_one_query_has_no_interval() -> None:
    """[+0.3000, +0.3000] reads as certainty, and is the least certain of all."""
    for kind in ("t", "percentile"):
        one = paired_difference([0.3], interval=kind)  # type: ignore[arg-type]
        assert (one.mean, one.low, one.high, one.holds_0) == (0.3, -np.inf, np.inf, True)
    before, after = results({"q1": 0.2}), results({"q1": 0.5})
    assert "+0.3000 nDCG@10, no interval of one query, p = 1, 1 queries" in str(compare(before, after))
    assert "| +0.3000 no interval of one query |" in effects_table(compare_all(before, after))


def test_a_comparison_knows_what_it_is_of() -> None:
    """Whoever is handed one, such as a card, must not guess the task by the nearest mean."""
    before, after = pair(60, 0.05)
    before.model["revision"] = "r0"
    found = compare(before, after)
    assert (found.task, found.split, found.subset, found.metric, found.group) == (
        *("tiny", "test", "default"),
        *("ndcg_at_10", None),
    )
    assert (found.models, found.revisions, found.interval) == (("model", "model"), ("r0", "r"), "t")
    assert repr(found) == f"<Comparison tiny, model → model: {found}>"
    (effect,) = compare_all(before, {"student": after})
    assert effect.difference == found
    assert repr(effect).startswith("<Effect student on tiny: 0.")


@pytest.mark.parametrize("wrong", [{}, "before.json", None])
def test_what_is_no_results_is_told_what_is(wrong: Any) -> None:
    """A path or a dictionary of scores ended in an AttributeError of `tasks`."""
    ours = results({"q1": 0.5})
    with pytest.raises(TypeError, match=r"before is a (dict|str|NoneType); compare Results: .* Results.load reads"):
        compare(wrong, ours)
    with pytest.raises(TypeError, match=r"KL is a (dict|str|NoneType); compare Results"):
        compare_all(ours, {"KL": wrong})


def test_interval_and_p_that_disagree_are_said() -> None:
    """Over seven queries Student's t may leave out 0 where the test by signs, which assumes less, does not reject."""
    gains = dict(zip("abcdefg", [0.3, 0.31, 0.3, 0.29, 0.3, 0.0, 0.0], strict=True))
    before, after = results(dict.fromkeys(gains, 0.0)), results(gains)
    found = compare(before, after)
    assert found.low > 0
    assert found.p_value > 0.05
    assert found.may_be_chance
    assert "the interval leaves out 0 and p does not: go by p" in str(found)
    assert (
        go_by_p(compare_all(before, {"after": after})) == "Too few queries for these intervals, go by p: after (all)."
    )
