"""MarginKL as a loss for the sentence-transformers trainers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Unpack

from torch import Tensor

from st_wkl import functional
from st_wkl.losses.base import NOTHING_TO_COMPARE, CandidateListLoss, ListLossOptions
from st_wkl.losses.options import check_choices

if TYPE_CHECKING:
    from st_wkl.losses.scoring import Student


class MarginKL(CandidateListLoss):
    """KL divergence between a teacher and the student on which document of each pair wins, and how surely.

    It asks for the teacher's margins, not its scores, and saturates where the teacher is sure: a margin of 20 asks for
    no more than one of 10. That is the difference from `MarginMSELoss`.

    Takes the columns of `DistillKLDivLoss`: query, positive, negative_1, …, and a label column with the teacher's raw
    scores of those candidates; or, with `ListwiseCollator`, lists of any length. The student may be a
    `SentenceTransformer`, `SparseEncoder` (inside `SpladeLoss`, too), `MultiVectorEncoder` or `CrossEncoder`.

    Args:
        model: The student.
        pairs: `"positive-negative"` compares the positive with every negative; `"all"` every two candidates.
        **options: `similarity_fct`, `student_temperature`, `teacher_temperature`, `positive_threshold`,
            `without_positive` and `mini_batch_size`, as `CandidateListLoss` describes them.

    Raises:
        ValueError: If a parameter is out of range, or at training time if labels are missing, of another shape than
            the candidates, or not finite.

    Source:
        Defined by this project; `st_wkl.functional.margin_kl` gives the formula and says why a softmax over margins
        would be degenerate.

    Example:
        >>> from sentence_transformers import SentenceTransformer
        >>> student = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")  # doctest: +SKIP
        >>> MarginKL(student, pairs="all").student_temperature                       # doctest: +SKIP
        0.05
    """

    shown = ("pairs", *CandidateListLoss.shown)

    def __init__(
        self,
        model: Student,
        pairs: Literal["positive-negative", "all"] = "positive-negative",
        **options: Unpack[ListLossOptions],
    ) -> None:
        super().__init__(model, **options)
        check_choices(self, pairs=(pairs, ("positive-negative", "all")))
        self.pairs = pairs

    @property
    def if_nothing_is_positive(self) -> str:
        """What becomes of a list without a positive."""
        return NOTHING_TO_COMPARE if self.pairs == "positive-negative" else super().if_nothing_is_positive

    def loss_from_scores(
        self, student_scores: Tensor, teacher_scores: Tensor, positives: Tensor, mask: Tensor
    ) -> Tensor:
        """Compute the loss from `(B, N)` scores; `positives` and `mask` are boolean `(B, N)`."""
        return functional.margin_kl(
            student_scores,
            teacher_scores,
            positives,
            pairs=self.pairs,
            mask=mask,
            student_temperature=self.student_temperature,
            teacher_temperature=self.teacher_temperature,
        )

    @property
    def citation(self) -> str:
        """BibTeX of the pairwise form, for the model card."""
        return """
@inproceedings{burges2005ranknet,
    title = {Learning to Rank using Gradient Descent},
    author = {Burges, Chris and Shaked, Tal and Renshaw, Erin and Lazier, Ari and Deeds, Matt and Hamilton, Nicole and Hullender, Greg},
    booktitle = {Proceedings of the 22nd International Conference on Machine Learning},
    year = {2005},
}
"""  # noqa: E501
