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
    check_at_least_zero,
    check_ranks,
    check_shape,
    masked_log_softmax,
    prepare,
    reduce,
    reduce_rows,
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
    detach_weights: bool = False,
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
        mask: `(B, N)` boolean, False where a place holds no document. Default: every place does.
        student_temperature: Divides the student scores. Scores that are cosines need about 0.02 to 0.05.
        teacher_temperature: Divides the teacher scores.
        detach_weights: Treat the weights as constants. The value stays, the gradient changes.
        several_positives: Where a row has more than one positive: `"best"` takes the best-ranked one for r_pos and the
            exponent γ for each of them, as the paper defines positives; `"first"` does what the authors' code does:
            r_pos of the first positive in the row, and the exponent γ − β_i for the others.
        reduction: `"batchmean"` sums each row and averages the rows, comparable with `DistillKLDivLoss`. `"mean"`
            averages over candidates too, as the authors' code does; it is smaller by the number of candidates, so a
            learning rate does not carry over between the two. `"none"` gives the `(B, N)` terms.

    Returns:
        The loss: a scalar, or `(B, N)` for `reduction="none"` with 0 at masked places.

    Raises:
        ValueError: If shapes differ, a parameter is out of range, or an unmasked teacher score is NaN or infinite.

    Source:
        Yang, Qiao, He, Yang: Weighted KL-Divergence for Document Ranking Model Refinement, SIGIR 2024
        (https://arxiv.org/abs/2406.05977), and its published code. Differences: fresh ranks by default, the mean per
        row by default, and the two points under `several_positives`.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.0, 2.0, 1.0]]), torch.tensor([[3.0, 1.0, 0.0]])
        >>> positives = torch.tensor([[True, False, False]])
        >>> round(weighted_kl(student, teacher, positives).item(), 4)
        1.1436
    """
    check_at_least_zero(gamma=gamma, alpha=alpha)
    student, teacher, mask = prepare(student_scores, teacher_scores, mask, student_temperature, teacher_temperature)
    positives = check_shape("positives", positives, student).bool() & mask
    log_p, log_q = masked_log_softmax(teacher, mask), masked_log_softmax(student, mask)
    terms = log_p.exp() * (log_p - log_q)
    if gamma != 0 or alpha != 0 or beta:
        log_weighted_by = log_q.detach() if detach_weights else log_q
        weights = _weights(log_weighted_by, student, positives, mask, gamma, alpha, beta, ranks, several_positives)
        terms = terms * weights
    return reduce(torch.where(mask, terms, 0.0), mask, reduction)


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
    check_at_least_zero(gamma=gamma, alpha=alpha)
    scores = student_scores.detach()
    student, _, mask = prepare(scores, torch.zeros_like(scores), mask, student_temperature)
    positives = check_shape("positives", positives, student).bool() & mask
    log_q = masked_log_softmax(student, mask)
    weights = _weights(log_q, student, positives, mask, gamma, alpha, beta, ranks, several_positives)
    return torch.where(mask, weights, 0.0)


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
        mask: `(B, N)` boolean, False where a place holds no document. Default: every place does.
        student_temperature: Divides the student scores. Scores that are cosines need about 0.02 to 0.05.
        teacher_temperature: Divides the teacher scores.
        reduction: `"batchmean"`, `"mean"` (over candidates too) or `"none"`, as for `weighted_kl`.

    Returns:
        The loss: a scalar ≥ 0, or `(B, N)` for `reduction="none"`.

    Raises:
        ValueError: If shapes differ, a temperature is not positive, or an unmasked teacher score is not finite.

    Source:
        Hinton et al., https://arxiv.org/abs/1503.02531, without the factor temperature² that
        `sentence_transformers`' `DistillKLDivLoss` multiplies in.

    Example:
        >>> import torch
        >>> scores = torch.tensor([[2.0, 1.0, 0.0]])
        >>> kl_divergence(scores, scores + 7).item()
        0.0
    """
    student, teacher, mask = prepare(student_scores, teacher_scores, mask, student_temperature, teacher_temperature)
    log_p, log_q = masked_log_softmax(teacher, mask), masked_log_softmax(student, mask)
    return reduce(torch.where(mask, log_p.exp() * (log_p - log_q), 0.0), mask, reduction)


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
        mask: `(B, N)` boolean, False where a place holds no document. Default: every place does.
        student_temperature: Divides the student scores.
        teacher_temperature: Divides the teacher scores.

    Returns:
        The loss, a scalar. It can be negative.

    Raises:
        ValueError: If shapes differ, a parameter is out of range, or an unmasked teacher score is not finite.

    Source:
        Earlier code of CKL's authors, https://arxiv.org/abs/2406.05977.

    Example:
        >>> import torch
        >>> scores, positives = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[True, False, False]])
        >>> round(regularised_kl(scores, scores, positives).item(), 4)
        0.0042
    """
    check_at_least_zero(beta=beta)
    student, teacher, mask = prepare(student_scores, teacher_scores, mask, student_temperature, teacher_temperature)
    positives = check_shape("positives", positives, student).bool() & mask
    log_p, log_q = masked_log_softmax(teacher, mask), masked_log_softmax(student, mask)
    divergence = reduce(torch.where(mask, log_p.exp() * (log_p - log_q), 0.0), mask, "mean")
    sure = torch.where(positives, log_q.exp() * log_q, 0.0).sum()
    wrong = torch.where(mask & ~positives, log_q.exp(), 0.0).sum()
    return divergence + beta * sure + beta / math.log(2) * wrong


def pearson(
    student_scores: Tensor,
    teacher_scores: Tensor,
    *,
    mask: Tensor | None = None,
    reduction: Reduction = "batchmean",
) -> Tensor:
    """One minus the Pearson correlation of student and teacher scores in each list.

    Neither the scale nor the offset of either side matters, so there is no temperature to choose.

    Args:
        student_scores: `(B, N)` student scores.
        teacher_scores: `(B, N)` teacher scores.
        mask: `(B, N)` boolean, False where a place holds no document. Default: every place does.
        reduction: `"batchmean"` and `"mean"` average the rows, `"none"` gives them.

    Returns:
        The loss: a scalar between 0 and 2, or `(B,)` for `reduction="none"`. A list whose teacher scores are all equal,
        or which has fewer than two documents, has no correlation and counts 0; one whose student scores are all equal
        counts 1 and passes no gradient.

    Raises:
        ValueError: If shapes differ, or an unmasked teacher score is not finite.

    Source:
        The row term of DIST, Huang et al., NeurIPS 2022, https://arxiv.org/abs/2205.10536; its column term has no
        meaning for candidate lists.

    Example:
        >>> import torch
        >>> round(pearson(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[10.0, 20.0, 30.0]])).item(), 4)
        0.0
    """
    student, teacher, mask = prepare(student_scores, teacher_scores, mask)
    counts = mask.sum(dim=1, keepdim=True).clamp_min(1)
    student, teacher = (
        torch.where(mask, scores - scores.sum(dim=1, keepdim=True) / counts, 0.0) for scores in (student, teacher)
    )
    tiny = torch.finfo(student.dtype).eps ** 2
    student_power, teacher_power = (student**2).sum(dim=1), (teacher**2).sum(dim=1)
    varied = (student_power > tiny) & (teacher_power > tiny)
    # The square root has no slope at 0, so where nothing varies it is taken of 1 instead.
    scale = torch.where(varied, student_power * teacher_power, 1.0).sqrt()
    correlation = torch.where(varied, (student * teacher).sum(dim=1) / scale, 0.0)
    rows = torch.where(teacher_power > tiny, 1 - correlation, 0.0)
    return reduce_rows(rows, "batchmean" if reduction == "mean" else reduction)


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
        mask: `(B, N)` boolean, False where a place holds no document. Default: every place does.
        student_temperature: Divides the student scores. Scores that are cosines need about 0.02 to 0.05.
        reduction: `"batchmean"` averages the positives of each row, then the rows; a row without a positive counts 0.
            `"mean"` averages over all positives of the batch. `"none"` gives the `(B,)` row values.

    Returns:
        The loss: a scalar ≥ 0, or `(B,)` for `reduction="none"`. A row without a negative counts 0.

    Raises:
        ValueError: If shapes differ or the temperature is not positive.

    Source:
        van den Oord et al., https://arxiv.org/abs/1807.03748; several positives are averaged outside the logarithm.

    Example:
        >>> import torch
        >>> round(list_contrastive(torch.zeros(1, 4), torch.tensor([[True, False, False, False]])).item(), 4)  # ln 4
        1.3863
    """
    nothing = student_scores.new_zeros(student_scores.shape)
    student, _, mask = prepare(student_scores, nothing, mask, student_temperature)
    positives = check_shape("positives", positives, student).bool() & mask
    negatives = mask & ~positives
    # A row without negatives takes a finite place holder: the gradient of a logsumexp over nothing is NaN.
    some = negatives.any(dim=1, keepdim=True)
    rest = torch.where(negatives | ~some, student, -math.inf).logsumexp(dim=1, keepdim=True)
    terms = torch.where(positives & some, torch.nn.functional.softplus(rest - student), 0.0)
    if reduction == "mean":
        return terms.sum() / positives.sum().clamp_min(1)
    return reduce_rows(terms.sum(dim=1) / positives.sum(dim=1).clamp_min(1), reduction)


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
    scores = scores.detach()
    mask = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    scores = scores.masked_fill(~mask, -math.inf)
    descending = (-scores).sort(dim=1).values
    ranks = torch.searchsorted(descending.contiguous(), (-scores).contiguous(), right=False) + 1
    return torch.where(mask, ranks, 1)


