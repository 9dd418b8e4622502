"""Pearson correlation with a teacher as a loss for the sentence-transformers trainers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from st_wkl import functional
from st_wkl.losses.base import CandidateListLoss

if TYPE_CHECKING:
    from st_wkl.losses.scoring import PairwiseSimilarity, Student


class PearsonDistillLoss(CandidateListLoss):
    """One minus the correlation of the student's and the teacher's scores over each query's candidates.

    Scale and offset of either side do not matter, so there is no temperature to choose; in exchange the student learns
    nothing about how sure the teacher is. Takes columns or, with `ListwiseCollator`, lists; knows no positives.

    Args:
        model: The student, of any of the four model classes.
        similarity_fct: Pairwise similarity of the student's embeddings. Default: the one that the model ranks with.
        mini_batch_size: Rows that are embedded at once; default: the whole batch.

    Raises:
        ValueError: At training time, if labels are missing, of another shape than the candidates, or not finite.

    Source:
        The row term of DIST, Huang et al., NeurIPS 2022, https://arxiv.org/abs/2205.10536.

    Example:
        >>> from sentence_transformers import SentenceTransformer
        >>> loss = PearsonDistillLoss(SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2"))  # doctest: +SKIP
    """

    shown = ("similarity_fct",)

    def __init__(
        self,
        model: Student,
        *,
        similarity_fct: PairwiseSimilarity | None = None,
        mini_batch_size: int | None = None,
    ) -> None:
        super().__init__(model, similarity_fct=similarity_fct, mini_batch_size=mini_batch_size)

    def loss_from_scores(
        self, student_scores: Tensor, teacher_scores: Tensor, positives: Tensor, mask: Tensor
    ) -> Tensor:
        """Compute the loss from `(B, N)` scores; `mask` is boolean `(B, N)`, and positives make no difference."""
        return functional.pearson(student_scores, teacher_scores, mask=mask)

    @property
    def citation(self) -> str:
        """BibTeX of the paper, for the model card."""
        return """
@inproceedings{huang2022knowledge,
    title = {Knowledge Distillation from A Stronger Teacher},
    author = {Huang, Tao and You, Shan and Wang, Fei and Qian, Chen and Xu, Chang},
    booktitle = {Advances in Neural Information Processing Systems},
    year = {2022},
    url = {https://arxiv.org/abs/2205.10536},
}
"""
