"""PairDistill: a pairwise teacher beside a pointwise one, as a loss for the sentence-transformers trainers."""

from __future__ import annotations

from dataclasses import field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from st_wkl.functional.pairwise import preference_kl
from st_wkl.losses.base import CandidateListLoss
from st_wkl.losses.in_batch import InBatchContrastiveLoss
from st_wkl.losses.options import spelled_out
from st_wkl.losses.weighted_kl import WeightedKLDistillationLoss
from st_wkl.losses.weighted_sum import WeightedSumLoss

if TYPE_CHECKING:
    from st_wkl.losses.scoring import Student


@spelled_out
class PairwisePreferenceLoss(CandidateListLoss):
    """KL divergence from a pairwise teacher's preferences; the pair term of `PairDistillLoss`, for sums of one's own.

    Takes lists only, whose rows carry `pairs`; see `ListwiseCollator`.

    Args:
        model: The student, of any of the four model classes.

    Raises:
        ValueError: At training time, if the batch carries no preferences.

    Example:
        >>> from sentence_transformers import SentenceTransformer
        >>> student = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")  # doctest: +SKIP
        >>> loss = PairwisePreferenceLoss(student)  # doctest: +SKIP
    """

    teacher_temperature: float = field(default=1.0, init=False)
    positive_threshold: float = field(default=1.0, init=False)
    without_positive: str = field(default="all-negative", init=False)  # type: ignore[assignment]

    shown = ("similarity_fct", "student_temperature")
    paper = "huang2024pairdistill"

    def loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None) -> Tensor:
        """Compute the loss from the embeddings of a batch of lists; 0 if none of them has a preference."""
        lists = self._lists(embeddings, labels)
        if lists.preferences is None:
            raise ValueError(
                f"{type(self).__name__} needs a pairwise teacher's preferences: rows with `pairs`, collated by "
                "ListwiseCollator(model)."
            )
        scores = self._scores(embeddings, lists)
        return preference_kl(scores, lists.preferences, lists.mask, self.student_temperature)

    def loss_from_scores(
        self, student_scores: Tensor, teacher_scores: Tensor, positives: Tensor, mask: Tensor
    ) -> Tensor:
        """Refuse: scores of single documents do not hold preferences."""
        raise NotImplementedError("PairwisePreferenceLoss computes from preferences, not from pointwise scores")


@spelled_out
class PairDistillLoss(WeightedSumLoss):
    """Listwise KL, plus a pairwise teacher's preferences, plus in-batch contrast, on one forward pass.

    Takes the lists of `ListwiseCollator` whose rows carry `pairs`: preferences of a model that reads two documents at
    once and says which is better. Pointwise scores of neighbours in a ranking are hardly apart; asking about pairs is
    what tells them apart. A cross-encoder student has no in-batch term.

    Args:
        model: The student, of any of the four model classes.
        pair_weight: Weight λ of the preferences. Default, as published: 3 for late interaction, 1 otherwise.
        in_batch_weight: Weight of the in-batch term, which leaves a query's own negatives to the other terms.
        student_temperature: Divides the student's scores in all terms. Default: 0.05 for cosine similarity, else 1.
        teacher_temperature: Divides the pointwise teacher's scores.

    Raises:
        ValueError: At training time, if the batch carries no preferences or unusable scores.

    Source:
        Huang and Chen, EMNLP 2024, https://arxiv.org/abs/2410.01383, and its published code.

    Example:
        >>> from sentence_transformers import SentenceTransformer
        >>> student = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")  # doctest: +SKIP
        >>> PairDistillLoss(student).weights  # doctest: +SKIP
        [1.0, 1.0, 1.0]
    """

    def __init__(
        self,
        model: Student,
        pair_weight: float | None = None,
        in_batch_weight: float = 1.0,
        *,
        student_temperature: float | None = None,
        teacher_temperature: float = 1.0,
        mini_batch_size: int | None = None,
    ) -> None:
        temperature: Any = student_temperature
        listwise = WeightedKLDistillationLoss(
            model, gamma=0.0, alpha=0.0, student_temperature=temperature, teacher_temperature=teacher_temperature
        )
        pairwise = PairwisePreferenceLoss(model, student_temperature=temperature)
        if pair_weight is None:
            pair_weight = 3.0 if listwise.output == "tokens" else 1.0
        terms: list[tuple[float, nn.Module]] = [(1.0, listwise), (pair_weight, pairwise)]
        if listwise.output != "score":
            temperature = listwise.student_temperature
            in_batch = InBatchContrastiveLoss(model, student_temperature=temperature, own_negatives=False)
            terms.append((in_batch_weight, in_batch))
        super().__init__(model, terms, mini_batch_size=mini_batch_size)
