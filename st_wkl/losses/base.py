"""What all losses over candidate lists share: the sentence-transformers contract and its checks."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from sentence_transformers.base.losses.merged_forward import embed_columns
from sentence_transformers.util import similarity_fct_name
from torch import Tensor, nn

from st_wkl.losses.scoring import (
    BOUNDED_TEMPERATURE,
    LARGEST_SENSIBLE_BOUNDED_TEMPERATURE,
    PairwiseSimilarity,
    is_bounded,
    model_similarity,
    score_lists,
)

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


class CandidateListLoss(nn.Module, ABC):
    """Base of the losses that compare a student's scores of a candidate list with a teacher's.

    A subclass only says what the loss is once the scores are there, in `loss_from_scores`.

    Args:
        model: The student.
        similarity_fct: Pairwise similarity of the student's embeddings. Default: the one that the model ranks with.
        student_temperature: Divides the student's scores. Default: 0.05 for cosine similarity, whose narrow range no
            softmax can make sharp otherwise, and 1 for any other.
        teacher_temperature: Divides the teacher's scores; 1 suits the logits of a cross-encoder.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        *,
        similarity_fct: PairwiseSimilarity | None = None,
        student_temperature: float | None = None,
        teacher_temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.model = model
        # Resolved now, because the trainer replaces `self.model` by a wrapper that has no similarity of its own.
        self.similarity_fct = model_similarity(model) if similarity_fct is None else similarity_fct
        bounded = is_bounded(self.similarity_fct)
        if student_temperature is None:
            student_temperature = BOUNDED_TEMPERATURE if bounded else 1.0
        for name, value in (("student_temperature", student_temperature), ("teacher_temperature", teacher_temperature)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be a positive finite number, got {value}.")
        if bounded and student_temperature > LARGEST_SENSIBLE_BOUNDED_TEMPERATURE:
            warnings.warn(
                f"{type(self).__name__}: student_temperature={student_temperature} with cosine similarity leaves the "
                "student's softmax nearly flat, since its scores lie within [-1, 1]; it cannot express what the "
                f"teacher says. Use student_temperature={BOUNDED_TEMPERATURE} (0.02 to 0.05 works in practice), or "
                "similarity_fct=sentence_transformers.util.pairwise_dot_score if the embeddings are not normalised.",
                stacklevel=3,
            )
        self.student_temperature = student_temperature
        self.teacher_temperature = teacher_temperature

    @abstractmethod
    def loss_from_scores(
        self, student_scores: Tensor, teacher_scores: Tensor, positives: Tensor, mask: Tensor
    ) -> Tensor:
        """Compute the loss from `(B, N)` scores; `positives` and `mask` are boolean `(B, N)`."""

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None) -> Tensor:
        """Embed the columns of a batch and compute the loss.

        Args:
            sentence_features: Tokenized columns: query, positive, negative_1, …
            labels: `(B, N)` teacher scores of the N candidate columns.

        Returns:
            The loss, a scalar.

        Raises:
            ValueError: If labels are missing, of another shape, or not finite.
        """
        return self.compute_loss_from_embeddings(embed_columns(self.model, sentence_features), labels)

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None) -> Tensor:
        """Compute the loss from the embeddings of query, positive, negative_1, …, each `(B, D)`.

        Args:
            embeddings: One tensor per column, the query first.
            labels: `(B, N)` teacher scores of the N candidate columns.

        Returns:
            The loss, a scalar.

        Raises:
            ValueError: If there are fewer than two candidates, if labels are missing, of another shape, or not
                finite, or if the student's own scores have become NaN.
        """
        query, *documents = embeddings
        labels = self._check_labels(labels, len(query), len(documents))
        student_scores = score_lists(query, torch.stack(documents, dim=1), self.similarity_fct)
        self._check_student(student_scores)
        mask = torch.ones_like(student_scores, dtype=torch.bool)
        positives = torch.zeros_like(mask)
        positives[:, 0] = True
        return self.loss_from_scores(student_scores, labels.detach(), positives, mask)

    def _check_labels(self, labels: Tensor | None, rows: int, candidates: int) -> Tensor:
        name = type(self).__name__
        if candidates < 2:
            raise ValueError(
                f"{name} expects the columns query, positive, negative_1, … but got {candidates + 1} of them. With one "
                "candidate there is nothing to rank, and the loss would be constant. Add a column of negatives."
            )
        if labels is None:
            raise ValueError(
                f"{name} needs the teacher's scores: add a column 'label' that holds, for each row, a list of "
                f"{candidates} floats, one per candidate column in their order. DistillationDatasetBuilder makes it."
            )
        if labels.shape != (rows, candidates):
            raise ValueError(
                f"{name} expects teacher scores of shape (batch, candidates) = ({rows}, {candidates}), but the labels "
                f"have shape {tuple(labels.shape)}. Every column besides the labels counts as text, an id column too: "
                "remove what is neither query nor candidate (dataset.remove_columns), and give each row one score per "
                "candidate, the positive's first."
            )
        return labels

    def _check_student(self, scores: Tensor) -> None:
        if bool(scores.isnan().any()):
            row = int(scores.isnan().any(dim=1).nonzero()[0])
            raise ValueError(
                f"{type(self).__name__}: the student's scores in row {row} of this batch are NaN, so its weights have "
                "diverged. Start again from the last good checkpoint with a smaller learning rate, or train in bf16 "
                "or fp32 if this was fp16."
            )

    def get_config_dict(self) -> dict[str, Any]:
        """Return the parameters for the model card."""
        return {
            "similarity_fct": similarity_fct_name(self.similarity_fct),
            "student_temperature": self.student_temperature,
            "teacher_temperature": self.teacher_temperature,
        }
