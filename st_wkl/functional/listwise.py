"""Losses over whole lists: weighted KL, KL, correlation, and the contrast that needs no teacher."""

from __future__ import annotations

import math
import warnings
from typing import Literal

import torch
from torch import Tensor

from st_wkl.functional._checks import check
from st_wkl.functional._scores import (
    Reduction,
    Scores,
    check_at_least_zero,
    check_shape,
    masked_log_softmax,
    prepare,
    reduce,
)


def weighted_kl(
    student_scores: Tensor,
    teacher_scores: Tensor,
    positives: Tensor,
    *,
    gamma: float = 5.0,
    alpha: float = 1.0,
    beta: float | None = None,
    ranks: Tensor | None = None,
    mask: Tensor | None = None,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    detach_weights: bool = True,
    several_positives: Literal["best", "first"] = "best",
    reduction: Reduction = "batchmean",
) -> Tensor:
    r"""Contrastively weighted KL divergence (CKL) between teacher and student over each candidate list.

    With `p` and `q` the teacher's and the student's softmax over a row and `r` the student's ranks,

        loss = Σ_i w_i · p_i (ln p_i − ln q_i),   w_i = (1 − q_i)^γ      for a positive,
                                                  w_i = q_i^(γ − β_i)    for a negative,
        β_i = α (1/r_i − 1/r_pos)

    so a positive that the student already scores well counts little, and a negative counts the more the better the
    student scores it and the higher it stands above the positive. `gamma=0, alpha=0` is exactly the KL divergence;
    any other setting is not a divergence: it can be negative, and a student equal to the teacher still moves.

    Args:
        student_scores: `(B, N)` student scores.
        teacher_scores: `(B, N)` teacher scores, raw logits.
        positives: `(B, N)` boolean, True for relevant documents. A row without any has only negatives, with β = 0.
        gamma: Strength of the contrastive weights; 5 is the authors' main setting. 0 turns them off.
        alpha: Strength of the rank bias β; 1 is the authors' main setting. |β| never exceeds it.
        beta: One constant β for all negatives in place of the rank bias; the authors used 0, 0.5 and 1.
        ranks: `(B, N)` ranks (1 = best) to use in β, for example those of the retriever that mined the list. By
            default the ranks inside the row by the present student scores, equal scores sharing the better rank.
        mask: `(B, N)` boolean, False where a place holds no document.
        student_temperature: Divides the student scores.
        teacher_temperature: Divides the teacher scores.
        detach_weights: Treat the weights as constants, which this project's study found ahead or level on every
            collection. False lets gradients flow through them, as the authors do. The value is the same.
        several_positives: Where a row has more than one positive: `"best"` takes the best-ranked one for r_pos and the
            exponent γ for each of them, as the paper defines positives; `"first"` does what the authors' code does:
            r_pos of the first positive in the row, and the exponent γ − β_i for the others.
        reduction: `"batchmean"` sums each row and averages the rows, comparable with `DistillKLDivLoss`. `"mean"`
            averages over candidates too, as the authors' code does; it is smaller by the number of candidates, so a
            learning rate does not carry over between the two. `"none"` gives the `(B, N)` terms.

    Returns:
        The loss: a scalar, or `(B, N)` for `reduction="none"` with 0 at masked places.

    Source:
        Yang, Qiao, He, Yang: Weighted KL-Divergence for Document Ranking Model Refinement, SIGIR 2024
        (https://arxiv.org/abs/2406.05977), and its published code. Differences: fresh ranks, constant weights and the
        mean per row by default, and the two points under `several_positives`.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.0, 2.0, 1.0]]), torch.tensor([[3.0, 1.0, 0.0]])
        >>> positives = torch.tensor([[True, False, False]])
        >>> round(weighted_kl(student, teacher, positives).item(), 4)
        1.1436
    """
    scores = prepare(student_scores, teacher_scores, positives, mask, student_temperature, teacher_temperature)
    terms, log_q = _kl_terms(scores)
    weights = _weights(
        log_q.detach() if detach_weights else log_q, scores, gamma, alpha, beta, ranks, several_positives
    )
    return reduce(terms if weights is None else terms * weights, scores.mask, reduction)


