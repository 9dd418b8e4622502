"""Adaptive relevance margins as a loss for the sentence-transformers trainers."""

from __future__ import annotations

from dataclasses import KW_ONLY
from typing import Literal

import torch
from torch import Tensor

import st_wkl.functional as functional
from st_wkl.losses.base import NOTHING_TO_COMPARE
from st_wkl.losses.cached import StudentLoss
from st_wkl.losses.lists import CandidateLists, columns_without_teacher, holds_lists, unpack
from st_wkl.losses.options import spelled_out
from st_wkl.losses.scoring import concatenate


@spelled_out
class AdaptiveRelevanceMarginLoss(StudentLoss):
    """Margins between positive and negative that follow from how similar the two documents are; no teacher needed.

    Takes the columns query, positive, negative_1, …, with or without labels, each negative being compared in turn; or
    the lists of `ListwiseCollator`, where the first positive is compared with each negative.

    Args:
        model: The student, a `SentenceTransformer` or `SparseEncoder`.
        target: `"distributed"`, the authors' best; `"adaptive"`; or a number for one margin for all.
        error: `"l2"`, as in the published runs, `"l1"` or `"soft"`.
        in_batch: Compare every query with the negatives of all rows.
        positive_threshold: In lists with judged gains, the smallest gain that makes a document a positive.

    Raises:
        ValueError: If the student has no single embedding per text, or at training time if there is no negative or an
            embedding has length 0.

    Source:
        https://arxiv.org/abs/2407.21515 (ICTIR 2025); `st_wkl.functional.adaptive_relevance_margin` says what differs.

    Example:
        >>> from sentence_transformers import SentenceTransformer
        >>> student = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")  # doctest: +SKIP
        >>> loss = AdaptiveRelevanceMarginLoss(student)  # doctest: +SKIP
    """

    target: float | Literal["adaptive", "distributed"] = "distributed"
    error: Literal["l2", "l1", "soft"] = "l2"
    _: KW_ONLY
    in_batch: bool = False
    positive_threshold: float = 1.0

    shown = ("target", "error", "in_batch")
    if_nothing_is_positive = NOTHING_TO_COMPARE
    paper = "arm2024"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.output != "embedding":
            raise ValueError(
                "AdaptiveRelevanceMarginLoss compares single embeddings, which a "
                f"{type(self.model).__name__} does not have."
            )

    def loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None) -> Tensor:
        """Compute the loss from the embeddings of a batch.

        Args:
            embeddings: One tensor per column, the query first: query, positive, negative_1, …, or query and all
                documents of the lists.
            labels: What `ListwiseCollator` made. Of `(B, N)` labels of columns only −inf counts, which leaves a
                document out.

        Returns:
            The mean over negatives, a scalar; 0 if no list has both a positive and a negative.

        Raises:
            ValueError: If there are fewer than three columns, or an embedding has length 0.
        """
        if labels is not None and holds_lists(labels):
            lists = unpack(labels, sum(map(len, embeddings[1:])))
        elif len(embeddings) > 2:
            lists = columns_without_teacher(embeddings, labels)
        else:
            raise ValueError(
                "AdaptiveRelevanceMarginLoss expects the columns query, positive, negative_1, … but got "
                f"{len(embeddings)}. Add a column of negatives."
            )
        options = {"target": self.target, "error": self.error, "in_batch": self.in_batch}
        triples = self._triples(embeddings[0], concatenate(embeddings[1:]), lists)
        if not triples:
            return torch.stack([embedding.sum() for embedding in embeddings]).sum() * 0.0
        losses = [len(triple[0]) * functional.adaptive_relevance_margin(*triple, **options) for triple in triples]  # type: ignore[arg-type]
        return torch.stack(losses).sum() / sum(len(triple[0]) for triple in triples)

    def _triples(self, query: Tensor, documents: Tensor, lists: CandidateLists) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Take the k-th negatives of all lists that have one, for each k, with the first positive of each list."""
        positives = (lists.gains >= self.positive_threshold) & lists.mask
        negatives = lists.mask & ~positives & positives.any(dim=1, keepdim=True)
        first = lists.index.gather(1, positives.int().argmax(dim=1, keepdim=True)).squeeze(1)
        number = negatives.cumsum(dim=1) * negatives
        triples = []
        for k in range(1, int(number.max()) + 1 if number.numel() else 1):
            rows, places = (number == k).nonzero(as_tuple=True)
            triples.append((query[rows], documents[first[rows]], documents[lists.index[rows, places]]))
        return triples
