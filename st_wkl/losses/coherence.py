"""Coherence: a query and its paraphrases shall find the same documents."""

from __future__ import annotations

import logging
from dataclasses import KW_ONLY
from typing import ClassVar

import torch
from torch import Tensor

import st_wkl.functional as functional
from st_wkl.functional._checks import check
from st_wkl.losses.cached import StudentLoss, Terms
from st_wkl.losses.options import former, spelled_out
from st_wkl.losses.scoring import BOUNDED_TEMPERATURE

logger = logging.getLogger(__name__)


@spelled_out
class CoherenceLoss(StudentLoss):
    """In-batch contrast, plus two terms that draw a query and its paraphrase together.

    Takes the columns query, paraphrase, positive, and any negatives, in this order, and a column `label` with 1 where
    the paraphrase is one and 0 where it is missing (any text may stand there then). Missing ones take part in the
    contrast with their query alone; they are counted in `rows_without_paraphrase`.
    `st_wkl.methods.paraphrases.add_paraphrases` makes these columns. Without labels, every row has a paraphrase.

    Args:
        model: The student, a `SentenceTransformer` or `SparseEncoder`.
        embedding_weight: λ₁ of the squared distance between the two embeddings.
        margin_weight: λ₂ of the squared difference between their margins, see `st_wkl.functional.coherence`.
        student_temperature: Divides the cosines in the contrastive term.

    Raises:
        ValueError: If the student has no single embedding per text, a parameter is out of range, or at training time if
            columns are missing or an embedding has length 0.

    Source:
        https://arxiv.org/abs/2508.07975; `st_wkl.functional.coherence` says what is this project's reading.

    Example:
        >>> from sentence_transformers import SentenceTransformer
        >>> student = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")  # doctest: +SKIP
        >>> loss = CoherenceLoss(student)  # doctest: +SKIP
    """

    embedding_weight: float = 1.0
    margin_weight: float = 1.0
    _: KW_ONLY
    student_temperature: float = BOUNDED_TEMPERATURE

    shown = ("embedding_weight", "margin_weight", "student_temperature")
    paper = "coherence2025"
    renamed: ClassVar = {"temperature": "student_temperature"}
    temperature = former("CoherenceLoss", "temperature", "student_temperature")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.output != "embedding":
            name = type(self.model).__name__
            raise ValueError(f"CoherenceLoss compares single embeddings, which a {name} does not have.")
        self.rows_without_paraphrase = 0

    def loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None) -> Terms:
        """Compute the terms from the embeddings of query, paraphrase, positive and negatives."""
        if len(embeddings) < 3:
            raise ValueError(
                f"CoherenceLoss expects the columns query, paraphrase, positive, … but got {len(embeddings)} of them. "
                "st_wkl.methods.paraphrases.add_paraphrases adds the second."
            )
        query, paraphrase, *documents = embeddings
        rows = len(query)
        present = torch.ones(rows, dtype=torch.bool, device=query.device) if labels is None else labels.view(-1) > 0
        if len(present) != rows:
            raise ValueError(f"CoherenceLoss expects one label per row, 1 or 0, but got {tuple(labels.shape)}.")  # type: ignore[union-attr]
        check(~present, lambda missing: self._count_missing(missing, rows))
        pool = torch.cat(documents)
        distance, margins = functional.coherence(query, paraphrase, pool, mask=present)
        own = torch.arange(rows, device=query.device)
        # What stands in the place of a missing paraphrase asks nothing: cross entropy leaves the answer -100 out.
        asked = torch.cat([query, torch.where(present[:, None], paraphrase, query)])
        answers = torch.cat([own, torch.where(present, own, -100)])
        scores = torch.nn.functional.normalize(asked, dim=1) @ torch.nn.functional.normalize(pool, dim=1).T
        return Terms(
            contrast=torch.nn.functional.cross_entropy(scores / self.student_temperature, answers),
            embedding_coherence=self.embedding_weight * distance,
            margin_coherence=self.margin_weight * margins,
        )

    def _count_missing(self, missing: int, rows: int) -> None:
        """Count rows without a paraphrase, and say so once."""
        if not self.rows_without_paraphrase:
            logger.warning(
                "%d of %d queries of this batch have no paraphrase and are left out of the coherence terms. "
                "rows_without_paraphrase goes on counting.",
                missing,
                rows,
            )
        self.rows_without_paraphrase += missing