def contrastive_weights(
    student_scores: Tensor,
    positives: Tensor,
    *,
    gamma: float = 5.0,
    alpha: float = 1.0,
    beta: float | None = None,
    ranks: Tensor | None = None,
    mask: Tensor | None = None,
    student_temperature: float = 1.0,
    several_positives: Literal["best", "first"] = "best",
) -> Tensor:
    """Return the weights w of `weighted_kl`, to look at: they say which documents the student still learns from.

    Args:
        student_scores: `(B, N)` student scores; no gradient passes.
        positives: `(B, N)` boolean, True for relevant documents.
        gamma: As for `weighted_kl`, like all that follow.
        alpha: See `weighted_kl`.
        beta: See `weighted_kl`.
        ranks: See `weighted_kl`.
        mask: See `weighted_kl`.
        student_temperature: See `weighted_kl`.
        several_positives: See `weighted_kl`.

    Returns:
        `(B, N)` weights between 0 and 1, 0 at masked places.

    Example:
        >>> import torch
        >>> contrastive_weights(torch.zeros(1, 2), torch.tensor([[True, False]]), gamma=1.0, alpha=0.0)
        tensor([[0.5000, 0.5000]])
    """
    scores = prepare(student_scores.detach(), None, positives, mask, student_temperature)
    log_q = masked_log_softmax(scores.student, scores.mask)
    weights = _weights(log_q, scores, gamma, alpha, beta, ranks, several_positives)
    return torch.where(scores.mask, torch.ones_like(log_q) if weights is None else weights, 0.0)


def kl_divergence(
    student_scores: Tensor,
    teacher_scores: Tensor,
    *,
    mask: Tensor | None = None,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    reduction: Reduction = "batchmean",
) -> Tensor:
    """KL divergence from the teacher's to the student's softmax over each candidate list.

    Args:
        student_scores: `(B, N)` student scores.
        teacher_scores: `(B, N)` teacher scores, raw logits.
        mask: `(B, N)` boolean, False where a place holds no document.
        student_temperature: Divides the student scores.
        teacher_temperature: Divides the teacher scores.
        reduction: `"batchmean"`, `"mean"` (over candidates too) or `"none"`, as for `weighted_kl`.

    Returns:
        The loss: a scalar ≥ 0, or `(B, N)` for `reduction="none"`.

    Source:
        Hinton et al., https://arxiv.org/abs/1503.02531, without the factor temperature² that
        `sentence_transformers`' `DistillKLDivLoss` multiplies in.

    Example:
        >>> import torch
        >>> scores = torch.tensor([[2.0, 1.0, 0.0]])
        >>> kl_divergence(scores, scores + 7).item()
        0.0
    """
    scores = prepare(student_scores, teacher_scores, None, mask, student_temperature, teacher_temperature)
    return reduce(_kl_terms(scores)[0], scores.mask, reduction)


def regularised_kl(
    student_scores: Tensor,
    teacher_scores: Tensor,
    positives: Tensor,
    *,
    beta: float = 0.02,
    mask: Tensor | None = None,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
) -> Tensor:
    """KL divergence plus a term that asks for certainty about the labels (the predecessor of CKL, a baseline).

        mean over all candidates of p (ln p − ln q)  +  β Σ q ln q  on positives  +  β / ln 2 · Σ q  on negatives

    with both sums over the whole batch. A sum beside a mean is the authors'; with other batch sizes β is another.

    Args:
        student_scores: `(B, N)` student scores.
        teacher_scores: `(B, N)` teacher scores, raw logits.
        positives: `(B, N)` boolean, True for relevant documents.
        beta: Strength of the regulariser; the authors used 0.01 and 0.02.
        mask: `(B, N)` boolean, False where a place holds no document.
        student_temperature: Divides the student scores.
        teacher_temperature: Divides the teacher scores.

    Returns:
        The loss, a scalar. It can be negative.

    Source:
        Earlier code of CKL's authors, https://arxiv.org/abs/2406.05977.

    Example:
        >>> import torch
        >>> scores, positives = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[True, False, False]])
        >>> round(regularised_kl(scores, scores, positives).item(), 4)
        0.0042
    """
    check_at_least_zero(beta=beta)
    scores = prepare(student_scores, teacher_scores, positives, mask, student_temperature, teacher_temperature)
    terms, log_q = _kl_terms(scores)
    sure = torch.where(scores.positives, log_q.exp() * log_q, 0.0).sum()
    wrong = torch.where(scores.mask & ~scores.positives, log_q.exp(), 0.0).sum()
    return reduce(terms, scores.mask, "mean") + beta * sure + beta / math.log(2) * wrong


