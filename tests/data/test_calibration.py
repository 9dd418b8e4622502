"""Several teachers on one scale, and one score out of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import rankdata, zscore

from st_wkl.data.calibration import calibrate, combine, entropy_certainty
from st_wkl.data.score_store import ScoreStore
from st_wkl.data.teachers import CallableTeacher, EnsembleTeacher, score_lists

LISTS = [("red cat", ["a red cat", "a cat", "dog", "a red dog that runs"]), ("bird", ["bird", "no"]), ("x", ["only"])]
numbers = st.lists(st.floats(-1e6, 1e6, width=32), min_size=2, max_size=30)


def overlap(query: str, document: str) -> float:
    """Score by shared words, on a small scale."""
    return len({*query.split()} & {*document.split()}) / 10


def length(query: str, document: str) -> float:
    """Score by length, on a large scale."""
    return 100.0 * len(document)


def teachers() -> list[CallableTeacher]:
    """Make two teachers of very different scales."""
    return [CallableTeacher(overlap, name="overlap", version="1"), CallableTeacher(length, name="length", version="1")]


@given(numbers)
def test_calibrations_are_the_textbook_ones_and_keep_the_order(values: list[float]) -> None:
    """Against scipy; a calibration that swaps two candidates teaches the opposite."""
    scores = np.array(values, dtype=np.float64)
    if np.ptp(scores) < 1e-3:
        return
    np.testing.assert_allclose(calibrate(scores, "z-score"), zscore(scores), atol=1e-3)
    np.testing.assert_allclose(calibrate(scores, "rank"), (rankdata(scores) - 1) / (len(scores) - 1), atol=1e-6)
    low_to_high = np.argsort(scores, kind="stable")
    for method in ("none", "z-score", "min-max", "rank"):
        assert (np.diff(calibrate(scores, method)[low_to_high]) >= 0).all()
    assert calibrate(scores, "min-max").min() == 0
    assert calibrate(scores, "min-max").max() == 1


@pytest.mark.parametrize("method", ["none", "z-score", "min-max", "rank"])
def test_odd_lists_stay_finite(method: str) -> None:
    """Constant lists, one candidate, none, and tiny spreads: 0/0 is the classic NaN of calibration."""
    for scores in ([], [3.0], [2.0, 2.0, 2.0], [0.0, 1e-300], [1e30, -1e30]):
        found = calibrate(scores, method)  # type: ignore[arg-type]
        assert found.shape == (len(scores),)
        assert np.isfinite(found).all()
    with pytest.raises(ValueError, match="finite numbers, got nan"):
        calibrate([1.0, float("nan")], method)  # type: ignore[arg-type]


def test_unknown_methods_are_refused() -> None:
    """A misspelt method must not mean none."""
    with pytest.raises(ValueError, match="method must be"):
        calibrate([1.0], "zscore")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="method must be"):
        EnsembleTeacher(teachers(), calibration="zscore")  # type: ignore[arg-type]


def test_certainty_is_one_minus_the_normalised_entropy() -> None:
    """By hand for two candidates, and its ends."""
    p = 1 / (1 + np.exp(-2.0))
    by_hand = 1 + (p * np.log2(p) + (1 - p) * np.log2(1 - p))
    assert entropy_certainty([2.0, 0.0]) == pytest.approx(by_hand)
    assert entropy_certainty([4.0, 0.0], temperature=2.0) == pytest.approx(by_hand)
    assert entropy_certainty([1000.0, 0.0, -5.0]) == pytest.approx(1.0)
    assert entropy_certainty([7.0, 7.0, 7.0]) == pytest.approx(0.0, abs=1e-12)
    assert entropy_certainty([7.0]) == 0.0
    with pytest.raises(ValueError, match="temperature must be positive"):
        entropy_certainty([1.0, 2.0], temperature=0)


def test_combine_weighs() -> None:
    """Weights are shares, whatever they sum to; a weight of 0 silences a teacher."""
    first, second = [1.0, 0.0, 0.5], [0.0, 10.0, 5.0]
    np.testing.assert_allclose(combine([first, second]), [0.5, 5.0, 2.75])
    np.testing.assert_allclose(combine([first, second], [30, 10]), [0.75, 2.5, 1.625])
    np.testing.assert_allclose(combine({"a": first, "b": second}, [1, 0]), first)
    np.testing.assert_allclose(combine([first, second], calibration="min-max"), [0.5, 0.5, 0.5])


def test_certainty_gives_the_word_to_the_sure_teacher() -> None:
    """Per query: a teacher that finds all candidates alike leaves the list to the other one."""
    sure, unsure = [9.0, -3.0, -3.0], [0.0, 0.01, 0.0]
    np.testing.assert_allclose(combine([sure, unsure], certainty=True), sure, atol=1e-3)
    np.testing.assert_allclose(combine([unsure, unsure], certainty=True), unsure, atol=1e-6)
    np.testing.assert_allclose(combine([[1.0, 1.0], [2.0, 2.0]], [3, 1], certainty=True), [1.25, 1.25])
    # Measured before calibration, which would make the unsure teacher look sure.
    assert combine([sure, unsure], certainty=True, calibration="min-max")[0] > 0.99


def test_combine_names_what_is_wrong() -> None:
    """Ragged lists, bad weights, scores that are not finite."""
    with pytest.raises(ValueError, match="Teacher 'b' has 1 scores, the first has 2"):
        combine({"a": [1.0, 2.0], "b": [1.0]})
    with pytest.raises(ValueError, match=r"Teacher 1 has the score inf"):
        combine([[1.0, 2.0], [1.0, float("inf")]])
    with pytest.raises(ValueError, match="no teachers"):
        combine([])
    for weights in ([1.0], [1.0, -1.0], [0.0, 0.0], [1.0, float("nan")]):
        with pytest.raises(ValueError, match=r"weights for|Weights must be"):
            combine([[1.0], [2.0]], weights)


def test_ensemble_mixes_lists_and_keeps_raw_scores() -> None:
    """Other weights tomorrow score nothing again, since the store holds what each teacher said."""
    first, second = teachers()
    ensemble = EnsembleTeacher([first, second], weights=[2, 1], calibration="rank")
    with ScoreStore(":memory:") as store:
        found = score_lists(ensemble, LISTS, store=store, show_progress=False)
        assert store.count() == 14
        assert store.get(second.identity, [("bird", "no")])[0] == 200.0
        raw = [score_lists(teacher, LISTS, store=store, show_progress=False) for teacher in (first, second)]
    for place, scores in enumerate(found):
        expected = (2 * calibrate(raw[0][place], "rank") + calibrate(raw[1][place], "rank")) / 3
        np.testing.assert_allclose(scores, expected, rtol=1e-6)
    assert [len(scores) for scores in found] == [4, 2, 1]


def test_ensemble_is_known_by_everything_that_decides() -> None:
    """Weights, calibration and certainty are part of the identity."""
    variants = [
        EnsembleTeacher(teachers()),
        EnsembleTeacher(teachers(), weights=[1, 2]),
        EnsembleTeacher(teachers(), calibration="z-score"),
        EnsembleTeacher(teachers(), certainty=True),
        EnsembleTeacher(teachers(), certainty=True, temperature=2.0),
        EnsembleTeacher(teachers()[::-1]),
    ]
    identities = [str(variant.identity) for variant in variants]
    assert len(set(identities)) == len(variants)
    with pytest.raises(ValueError, match="two teachers or more"):
        EnsembleTeacher(teachers()[:1])
    with pytest.raises(ValueError, match="Teacher 1 is the same"):
        EnsembleTeacher([teachers()[0]] * 2)


def test_score_lists_of_a_plain_teacher() -> None:
    """Ragged and empty lists come back in their shape."""
    found = score_lists(teachers()[1], [*LISTS, ("q", [])], show_progress=False)
    assert [len(scores) for scores in found] == [4, 2, 1, 0]
    assert found[1].tolist() == [400.0, 200.0]
    assert score_lists(teachers()[1], [], show_progress=False) == []


def test_callable_teacher() -> None:
    """Any function, pair by pair or in one call, known by name and version."""
    plain, batched = (
        teachers()[0],
        CallableTeacher(lambda pairs: [len(d) for _, d in pairs], name="b", version="2", batched=True),
    )
    assert plain.score([("a b", "b c")]).tolist() == [np.float32(0.1)]
    assert batched.score([("a", "bcd"), ("a", "")]).tolist() == [3.0, 0.0]
    assert plain.identity != CallableTeacher(overlap, name="overlap", version="2").identity
    with pytest.raises(ValueError, match="returned None for query 'a' and document 'b'"):
        CallableTeacher(lambda q, d: None, name="n", version="1").score([("a", "b")])  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match="needs a name and a version"):
        CallableTeacher(overlap, name="overlap", version="")
    with pytest.raises(TypeError, match="must be callable"):
        CallableTeacher(3, name="n", version="1")  # type: ignore[arg-type]
