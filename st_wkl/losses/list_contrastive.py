"""InfoNCE over candidate lists: what hard labels alone teach, for the sentence-transformers trainers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from st_wkl import functional
from st_wkl.losses.base import NOTHING_TO_COMPARE, CandidateListLoss
from st_wkl.losses.in_batch import INFO_NCE_CITATION
from st_wkl.losses.lists import CandidateLists

if TYPE_CHECKING:
    from st_wkl.losses.scoring import PairwiseSimilarity, Student


class ListContrastiveLoss(CandidateListLoss):
    """Softmax cross entropy of each positive against the negatives of its own list; no teacher needed.

    The baseline that a distillation has to beat on the same candidates. `InBatchContrastiveLoss` takes the other
    documents of the batch as negatives, too.

    Takes the columns query, positive, negative_1, …, with or without labels, or the lists of `ListwiseCollator`, whose
    teacher scores it ignores.

    Args:
        model: The student, of any of the four model classes.
        similarity_fct: Pairwise similarity of the student's embeddings. Default: the one that the model ranks with.
        student_temperature: Divides the student's scores. Default: 0.05 for cosine similarity, else 1.
        positive_threshold: In lists with judged gains, the smallest gain that makes a document a positive.
        without_positive: A list without a positive counts 0 in the mean (`"all-negative"`), or not at all (`"skip"`).
        mini_batch_size: Rows that are embedded at once; default: the whole batch.

    Raises:
        ValueError: If a parameter is out of range, or at training time if there are fewer than two candidates.

    Source:
        van den Oord et al., https://arxiv.org/abs/1807.03748; several positives are averaged outside the logarithm.

    Example:
        >>> from sentence_transformers import SentenceTransformer
        >>> student = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")  # doctest: +SKIP
        >>> loss = ListContrastiveLoss(student)  # doctest: +SKIP
    """

    shown = ("similarity_fct", "student_temperature")

    def __init__(
        self,
        model: Student,
        *,
        similarity_fct: PairwiseSimilarity | None = None,
        student_temperature: float | None = None,
        positive_threshold: float = 1.0,
        without_positive: Literal["all-negative", "skip"] = "all-negative",
        mini_batch_size: int | None = None,
    ) -> None:
        super().__init__(
            model,
            similarity_fct=similarity_fct,
            student_temperature=student_temperature,
            positive_threshold=positive_threshold,
            without_positive=without_positive,
            mini_batch_size=mini_batch_size,
        )

    @property
    def if_nothing_is_positive(self) -> str:
        """What becomes of a list without a positive."""
        return NOTHING_TO_COMPARE

    def loss_from_scores(
        self, student_scores: Tensor, teacher_scores: Tensor, positives: Tensor, mask: Tensor
    ) -> Tensor:
        """Compute the loss from `(B, N)` scores; `positives` and `mask` are boolean `(B, N)`."""
        return functional.list_contrastive(
            student_scores, positives, mask=mask, student_temperature=self.student_temperature
        )

    def _lists(self, embeddings: list[Tensor], labels: Tensor | None) -> CandidateLists:
        # Columns say by their order what a label would; only a cross-encoder's scores do not say how many there are.
        if labels is None and self.output != "score":
            labels = torch.zeros(len(embeddings[0]), len(embeddings) - 1, device=embeddings[0].device)
        return super()._lists(embeddings, labels)

    @property
    def citation(self) -> str:
        """BibTeX of the paper, for the model card."""
        return INFO_NCE_CITATION