def pearson(
    student_scores: Tensor, teacher_scores: Tensor, *, mask: Tensor | None = None, reduction: Reduction = "batchmean"
) -> Tensor:
    """One minus the Pearson correlation of student and teacher scores in each list.

    Neither the scale nor the offset of either side matters, so there is no temperature to choose.

    Args:
        student_scores: `(B, N)` student scores.
        teacher_scores: `(B, N)` teacher scores.
        mask: `(B, N)` boolean, False where a place holds no document.
        reduction: `"batchmean"` and `"mean"` average the rows, `"none"` gives them.

    Returns:
        The loss: a scalar between 0 and 2, or `(B,)` for `reduction="none"`. A list whose teacher scores are all equal,
        or which has fewer than two documents, has no correlation and counts 0; one whose student scores are all equal
        counts 1 and passes no gradient.

    Source:
        The row term of DIST, Huang et al., NeurIPS 2022, https://arxiv.org/abs/2205.10536; its column term has no
        meaning for candidate lists.

    Example:
        >>> import torch
        >>> round(pearson(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[10.0, 20.0, 30.0]])).item(), 4)
        0.0
    """
    scores = prepare(student_scores, teacher_scores, None, mask)
    counts = scores.mask.sum(dim=1, keepdim=True).clamp_min(1)
    student, teacher = (
        torch.where(scores.mask, side - side.sum(dim=1, keepdim=True) / counts, 0.0) for side in scores[:2]
    )
    tiny = torch.finfo(student.dtype).eps ** 2
    student_power, teacher_power = (student**2).sum(dim=1), (teacher**2).sum(dim=1)
    varied = (student_power > tiny) & (teacher_power > tiny)
    # The square root has no slope at 0, so where nothing varies it is taken of 1 instead.
    scale = torch.where(varied, student_power * teacher_power, 1.0).sqrt()
    correlation = torch.where(varied, (student * teacher).sum(dim=1) / scale, 0.0)
    rows = torch.where(teacher_power > tiny, 1 - correlation, 0.0).unsqueeze(1)
    return reduce(rows, torch.ones_like(rows, dtype=torch.bool), reduction, per_row=True)


def pointwise_mse(
    student_scores: Tensor,
    teacher_scores: Tensor,
    *,
    mask: Tensor | None = None,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    reduction: Reduction = "batchmean",
) -> Tensor:
    """Mean squared error between the student's and the teacher's scores, each document by itself.

    The student takes over the teacher's scale and offset, which a ranking does not need, and a reranker that is used
    with a threshold does.

    Args:
        student_scores: `(B, N)` student scores, raw logits.
        teacher_scores: `(B, N)` teacher scores, raw logits.
        mask: `(B, N)` boolean, False where a place holds no document.
        student_temperature: Divides the student scores.
        teacher_temperature: Divides the teacher scores; 5 for a teacher whose logits span five times as much.
        reduction: `"batchmean"` averages the documents of each row, then the rows; `"mean"` all documents of the batch.
            `"none"` gives the `(B,)` row values.

    Returns:
        The loss: a scalar ≥ 0, or `(B,)` for `reduction="none"`.

    Source:
        The recipe of the Ettin rerankers: sentence-transformers' `MSELoss` of cross-encoders, here over lists.

    Example:
        >>> import torch
        >>> pointwise_mse(torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 0.0]])).item()
        2.0
    """
    scores = prepare(student_scores, teacher_scores, None, mask, student_temperature, teacher_temperature)
    terms = torch.where(scores.mask, (scores.student - scores.teacher) ** 2, 0.0)
    return reduce(terms, scores.mask, reduction, per_row=True)


def list_contrastive(
    student_scores: Tensor,
    positives: Tensor,
    *,
    mask: Tensor | None = None,
    student_temperature: float = 1.0,
    reduction: Reduction = "batchmean",
) -> Tensor:
    """Softmax cross entropy of each positive against the negatives of its list (InfoNCE), without a teacher.

    A positive is never another one's negative: each is compared with the negatives alone.

    Args:
        student_scores: `(B, N)` student scores.
        positives: `(B, N)` boolean, True for relevant documents.
        mask: `(B, N)` boolean, False where a place holds no document.
        student_temperature: Divides the student scores.
        reduction: `"batchmean"` averages the positives of each row, then the rows; a row without a positive counts 0.
            `"mean"` averages over all positives of the batch. `"none"` gives the `(B,)` row values.

    Returns:
        The loss: a scalar ≥ 0, or `(B,)` for `reduction="none"`. A row without a negative counts 0.

    Source:
        van den Oord et al., https://arxiv.org/abs/1807.03748; several positives are averaged outside the logarithm.

    Example:
        >>> import torch
        >>> round(list_contrastive(torch.zeros(1, 4), torch.tensor([[True, False, False, False]])).item(), 4)  # ln 4
        1.3863
    """
    student, _, positives, mask = prepare(student_scores, None, positives, mask, student_temperature)
    negatives = mask & ~positives
    # A row without negatives takes a finite place holder: the gradient of a logsumexp over nothing is NaN.
    some = negatives.any(dim=1, keepdim=True)
    rest = torch.where(negatives | ~some, student, -math.inf).logsumexp(dim=1, keepdim=True)
    terms = torch.where(positives & some, torch.nn.functional.softplus(rest - student), 0.0)
    return reduce(terms, positives, reduction, per_row=True)


