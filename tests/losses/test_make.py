"""Losses by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from st_wkl.functional import weighted_kl
from st_wkl.losses import WeightedKLDistillationLoss
from st_wkl.training import make_loss
from tests.helpers.students import make_student


def test_the_default_has_a_name(tiny_bert_path: Path) -> None:
    """What is trained where nothing is said could not be written down, nor be had for another student."""
    for kind, name in (("dense", "kl+in-batch"), ("sparse", "kl+in-batch"), ("multi-vector", "kl")):
        student = make_student(kind, tiny_bert_path)
        assert str(make_loss(student)) == str(make_loss(student, name))
    student = make_student("dense", tiny_bert_path)
    assert make_loss(student, "weighted-kl+in-batch", gamma=2.0).weights == [1.0, 1.0]
    assert make_loss(student, "kl+in-batch", in_batch=0.5).weights == [1.0, 0.5]
    assert isinstance(make_loss(student, "kl+in-batch", in_batch=0.0), WeightedKLDistillationLoss)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("kl+in-bach", r"there is no loss 'in-bach' \(did you mean 'in-batch'\?\)"),
        ("kl+pearson", "'kl.pearson': by name, in-batch alone can be added"),
        ("in-batch+in-batch", "in-batch alone can be added to another loss"),
        ("kl+", "there is no loss ''"),
    ],
)
def test_what_cannot_be_added_by_name_is_said(name: str, message: str, tiny_bert_path: Path) -> None:
    """A term that is left out silently is another loss."""
    with pytest.raises(ValueError, match=message):
        make_loss(make_student("dense", tiny_bert_path), name)


def test_function_and_module_weigh_alike(tiny_bert_path: Path) -> None:
    """The same words made two gradients, one by the function and another by the module."""
    scores = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    teacher, positives = torch.randn(3, 4), torch.tensor([[True, False, False, False]] * 3)
    loss = WeightedKLDistillationLoss(make_student("dense", tiny_bert_path), student_temperature=1.0)
    mask = torch.ones_like(positives)
    (module,) = torch.autograd.grad(loss.loss_from_scores(scores, teacher, positives, mask), scores)
    (function,) = torch.autograd.grad(weighted_kl(scores, teacher, positives), scores)
    torch.testing.assert_close(module, function)
