"""Corrections of a teacher's scores where the judgements say that it is wrong."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from st_wkl.functional._scores import check_shape


def raise_positives(teacher_scores: Tensor, positives: Tensor, mask: Tensor | None = None) -> Tensor:
    """Give every positive the highest teacher score of its row: the judgements overrule a teacher that is wrong.

    Args:
        teacher_scores: `(B, N)` teacher scores.
        positives: `(B, N)` boolean, True for relevant documents. A row without any stays as it is.
        mask: `(B, N)` boolean, False where a place holds no document; such places neither count nor change.

    Returns:
        `(B, N)` corrected scores in a new tensor.

    Source:
        CollectiveKD, NAACL 2022 (https://arxiv.org/abs/2205.03273), where it is done for the one labelled positive.

    Example:
        >>> import torch
        >>> raise_positives(torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([[True, False, False]]))
        tensor([[3., 3., 2.]])
    """
    positives, mask = _checked(teacher_scores, positives, mask)
    if not teacher_scores.numel():
        return teacher_scores.clone()
    best = torch.where(mask, teacher_scores, -math.inf).amax(dim=1, keepdim=True)
    return torch.where(positives, best, teacher_scores)


def swap_positives(teacher_scores: Tensor, positives: Tensor, mask: Tensor | None = None) -> Tensor:
    """Where the teacher's best document of a row is no positive, swap its score with that of the best positive.

    Unlike `raise_positives` this keeps the row's set of scores, and with it the entropy of its softmax.

    Args:
        teacher_scores: `(B, N)` teacher scores.
        positives: `(B, N)` boolean, True for relevant documents. A row without any stays as it is.
        mask: `(B, N)` boolean, False where a place holds no document; such places neither count nor change.

    Returns:
        `(B, N)` corrected scores in a new tensor. Of equal scores the first in the row takes part, and a positive that
        shares the highest score is right already.

    Source:
        The label swap of DGAD (https://arxiv.org/abs/2409.01627).

    Example:
        >>> import torch
        >>> swap_positives(torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([[True, False, False]]))
        tensor([[3., 1., 2.]])
    """
    positives, mask = _checked(teacher_scores, positives, mask)
    if not teacher_scores.numel():
        return teacher_scores.clone()
    best, best_place = torch.where(mask, teacher_scores, -math.inf).max(dim=1, keepdim=True)
    positive, positive_place = torch.where(positives, teacher_scores, -math.inf).max(dim=1, keepdim=True)
    wrong = positives.any(dim=1, keepdim=True) & (positive < best)
    swapped = teacher_scores.scatter(1, best_place, positive).scatter(1, positive_place, best)
    return torch.where(wrong, swapped, teacher_scores)


def _checked(scores: Tensor, positives: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    if scores.ndim != 2:
        raise ValueError(f"teacher_scores must be (B, N), got the shape {tuple(scores.shape)}.")
    mask = torch.ones_like(scores) if mask is None else check_shape("mask", mask, scores, "teacher_scores")
    positives = check_shape("positives", positives, scores, "teacher_scores")
    return positives.bool() & mask.bool(), mask.bool()
