"""KL divergence with a regulariser, the predecessor of CKL, as a loss for the sentence-transformers trainers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

from torch import Tensor

from st_wkl import functional
from st_wkl.functional._scores import check_at_least_zero
from st_wkl.losses.base import CandidateListLoss, ListLossOptions
from st_wkl.losses.weighted_kl import CKL_CITATION

if TYPE_CHECKING:
    from st_wkl.losses.scoring import Student


class RegularisedKLDistillLoss(CandidateListLoss):
    """KL divergence plus a term that asks for certainty about the labels: the baseline that CKL's authors began with.

    Takes columns, as `DistillKLDivLoss` does, or, with `ListwiseCollator`, lists of any length.

    Args:
        model: The student, of any of the four model classes.
        beta: Strength of the regulariser; the authors used 0.01 and 0.02. They sum it over the batch and average the
            divergence, so with other batch sizes, per device under distributed training, β is another.
        **options: `similarity_fct`, `student_temperature`, `teacher_temperature`, `positive_threshold`,
            `without_positive` and `mini_batch_size`, as `CandidateListLoss` describes them.

    Raises:
        ValueError: If a parameter is out of range, or at training time if labels are missing, of another shape than
            the candidates, or not finite.

    Source:
        Earlier code of CKL's authors, https://arxiv.org/abs/2406.05977; see `st_wkl.functional.regularised_kl`.

    Example:
        >>> from sentence_transformers import SentenceTransformer
        >>> student = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")  # doctest: +SKIP
        >>> loss = RegularisedKLDistillLoss(student, beta=0.01)  # doctest: +SKIP
    """

    shown = ("beta", *CandidateListLoss.shown)
    teacher_softmax = True

    def __init__(self, model: Student, beta: float = 0.02, **options: Unpack[ListLossOptions]) -> None:
        super().__init__(model, **options)
        check_at_least_zero(beta=beta)
        self.beta = beta

    def loss_from_scores(
        self, student_scores: Tensor, teacher_scores: Tensor, positives: Tensor, mask: Tensor
    ) -> Tensor:
        """Compute the loss from `(B, N)` scores; `positives` and `mask` are boolean `(B, N)`."""
        return functional.regularised_kl(
            student_scores,
            teacher_scores,
            positives,
            beta=self.beta,
            mask=mask,
            student_temperature=self.student_temperature,
            teacher_temperature=self.teacher_temperature,
        )

    @property
    def citation(self) -> str:
        """BibTeX of the paper, for the model card."""
        return CKL_CITATION
