"""Score tensors before and after a loss: checked, brought to one dtype, masked, and reduced."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from st_wkl.functional._checks import check

# No reranker's score is as large; what is, is what masked places are filled with, like the lowest number of a type.
LARGEST_SCORE = 1e6
MASK_VALUES = (-1e4, -65504.0)
Reduction = Literal["batchmean", "mean", "none"]


def masked_log_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Log-softmax over the unmasked places of each row; 0 at the others."""
    # A row without a document gets finite scores: the gradient of a log-softmax over nothing is NaN.
    nothing = torch.where(mask.any(dim=1, keepdim=True), -math.inf, 0.0).to(scores.dtype)
    log_probabilities = torch.where(mask, scores, nothing).log_softmax(dim=1)
    return torch.where(mask, log_probabilities, 0.0)


def prepare(
    student_scores: Tensor,
    teacher_scores: Tensor,
    mask: Tensor | None,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Check both score tensors and bring them to one dtype, divided by temperature, with 0 at masked places."""
    for name, temperature in (
        ("student_temperature", student_temperature),
        ("teacher_temperature", teacher_temperature),
    ):
        if not 0 < temperature < math.inf:
            raise ValueError(f"{name} must be a positive finite number, got {temperature}.")
    if student_scores.ndim != 2:
        raise ValueError(f"student_scores must be (B, N), got the shape {tuple(student_scores.shape)}.")
    dtype = torch.promote_types(student_scores.dtype, torch.float32)
    student = student_scores.to(dtype)
    teacher = check_shape("teacher_scores", teacher_scores, student).to(dtype)
    mask = torch.ones_like(student, dtype=torch.bool) if mask is None else check_shape("mask", mask, student).bool()
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
    return (
        torch.where(mask, student, 0.0) / student_temperature,
        # Known or not yet, what is no score shall not make a gradient NaN, which other processes would take part in.
        torch.where(mask & ~bad, teacher, 0.0) / teacher_temperature,
        mask,
    )


def check_shape(name: str, tensor: Tensor, student: Tensor) -> Tensor:
    """Return `tensor` on the student's device, or raise if it is not of the student's shape."""
    if tensor.shape != student.shape:
        raise ValueError(
            f"{name} must have the shape of student_scores, {tuple(student.shape)}, but has {tuple(tensor.shape)}."
        )
    return tensor.to(student.device)


def check_ranks(ranks: Tensor, student: Tensor, mask: Tensor) -> Tensor:
    """Return the ranks in the student's dtype, 1 at masked places, or raise if one is below 1."""
    ranks = torch.where(mask, check_shape("ranks", ranks, student).to(student.dtype), 1.0)
    bad = ~(ranks >= 1)

    def found(count: int) -> None:
        row, column = bad.nonzero()[0].tolist()
        raise ValueError(f"ranks[{row}, {column}] is {ranks[row, column].item()}; ranks count from 1, the best.")

    check(bad, found)
    return torch.where(bad, 1.0, ranks)


def check_at_least_zero(**parameters: float) -> None:
    """Raise a ValueError that names the first parameter which is negative, infinite or NaN."""
    for name, value in parameters.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be a finite number of at least 0, got {value}.")


def reduce(terms: Tensor, mask: Tensor, reduction: Reduction) -> Tensor:
    """Reduce `(B, N)` terms, which are 0 at masked places."""
    if reduction == "none":
        return terms
    if reduction == "mean":
        return terms.sum() / mask.sum().clamp_min(1)
    return reduce_rows(terms.sum(dim=1), reduction)


def reduce_rows(rows: Tensor, reduction: Reduction) -> Tensor:
    """Reduce `(B,)` row values."""
    if reduction == "none":
        return rows
    if reduction == "batchmean":
        return rows.sum() / max(len(rows), 1)
    raise ValueError(f"reduction must be 'batchmean', 'mean' or 'none', got {reduction!r}.")
