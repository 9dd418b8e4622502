"""Losses that compare documents two by two."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from st_wkl.functional._checks import check
from st_wkl.functional._scores import Reduction, Scores, prepare, reduce


def margin_kl(
    student_scores: Tensor,
    teacher_scores: Tensor,
    positives: Tensor,
    *,
    pairs: Literal["positive-negative", "all"] = "positive-negative",
    mask: Tensor | None = None,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    reduction: Reduction = "batchmean",
) -> Tensor:
    """KL divergence between teacher and student on who wins each pair of documents (MarginKL).

    For a pair (i, j), with P = σ(teacher margin) and Q = σ(student margin), the term is
    KL(Bernoulli(P) ‖ Bernoulli(Q)). A softmax over the margins to the positive would not do: softmax ignores a common
    shift, so the positive would receive no gradient at all.

    Args:
        student_scores: `(B, N)` student scores.
        teacher_scores: `(B, N)` teacher scores, raw logits.
        positives: `(B, N)` boolean, True for relevant documents.
        pairs: `"positive-negative"` compares every positive with every negative; `"all"` every two documents.
        mask: `(B, N)` boolean, False where a place holds no document.
        student_temperature: Divides the student margins.
        teacher_temperature: Divides the teacher margins.
        reduction: `"batchmean"` averages the pairs of each row, then the rows; a row without a pair counts 0.
            `"mean"` averages over all pairs of the batch. `"none"` gives the `(B,)` row values.

    Returns:
        The loss: a scalar ≥ 0, or `(B,)` for `reduction="none"`.

    Source:
        Defined by this project, as no standard form exists: soft RankNet (Burges et al., ICML 2005) less the teacher's
        entropy. PairDistill's pair term (https://arxiv.org/abs/2410.01383) is the same with P from a pairwise teacher.

    Example:
        >>> import torch
        >>> teacher, positives = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[True, False, False]])
        >>> student = torch.zeros(1, 3, requires_grad=True)
        >>> margin_kl(student, teacher, positives).backward()
        >>> bool(student.grad[0, 0] < 0)  # the positive is pushed up
        True
    """
    if pairs not in ("positive-negative", "all"):
        raise ValueError(f"pairs must be 'positive-negative' or 'all', got {pairs!r}.")
    scores = prepare(student_scores, teacher_scores, positives, mask, student_temperature, teacher_temperature)
    compared = _both(scores.mask).triu(diagonal=1) if pairs == "all" else _positive_negative(scores)
    teacher, student = _margins(scores.teacher), _margins(scores.student)
    # KL of two Bernoulli distributions, without ever leaving log space.
    terms = torch.sigmoid(teacher) * (F.logsigmoid(teacher) - F.logsigmoid(student)) + (
        torch.sigmoid(-teacher) * (F.logsigmoid(-teacher) - F.logsigmoid(-student))
    )
    return _mean_over_pairs(terms, compared, reduction)


def margin_mse(
    student_scores: Tensor,
    teacher_scores: Tensor,
    positives: Tensor,
    *,
    mask: Tensor | None = None,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    reduction: Reduction = "batchmean",
) -> Tensor:
    """Mean squared error between the student's and the teacher's margins of positives over negatives.

    The temperatures put both margins on one scale, which this loss needs more than any other: it has no softmax that
    would forgive. A teacher whose scores went through a sigmoid has margins below 1 and hardly moves a student of dot
    products; `teacher_temperature=0.05` makes them comparable to logits again.

    Args:
        student_scores: `(B, N)` student scores.
        teacher_scores: `(B, N)` teacher scores.
        positives: `(B, N)` boolean, True for relevant documents.
        mask: `(B, N)` boolean, False where a place holds no document.
        student_temperature: Divides the student margins.
        teacher_temperature: Divides the teacher margins.
        reduction: As for `margin_kl`.

    Returns:
        The loss: a scalar ≥ 0, or `(B,)` for `reduction="none"`.

    Source:
        Hofstätter et al., https://arxiv.org/abs/2010.02666.

    Example:
        >>> import torch
        >>> teacher, positives = torch.tensor([[4.0, 1.0]]), torch.tensor([[True, False]])
        >>> margin_mse(torch.tensor([[1.0, 0.0]]), teacher, positives).item()
        4.0
    """
    scores = prepare(student_scores, teacher_scores, positives, mask, student_temperature, teacher_temperature)
    terms = (_margins(scores.student) - _margins(scores.teacher)) ** 2
    return _mean_over_pairs(terms, _positive_negative(scores), reduction)


def rank_net(
    student_scores: Tensor,
    teacher_scores: Tensor,
    *,
    mask: Tensor | None = None,
    student_temperature: float = 1.0,
    reduction: Reduction = "batchmean",
) -> Tensor:
    """Logistic loss on every pair of documents, for the order that the teacher gives them.

    Args:
        student_scores: `(B, N)` student scores.
        teacher_scores: `(B, N)` teacher scores; only their order counts, and equal scores make no pair.
        mask: `(B, N)` boolean, False where a place holds no document.
        student_temperature: Divides the student margins.
        reduction: As for `margin_kl`.

    Returns:
        The loss: a scalar ≥ 0, or `(B,)` for `reduction="none"`.

    Source:
        RankNet, Burges et al., ICML 2005.

    Example:
        >>> import torch
        >>> round(rank_net(torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 1.0]])).item(), 4)
        0.6931
    """
    scores = prepare(student_scores, teacher_scores, None, mask, student_temperature)
    compared = _both(scores.mask) & (_margins(scores.teacher) > 0)
    return _mean_over_pairs(F.softplus(-_margins(scores.student)), compared, reduction)


def pairwise_kl(
    student_scores: Tensor,
    pairs: Tensor,
    probabilities: Tensor,
    *,
    mask: Tensor | None = None,
    student_temperature: float = 1.0,
) -> Tensor:
    """KL divergence between a pairwise teacher's preferences and the student's, averaged over pairs.

    Args:
        student_scores: `(B, N)` student scores.
        pairs: `(P, 3)` long; each row is (list, i, j), two candidates of one list. Lists may have any number of pairs.
        probabilities: `(P,)` the teacher's probability that i is the better document.
        mask: `(B, N)` boolean, False where a place holds no document.
        student_temperature: Divides the student margins.

    Returns:
        The loss, a scalar ≥ 0; 0 if there are no pairs.

    Raises:
        ValueError: If a pair points outside the lists or at a masked place, or a probability is not within [0, 1].

    Source:
        PairDistill, EMNLP 2024, https://arxiv.org/abs/2410.01383, and its published code, without the loop over pairs.

    Example:
        >>> import torch
        >>> student = torch.tensor([[0.0, 0.0, 2.0]])
        >>> round(pairwise_kl(student, torch.tensor([[0, 0, 1], [0, 2, 1]]), torch.tensor([0.5, 0.9])).item(), 4)
        0.0009
    """
    student, _, _, mask = prepare(student_scores, None, None, mask, student_temperature)
    probabilities = probabilities.to(student)
    if pairs.ndim != 2 or pairs.shape[1] != 3 or probabilities.shape != pairs.shape[:1]:
        raise ValueError(
            f"pairs must be (P, 3) and probabilities (P,), got {tuple(pairs.shape)} and {tuple(probabilities.shape)}."
        )
    rows, first, second = places = pairs.to(student.device).unbind(dim=1)
    sizes = (len(student), *[student.shape[1]] * 2)
    held = torch.stack([(place >= 0) & (place < size) for place, size in zip(places, sizes, strict=True)]).all(dim=0)
    inside = held.clone()
    held[inside] = mask[rows[inside], first[inside]] & mask[rows[inside], second[inside]]
    for name, bad in (
        ("points at a place that holds no document", ~held),
        ("has a probability outside [0, 1]", ~((probabilities >= 0) & (probabilities <= 1))),
    ):
        if bool(bad.any()):
            place = int(bad.nonzero()[0])
            raise ValueError(
                f"pair {place}, (list, i, j) = {tuple(pairs[place].tolist())} with probability "
                f"{probabilities[place].item()}, {name} ({int(bad.sum())} such pairs in this batch). Drop it, or make "
                "the preferences again from these lists."
            )
    margins = student[rows, first] - student[rows, second]
    return _preference_kl(probabilities, margins).sum() / max(len(pairs), 1)


def preference_kl(student_scores: Tensor, preferences: Tensor, mask: Tensor, student_temperature: float) -> Tensor:
    """Compute `pairwise_kl` from `(B, N, N)` preferences, NaN where nobody was asked: none has to be counted first."""
    student, _, _, mask = prepare(student_scores, None, None, mask, student_temperature)
    asked = ~preferences.isnan()
    bad = asked & ~((preferences >= 0) & (preferences <= 1) & _both(mask))

    def found(count: int) -> None:
        place = tuple(bad.nonzero()[0].tolist())
        raise ValueError(
            f"the preference (list, i, j) = {place} is {preferences[place].item()} ({count} such in this batch). It "
            "must lie within [0, 1], between two documents of the list. Make the preferences again from these lists."
        )

    check(bad, found)
    terms = _preference_kl(torch.where(asked & ~bad, preferences.to(student), 0.5), _margins(student))
    return torch.where(asked, terms, 0.0).sum() / asked.sum().clamp_min(1)


def _preference_kl(probabilities: Tensor, margins: Tensor) -> Tensor:
    entropy = torch.special.entr(probabilities) + torch.special.entr(1 - probabilities)
    return -probabilities * F.logsigmoid(margins) - (1 - probabilities) * F.logsigmoid(-margins) - entropy


def _margins(scores: Tensor) -> Tensor:
    return scores[:, :, None] - scores[:, None, :]


def _both(mask: Tensor) -> Tensor:
    return mask[:, :, None] & mask[:, None, :]


def _positive_negative(scores: Scores) -> Tensor:
    return scores.positives[:, :, None] & (scores.mask & ~scores.positives)[:, None, :]


def _mean_over_pairs(terms: Tensor, compared: Tensor, reduction: Reduction) -> Tensor:
    return reduce(torch.where(compared, terms, 0.0), compared, reduction, per_row=True)
