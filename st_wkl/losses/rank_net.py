"""RankNet with a teacher's order as a loss for the sentence-transformers trainers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from st_wkl import functional
from st_wkl.losses.base import CandidateListLoss

if TYPE_CHECKING:
    from st_wkl.losses.scoring import PairwiseSimilarity, Student


class RankNetDistillLoss(CandidateListLoss):
    """Logistic loss on every two candidates, for the order that the teacher gives them.

    Only the order of the teacher's scores counts, so there is no teacher temperature, and any ranking will do as a
    teacher. Takes columns or, with `ListwiseCollator`, lists; knows no positives.

    Args:
        model: The student, of any of the four model classes.
        similarity_fct: Pairwise similarity of the student's embeddings. Default: the one that the model ranks with.
        student_temperature: Divides the student's scores. Default: 0.05 for cosine similarity, else 1.
        mini_batch_size: Rows that are embedded at once; default: the whole batch.

    Raises:
        ValueError: If the temperature is not positive, or at training time if labels are missing, of another shape
            than the candidates, or not finite.

    Source:
        Burges et al., ICML 2005.

    Example:
        >>> from sentence_transformers import SentenceTransformer
        >>> student = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")  # doctest: +SKIP
        >>> loss = RankNetDistillLoss(student)  # doctest: +SKIP
    """

    shown = ("similarity_fct", "student_temperature")

    def __init__(
        self,
        model: Student,
        *,
        similarity_fct: PairwiseSimilarity | None = None,
        student_temperature: float | None = None,
        mini_batch_size: int | None = None,
    ) -> None:
        super().__init__(
            model,
            similarity_fct=similarity_fct,
            student_temperature=student_temperature,
            mini_batch_size=mini_batch_size,
        )

    def loss_from_scores(
        self, student_scores: Tensor, teacher_scores: Tensor, positives: Tensor, mask: Tensor
    ) -> Tensor:
        """Compute the loss from `(B, N)` scores; `mask` is boolean `(B, N)`, and positives make no difference."""
        return functional.rank_net(
            student_scores, teacher_scores, mask=mask, student_temperature=self.student_temperature
        )

    @property
    def citation(self) -> str:
        """BibTeX of the paper, for the model card."""
        return """
@inproceedings{burges2005ranknet,
    title = {Learning to Rank using Gradient Descent},
    author = {Burges, Chris and Shaked, Tal and Renshaw, Erin and Lazier, Ari and Deeds, Matt and Hamilton, Nicole and Hullender, Greg},
    booktitle = {Proceedings of the 22nd International Conference on Machine Learning},
    year = {2005},
}
"""  # noqa: E501