def student_ranks(scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """Rank the candidates of each row by score, 1 = best; equal scores share the better rank.

    Args:
        scores: `(B, N)` scores; only their order matters, and no gradient passes.
        mask: `(B, N)` boolean, False where a place holds no document; those get rank 1 and disturb nobody.

    Returns:
        `(B, N)` long ranks.

    Example:
        >>> import torch
        >>> student_ranks(torch.tensor([[0.1, 0.7, 0.7, 0.3]])).tolist()
        [[4, 1, 1, 3]]
    """
    mask = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    falling = -scores.detach().masked_fill(~mask, -math.inf)
    ranks = torch.searchsorted(falling.sort(dim=1).values.contiguous(), falling.contiguous(), right=False) + 1
    return torch.where(mask, ranks, 1)


def _kl_terms(scores: Scores) -> tuple[Tensor, Tensor]:
    """Return p (ln p − ln q) of every place, 0 at masked ones, and ln q."""
    log_p, log_q = masked_log_softmax(scores.teacher, scores.mask), masked_log_softmax(scores.student, scores.mask)
    return torch.where(scores.mask, log_p.exp() * (log_p - log_q), 0.0), log_q


def _weights(
    log_q: Tensor,
    scores: Scores,
    gamma: float,
    alpha: float,
    beta: float | None,
    ranks: Tensor | None,
    several_positives: str,
) -> Tensor | None:
    """Compute (1 − q)^γ for positives and q^(γ − β) for negatives; None where all are 1."""
    check_at_least_zero(gamma=gamma, alpha=alpha, beta=beta or 0.0)
    if several_positives not in ("best", "first"):
        raise ValueError(f"several_positives must be 'best' or 'first', got {several_positives!r}.")
    if gamma == 0 and alpha == 0 and not beta:
        return None
    positives, first = scores.positives, several_positives == "first"
    bias = _rank_bias(scores, alpha, ranks, first) if beta is None else beta * (~positives)
    exponent = gamma - bias
    if not first:
        exponent = torch.where(positives, gamma, exponent)
    check(exponent < 0, _say_clamped)
    exponent = exponent.clamp_min(0)
    # −expm1 keeps 1 − q exact for q near 0; the clamp keeps the slope of x^γ finite at q = 1, where γ < 1 has none.
    rest = (-torch.expm1(log_q)).clamp_min(torch.finfo(log_q.dtype).tiny)
    return torch.where(positives, rest**exponent, (exponent * log_q).exp())


def _rank_bias(scores: Scores, alpha: float, ranks: Tensor | None, first: bool) -> Tensor:
    """Compute β_i = α (1/r_i − 1/r_pos), 0 in rows without a positive."""
    student, _, positives, mask = scores
    if alpha == 0:
        return torch.zeros_like(student)
    ranks = student_ranks(student, mask) if ranks is None else _check_ranks(ranks, student, mask)
    inverse = 1.0 / ranks.to(student.dtype)
    # The best-ranked positive has the largest inverse rank; argmax finds the first True of a row.
    best = inverse.masked_fill(~positives, 0.0).amax(dim=1, keepdim=True)
    anchor = inverse.gather(1, positives.int().argmax(dim=1, keepdim=True)) if first else best
    return torch.where(positives.any(dim=1, keepdim=True), alpha * (inverse - anchor), 0.0)


def _check_ranks(ranks: Tensor, student: Tensor, mask: Tensor) -> Tensor:
    """Return the ranks in the student's dtype, 1 at masked places, or raise if one is below 1."""
    ranks = torch.where(mask, check_shape("ranks", ranks, student).to(student.dtype), 1.0)
    bad = ~(ranks >= 1)

    def found(count: int) -> None:
        row, column = bad.nonzero()[0].tolist()
        raise ValueError(f"ranks[{row}, {column}] is {ranks[row, column].item()}; ranks count from 1, the best.")

    check(bad, found)
    return torch.where(bad, 1.0, ranks)


def _say_clamped(count: int) -> None:
    warnings.warn(
        f"weighted_kl: {count} exponents γ − β fell below 0 and were set to 0, since a weight q^(γ − β) would grow "
        "without bound there. Choose gamma ≥ alpha (or beta) to avoid it.",
        stacklevel=6,
    )
