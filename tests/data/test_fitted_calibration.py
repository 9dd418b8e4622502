"""Calibrations that are fitted on judged lists."""

from __future__ import annotations

import math

import numpy as np
import pytest

from st_wkl.data.calibration import fit_calibration
from st_wkl.data.lists import CalibratedTeacher, score_lists
from st_wkl.data.score_store import ScoreStore
from tests.data.test_builder import HAND, LengthTeacher, build


def drawn(scale: float, lists: int = 400, seed: int = 0) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Logits, and one positive a list drawn from the softmax of `scale` times them: a teacher that is off by it."""
    generator = np.random.default_rng(seed)
    scores = [generator.normal(size=8) * 3 for _ in range(lists)]
    labels = []
    for values in scores:
        weights = np.exp(scale * values)
        labels.append(np.eye(8, dtype=int)[generator.choice(8, p=weights / weights.sum())])
    return scores, labels


@pytest.mark.parametrize("scale", [0.25, 1.0, 2.0])
def test_the_temperature_of_the_judgements_is_found(scale: float) -> None:
    """A teacher that is four times too sure has to come out as such, and one that is right as right."""
    fitted = fit_calibration(*drawn(scale), anchor=0)
    assert fitted.scale == pytest.approx(scale, rel=0.15)
    assert fitted.offset == 0
    assert fitted.loss_after <= fitted.loss_before + 1e-9
    assert fitted.lists == 400


def test_platt_finds_scale_and_offset() -> None:
    """Logits become probabilities of relevance, whatever scale and offset the teacher has."""
    generator = np.random.default_rng(0)
    scores = [generator.normal(size=8) * 2 for _ in range(400)]
    labels = [(generator.random(8) < 1 / (1 + np.exp(-(0.5 * s - 1)))).astype(int) for s in scores]
    fitted = fit_calibration(scores, labels, method="platt", anchor=0)
    assert (fitted.scale, fitted.offset) == (pytest.approx(0.5, rel=0.15), pytest.approx(-1, abs=0.15))


def test_the_anchor_holds_the_teacher() -> None:
    """A few judgements must not overrule all that the teacher knows: more anchor, less change."""
    few = [part[:5] for part in drawn(0.1)]
    changes = [abs(math.log(fit_calibration(*few, anchor=anchor).scale)) for anchor in (0, 0.1, 1, 100)]
    assert changes == sorted(changes, reverse=True)
    assert changes[-1] < 0.05
    # A teacher without a mistake asks for an infinite scale, which bounds and anchor keep finite.
    assert math.isfinite(fit_calibration([[5.0, 0.0]], [[1, 0]], anchor=0).scale)


def test_lists_that_say_nothing_are_left_out() -> None:
    """Without a positive or without a negative there is nothing to fit; bad input names the list."""
    scores, labels = [[1.0, 0.0], [1.0, 2.0], [3.0, 1.0]], [[0, 0], [1, 1], [2, 0]]
    assert fit_calibration(scores, labels).lists == 1
    with pytest.raises(ValueError, match="None of 2 lists has both"):
        fit_calibration(scores[:2], labels[:2])
    with pytest.raises(ValueError, match="List 1 has 2 labels and the scores nan"):
        fit_calibration([[1.0, 0.0], [1.0, math.nan]], [[1, 0], [1, 0]])
    with pytest.raises(ValueError, match="List 0 has 2 labels"):
        fit_calibration([[1.0]], [[1, 0]])
    with pytest.raises(ValueError, match="1 lists of scores and 0 of labels"):
        fit_calibration([[1.0]], [])
    with pytest.raises(ValueError, match="method must be"):
        fit_calibration(scores, labels, method="isotonic")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="anchor must be"):
        fit_calibration(scores, labels, anchor=-1)


def test_a_calibrated_teacher_scores_nothing_again() -> None:
    """The store keeps raw scores, so that the calibration may change; the dataset says what it was."""
    teacher = LengthTeacher()
    with ScoreStore(":memory:") as store:
        dev = build(candidates=HAND, teacher=teacher, store=store)
        scored = teacher.scored
        fitted = fit_calibration(dev.train["scores"][:], dev.train["labels"][:])
        dataset = build(candidates=HAND, teacher=CalibratedTeacher(teacher, fitted), store=store)
        assert teacher.scored == scored
    for before, after in zip(dev.train, dataset.train, strict=True):
        assert after["scores"] == pytest.approx([fitted.scale * score for score in before["scores"]], rel=1e-5)
    assert dataset.provenance["teacher"]["calibration"]["scale"] == fitted.scale
    assert score_lists(CalibratedTeacher(teacher, fitted), [], show_progress=False) == []
