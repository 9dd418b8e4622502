"""MarginMSE as a loss for the sentence-transformers trainers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

from torch import Tensor

from st_wkl import functional
from st_wkl.losses.base import NOTHING_TO_COMPARE, CandidateListLoss, ListLossOptions

if TYPE_CHECKING:
    from st_wkl.losses.scoring import Student


class MarginMSEDistillLoss(CandidateListLoss):
    """Mean squared error between the student's and the teacher's margins of positives over negatives.

    Unlike upstream's `MarginMSELoss` it takes the model's own similarity, scales both margins, and takes lists of any
    length with several positives. A teacher whose scores lie within 0 and 1 has margins below 1: give it
    `teacher_temperature=0.05`, which makes them comparable to logits again.

    Takes the columns of `DistillKLDivLoss`: query, positive, negative_1, …, and a label column with the teacher's
    scores of those candidates (not their margins, as upstream wants); or, with `ListwiseCollator`, lists.

    Args:
        model: The student, of any of the four model classes.
        **options: `similarity_fct`, `student_temperature`, `teacher_temperature`, `positive_threshold`,
            `without_positive` and `mini_batch_size`, as `CandidateListLoss` describes them. A row without a positive or
            without a negative has no margin and counts 0.

    Raises:
        ValueError: If a parameter is out of range, or at training time if labels are missing, of another shape than
            the candidates, or not finite.

    Source:
        Hofstätter et al., https://arxiv.org/abs/2010.02666; the two temperatures are this project's.

    Example:
        >>> from sentence_transformers import SentenceTransformer
        >>> student = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")  # doctest: +SKIP
        >>> loss = MarginMSEDistillLoss(student)  # doctest: +SKIP
    """

    def __init__(self, model: Student, **options: Unpack[ListLossOptions]) -> None:
        super().__init__(model, **options)

    @property
    def if_nothing_is_positive(self) -> str:
        """What becomes of a list without a positive."""
        return NOTHING_TO_COMPARE

    def loss_from_scores(
        self, student_scores: Tensor, teacher_scores: Tensor, positives: Tensor, mask: Tensor
    ) -> Tensor:
        """Compute the loss from `(B, N)` scores; `positives` and `mask` are boolean `(B, N)`."""
        return functional.margin_mse(
            student_scores,
            teacher_scores,
            positives,
            mask=mask,
            student_temperature=self.student_temperature,
            teacher_temperature=self.teacher_temperature,
        )

    @property
    def citation(self) -> str:
        """BibTeX of the paper, for the model card."""
        return """
@misc{hofstätter2021improving,
    title = {Improving Efficient Neural Ranking Models with Cross-Architecture Knowledge Distillation},
    author = {Sebastian Hofstätter and Sophia Althammer and Michael Schröder and Mete Sertkan and Allan Hanbury},
    year = {2021},
    eprint = {2010.02666},
    archivePrefix = {arXiv},
    primaryClass = {cs.IR},
    url = {https://arxiv.org/abs/2010.02666},
}
"""
