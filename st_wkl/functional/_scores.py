"""Score tensors before and after a loss: checked, brought to one dtype, masked, and reduced."""

from __future__ import annotations

import math
import numbers
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from st_wkl.functional._checks import check

# No reranker's score is as large; what is, is what masked places are filled with, like the lowest number of a type.
LARGEST_SCORE = 1e6
MASK_VALUES = (-1e4, -65504.0)
Reduction = Literal["batchmean", "mean", "none"]


class Scores(NamedTuple):
    """The `(B, N)` tensors of a loss, ready to compute with: scores divided by temperature, 0 at masked places."""

    student: Tensor
    teacher: Tensor
    positives: Tensor
    mask: Tensor


def prepare(
    student_scores: Tensor,
    teacher_scores: Tensor | None,
    positives: Tensor | None,
    mask: Tensor | None,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
) -> Scores:
    """Check the tensors of a loss, None for those that it does not have, and bring them to one dtype."""
    check_positive(student_temperature=student_temperature, teacher_temperature=teacher_temperature)
    if student_scores.ndim != 2:
        raise ValueError(f"student_scores must be (B, N), got the shape {tuple(student_scores.shape)}.")
    student = student_scores.to(torch.promote_types(student_scores.dtype, torch.float32))
    mask = torch.ones_like(student, dtype=torch.bool) if mask is None else check_shape("mask", mask, student).bool()
    positives = torch.zeros_like(mask) if positives is None else check_shape("positives", positives, student).bool()
    if teacher_scores is None:
        teacher = torch.zeros_like(student)
    else:
        teacher = _known(check_shape("teacher_scores", teacher_scores, student).to(student.dtype), mask)
    student = torch.where(mask, student, 0.0) / student_temperature
    return Scores(student, teacher / teacher_temperature, positives & mask, mask)


def _known(teacher: Tensor, mask: Tensor) -> Tensor:
    """Return the teacher's scores, 0 at masked places, or raise where one is none."""
    bad = mask & ~(teacher.isfinite() & (teacher.abs() <= LARGEST_SCORE))
    for value in MASK_VALUES:
        bad |= mask & (teacher == value)

    def found(count: int) -> None:
        row, column = bad.nonzero()[0].tolist()
        raise ValueError(
            f"teacher_scores[{row}, {column}] is {teacher[row, column].item()} ({count} such values in this "
            "batch). One of them makes every weight of the student NaN. Score the pair again, drop it from the "
            f"dataset, or set mask to False there to leave the document out. Beyond {LARGEST_SCORE:g} and at "
            f"{' and '.join(f'{value:g}' for value in MASK_VALUES)} it is taken for a mask, not for a score."
        )

    check(bad, found)
    # Known or not yet, what is no score shall not make a gradient NaN, which other processes would take part in.
    return torch.where(mask & ~bad, teacher, 0.0)


def check_shape(name: str, tensor: Tensor, like: Tensor, of: str = "student_scores") -> Tensor:
    """Return `tensor` on the device of `like`, or raise if it is not of its shape."""
    if tensor.shape != like.shape:
        raise ValueError(f"{name} must have the shape of {of}, {tuple(like.shape)}, but has {tuple(tensor.shape)}.")
    return tensor.to(like.device)


def check_positive(**parameters: Any) -> None:
    """Raise a ValueError that names the first parameter which is no number above 0."""
    for name, value in parameters.items():
        if not (is_number(value) and value > 0):
            raise ValueError(f"{name} must be a positive finite number, got {value!r}.")


def check_at_least_zero(**parameters: Any) -> None:
    """Raise a ValueError that names the first parameter which is negative, infinite, NaN or no number."""
    for name, value in parameters.items():
        if not (is_number(value) and value >= 0):
            raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}.")


def is_number(value: Any) -> bool:
    """Tell whether a value is a finite number; a truth value is none."""
    known = isinstance(value, numbers.Real | Tensor) and not isinstance(value, bool)
    return known and math.isfinite(value)


def masked_log_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Log-softmax over the unmasked places of each row; 0 at the others."""
    # A row without a document gets finite scores: the gradient of a log-softmax over nothing is NaN.
    nothing = torch.where(mask.any(dim=1, keepdim=True), -math.inf, 0.0).to(scores.dtype)
    return torch.where(mask, torch.where(mask, scores, nothing).log_softmax(dim=1), 0.0)


def reduce(terms: Tensor, counted: Tensor, reduction: Reduction, per_row: bool = False) -> Tensor:
    """Reduce terms, whose first axis is the rows.

    Args:
        terms: `(B, …)`, 0 where `counted` is False.
        counted: Boolean of the same shape, what `"mean"` divides by the number of.
        reduction: `"batchmean"`, `"mean"` or `"none"`.
        per_row: Whether a row is the mean of its terms and not their sum, and `"none"` gives rows.
    """
    if reduction not in ("batchmean", "mean", "none"):
        raise ValueError(f"reduction must be 'batchmean', 'mean' or 'none', got {reduction!r}.")
    if reduction == "mean":
        return terms.sum() / counted.sum().clamp_min(1)
    rows = terms.flatten(1).sum(dim=1)
    if per_row:
        rows = rows / counted.flatten(1).sum(dim=1).clamp_min(1)
    if reduction == "none":
        return rows if per_row else terms
    return rows.sum() / max(len(rows), 1)
