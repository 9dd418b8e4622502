"""What a loss is told: spelled out, described, within its range, under one name."""

from __future__ import annotations

import inspect
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import st_wkl
import st_wkl.losses as ours
from st_wkl import KLDistillLoss
from st_wkl.losses import CoherenceLoss, InBatchContrastiveLoss, MarginKL, WeightedKLDistillationLoss, WeightedSumLoss
from st_wkl.training.identity import Describer, differences
from tests.helpers.students import assert_same, gradients, listwise_batch, make_student, ragged_rows
from tests.helpers.vectors import vectors_for

FROM_ZERO = ("gamma", "alpha", "beta", "embedding_weight", "margin_weight", "pair_weight", "in_batch_weight")
POSITIVE = ("student_temperature", "teacher_temperature")
TRUTHS = ("detach_weights", "own_negatives", "gather_across_devices", "in_batch")


def bad_values(option: str) -> list[Any]:
    if option in (*FROM_ZERO, *POSITIVE, "positive_threshold"):
        below = [0.0, -1.0] if option in POSITIVE else [-1.0] if option in FROM_ZERO else []
        return [*below, math.nan, math.inf, "5", True]
    return ["yes", 1] if option in TRUTHS else []


CASES = [
    (name, option, value)
    for name in ours.__all__
    for option in inspect.signature(getattr(ours, name)).parameters
    for value in bad_values(option)
]


@pytest.mark.parametrize(("name", "option", "value"), CASES, ids=[f"{n} {o}={v!r}" for n, o, v in CASES])
def test_values_out_of_range_are_refused_by_every_loss(
    name: str, option: str, value: Any, tiny_bert_path: Path
) -> None:
    """A number as text was a TypeError in the middle of a batch, a NaN a loss that is NaN."""
    said = "the weight of" if option in ("pair_weight", "in_batch_weight") else option
    given = {"vectors": vectors_for(ragged_rows())} if name == "EmbeddingDistillLoss" else {}
    with pytest.raises(ValueError, match=said) as caught:
        getattr(ours, name)(make_student("dense", tiny_bert_path), **given, **{option: value})
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("name", [*ours.__all__])
def test_every_option_is_in_the_signature_and_described(name: str) -> None:
    """Options behind **kwargs are found by nobody: no editor offers them, and help() does not tell them."""
    kind = getattr(ours, name)
    parameters = inspect.signature(kind).parameters
    assert not any(entry.kind in (entry.VAR_KEYWORD, entry.VAR_POSITIONAL) for entry in parameters.values())
    for option in parameters:
        assert f"        {option}: " in kind.__doc__, option
    assert getattr(st_wkl, name, kind) is kind


@pytest.mark.parametrize("kind", ["dense", "sparse", "multi-vector", "cross-encoder"])
def test_kl_is_weighted_kl_without_weights(kind: str, tiny_bert_path: Path) -> None:
    """Two names of one loss, to the last digit and in every class, or the baseline of all comparisons is another."""
    model = make_student(kind, tiny_bert_path).double()
    batch = listwise_batch(model, kind, ragged_rows())
    options: dict[str, Any] = {"teacher_temperature": 2.0}
    expected, wanted = gradients(WeightedKLDistillationLoss(model, gamma=0, alpha=0, **options), model, *batch)
    value, found = gradients(KLDistillLoss(model, **options), model, *batch)
    assert value == pytest.approx(expected, abs=1e-12)
    assert_same(wanted, found, 1e-12)
    assert type(KLDistillLoss(model)).__name__ == "KLDistillLoss"
    assert "Distilling the Knowledge" in KLDistillLoss(model).citation


@pytest.mark.parametrize("kind", [InBatchContrastiveLoss, CoherenceLoss])
def test_the_temperature_of_the_release_before_is_taken_and_said(kind: Any, tiny_bert_path: Path) -> None:
    """One word for one thing, without breaking who wrote the other."""
    model = make_student("dense", tiny_bert_path)
    with pytest.warns(FutureWarning, match=f"{kind.__name__}: temperature is called student_temperature now"):
        loss = kind(model, temperature=0.1)
    assert loss.student_temperature == 0.1
    with pytest.warns(FutureWarning, match="student_temperature"):
        assert loss.temperature == 0.1
    assert loss.get_config_dict()["student_temperature"] == 0.1


def test_what_is_no_term_of_a_sum_is_said(tiny_bert_path: Path) -> None:
    """A pair that is turned round, and a loss over another model, whose temperature and similarity it would take."""
    model, other = make_student("dense", tiny_bert_path), make_student("dense", tiny_bert_path)
    with pytest.raises(TypeError, match=r"\(weight, loss\) pairs, and one is \(MarginKL, 1\)\. Turn it round"):
        WeightedSumLoss(model, [(MarginKL(model), 1)])  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"\(weight, loss\) pairs, and one is \(MarginKL\)"):
        WeightedSumLoss(model, [MarginKL(model)])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="MarginKL was made over another model than the sum"):
        WeightedSumLoss(model, [(1.0, MarginKL(other))])
    with pytest.raises(ValueError, match="the weight of MarginKL is '1'"):
        WeightedSumLoss(model, [("1", MarginKL(model))])  # type: ignore[list-item]


def test_a_loss_of_ones_own_keeps_its_constructor(tiny_bert_path: Path) -> None:
    """Subclasses with options of their own are told apart and shown by these, and those of their parents."""

    class Strong(MarginKL):
        def __init__(self, model: Any, strength: float = 2.0, **options: Any) -> None:
            super().__init__(model, **options)
            self.strength = strength

        def loss_from_scores(self, *args: Any) -> torch.Tensor:
            return self.strength * super().loss_from_scores(*args)

    model = make_student("dense", tiny_bert_path).double()
    batch = listwise_batch(model, "dense", ragged_rows())
    strong = Strong(model, 3.0, pairs="all")
    assert strong(*batch).item() == pytest.approx(3 * MarginKL(model, pairs="all")(*batch).item())
    assert strong.get_config_dict()["strength"] == 3.0
    assert repr(MarginKL(model)) == (
        "MarginKL(pairs='positive-negative', similarity_fct='pairwise_cos_sim', student_temperature=0.05, "
        "teacher_temperature=1.0)"
    )


def test_a_run_of_the_release_before_is_known(tiny_bert_path: Path) -> None:
    """Its description says where a class lay and what an option was called: neither makes another run of it."""
    model = make_student("dense", tiny_bert_path)
    for loss, home in (
        (InBatchContrastiveLoss(model, student_temperature=0.1), "in_batch"),
        (ours.PearsonDistillLoss(model), "pearson"),
        (
            WeightedSumLoss(model, [(1.0, WeightedKLDistillationLoss(model)), (0.5, CoherenceLoss(model))]),
            "weighted_sum",
        ),
    ):
        now = Describer(model)(loss)
        there = json.loads(json.dumps(now))
        there["class"] = f"st_wkl.losses.{home}.{type(loss).__name__}"
        if home == "in_batch":
            there["options"]["temperature"] = there["options"].pop("student_temperature")
        assert not differences(there, now)
    other = Describer(model)(InBatchContrastiveLoss(model, student_temperature=0.2))
    there = Describer(model)(InBatchContrastiveLoss(model, student_temperature=0.1))
    there["options"]["temperature"] = there["options"].pop("student_temperature")
    assert differences(there, other) == {"student_temperature": (0.1, 0.2)}