def _weights(
    log_q: Tensor,
    student: Tensor,
    positives: Tensor,
    mask: Tensor,
    gamma: float,
    alpha: float,
    beta: float | None,
    ranks: Tensor | None,
    several_positives: str,
) -> Tensor:
    """Compute (1 − q)^γ for positives and q^(γ − β) for negatives."""
    if several_positives not in ("best", "first"):
        raise ValueError(f"several_positives must be 'best' or 'first', got {several_positives!r}.")
    first = several_positives == "first"
    bias = _rank_bias(student, positives, mask, alpha, ranks, first) if beta is None else beta * (~positives)
    exponent = gamma - bias
    if not first:
        exponent = torch.where(positives, gamma, exponent)
    return _contrastive_weights(log_q, exponent, positives)


def _rank_bias(
    student: Tensor, positives: Tensor, mask: Tensor, alpha: float, ranks: Tensor | None, first: bool
) -> Tensor:
    """Compute β_i = α (1/r_i − 1/r_pos), 0 in rows without a positive."""
    if alpha == 0:
        return torch.zeros_like(student)
    ranks = student_ranks(student, mask) if ranks is None else check_ranks(ranks, student, mask)
    inverse = 1.0 / ranks.to(student.dtype)
    # The best-ranked positive has the largest inverse rank; argmax finds the first True of a row.
    best = inverse.masked_fill(~positives, 0.0).amax(dim=1, keepdim=True)
    anchor = inverse.gather(1, positives.int().argmax(dim=1, keepdim=True)) if first else best
    return torch.where(positives.any(dim=1, keepdim=True), alpha * (inverse - anchor), 0.0)


def _say_clamped(count: int) -> None:
    warnings.warn(
        f"weighted_kl: {count} exponents γ − β fell below 0 and were set to 0, since a weight q^(γ − β) would grow "
        "without bound there. Choose gamma ≥ alpha (or beta) to avoid it.",
        stacklevel=6,
    )


def _contrastive_weights(log_q: Tensor, exponent: Tensor, positives: Tensor) -> Tensor:
    check(exponent < 0, _say_clamped)
    exponent = exponent.clamp_min(0)
    # −expm1 keeps 1 − q exact for q near 0; the clamp keeps the slope of x^γ finite at q = 1, where γ < 1 has none.
    rest = (-torch.expm1(log_q)).clamp_min(torch.finfo(log_q.dtype).tiny)
    return torch.where(positives, rest**exponent, (exponent * log_q).exp())
