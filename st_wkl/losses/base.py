"""What all losses over a teacher's candidate lists share: the checks, the options, and the way to scores."""

from __future__ import annotations

import inspect
import logging
import math
import warnings
from collections.abc import Callable
from dataclasses import KW_ONLY
from functools import cache
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from st_wkl.functional._checks import check
from st_wkl.losses.cached import StudentLoss
from st_wkl.losses.lists import CandidateLists, from_columns, holds_lists, unpack
from st_wkl.losses.options import spelled_out
from st_wkl.losses.scoring import (
    BOUNDED_TEMPERATURE,
    LARGEST_SENSIBLE_BOUNDED_TEMPERATURE,
    Similarity,
    is_bounded,
    model_similarity,
    score_lists,
)

logger = logging.getLogger(__name__)

# What becomes of a list without a positive where a loss compares positives with negatives only.
NOTHING_TO_COMPARE = "counted as 0, since there is nothing to compare in them"
# And where it weighs documents by whether they are positives.
BY_THE_TEACHER = "trained on by the teacher's scores alone"
NOTHING_TO_WEIGH = "weighed as negatives alone, so that what the student ranks low hardly counts: KL suits them"


@spelled_out
class CandidateListLoss(StudentLoss):
    """Base of the losses that compare a student's scores of candidate lists with a teacher's.

    They take the columns of `DistillKLDivLoss`: query, positive, negative_1, …, and a label column with the teacher's
    raw scores of those candidates; or, with `ListwiseCollator`, lists of any length.

    A subclass names the `function` of scores that it computes, which is given what it asks for by name: teacher scores,
    positives, mask, and the options of the loss. `shown` names the options that a card always tells, among them the
    temperatures that make a difference to it.

    Args:
        model: The student: a `SentenceTransformer`, `SparseEncoder` (inside `SpladeLoss`, too), `MultiVectorEncoder` or
            `CrossEncoder`.
        similarity_fct: Pairwise similarity of the student's embeddings. Default: the one that the model ranks with.
        student_temperature: Divides the student's scores. Default: 0.05 for similarities within [-1, 1], such as the
            cosine, whose narrow range no softmax can make sharp otherwise, and 1 for any other.
        teacher_temperature: Divides the teacher's scores; 1 suits the logits of a cross-encoder.
        positive_threshold: In lists with judged gains, the smallest gain that makes a document a positive.
        without_positive: What to do with a list that has no positive: `"all-negative"` trains on it as it is,
            `"skip"` leaves it out. They are counted in `rows_without_positive` either way.

    Raises:
        ValueError: If a parameter is out of range, or at training time if labels are missing, of another shape than
            the candidates, or not finite.
    """

    _: KW_ONLY
    similarity_fct: Similarity | None = None
    student_temperature: float = None  # type: ignore[assignment]  # a number once the similarity is known
    teacher_temperature: float = 1.0
    positive_threshold: float = 1.0
    without_positive: Literal["all-negative", "skip"] = "all-negative"

    shown: ClassVar[tuple[str, ...]] = ("similarity_fct", "student_temperature", "teacher_temperature")
    function: ClassVar[Callable[..., Tensor]]
    # Whether the loss takes a softmax of the teacher's scores, which a small temperature makes 0 for most of them.
    teacher_softmax: ClassVar[bool] = False
    # What becomes of a list without a positive that is not skipped, in words.
    if_nothing_is_positive: ClassVar[str] = "trained on as all-negative"

    def __post_init__(self) -> None:
        super().__post_init__()
        # Resolved now, because the trainer replaces `self.model` by a wrapper that has no similarity of its own.
        if self.similarity_fct is None:
            self.similarity_fct = model_similarity(self.model)
        bounded = is_bounded(self.similarity_fct)
        if self.student_temperature is None:
            self.student_temperature = BOUNDED_TEMPERATURE if bounded else 1.0
        if bounded and self.student_temperature > LARGEST_SENSIBLE_BOUNDED_TEMPERATURE:
            warnings.warn(
                f"{type(self).__name__}: student_temperature={self.student_temperature} with cosine similarity leaves "
                "the student's softmax nearly flat, since its scores lie within [-1, 1]; it cannot express what the "
                f"teacher says. Use student_temperature={BOUNDED_TEMPERATURE} (0.02 to 0.05 works in practice), or "
                "similarity_fct=sentence_transformers.util.pairwise_dot_score if the embeddings are not normalised.",
                stacklevel=4,
            )
        self.rows_without_positive = 0
        self._said: set[str] = set()
        # Whoever watches training is shown the scores of each batch, see `st_wkl.training.guard`.
        self.observer: Callable[[Tensor, CandidateLists], None] | None = None

    def loss_from_scores(
        self, student_scores: Tensor, teacher_scores: Tensor, positives: Tensor, mask: Tensor
    ) -> Tensor:
        """Compute the loss from `(B, N)` scores; `positives` and `mask` are boolean `(B, N)`."""
        return self._of(student_scores, teacher_scores=teacher_scores, positives=positives, mask=mask)

    def _of(self, student_scores: Tensor, **tensors: Tensor | None) -> Tensor:
        """Call the function with what it asks for."""
        function = type(self).function
        given = {name: getattr(self, name) for name in _asked(function) if hasattr(self, name)} | tensors
        return function(student_scores, **{name: given[name] for name in _asked(function) if name in given})

    def loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None) -> Tensor:
        """Compute the loss from the embeddings of a batch.

        Args:
            embeddings: One tensor per column, the query first: query, positive, negative_1, …, or query and all
                documents of the lists. For a cross-encoder, the scores of all pairs alone.
            labels: `(B, N)` teacher scores of the N candidate columns, or what `ListwiseCollator` made. In columns,
                −inf leaves a candidate out of its list, for teacher and student: no probability and no gradient.

        Returns:
            The loss, a scalar.

        Raises:
            ValueError: If there are fewer than two candidates, if labels are missing, of another shape, NaN or
                infinite (but for −inf in columns), or if the student's own scores have become NaN.
        """
        lists = self._lists(embeddings, labels)
        if self.teacher_softmax and "scale" not in self._said:
            self._check_scale(lists)
        student_scores = self._scores(embeddings, lists)
        positives = (lists.gains >= self.positive_threshold) & lists.mask
        kept = positives.any(dim=1)
        check(~kept, lambda missing: self._count_missing(missing, len(kept)))
        if self.without_positive == "skip":
            student_scores, positives, lists = student_scores[kept], positives[kept], lists.select(kept)
        return self._loss_from_lists(student_scores, lists, positives)

    def _loss_from_lists(self, student_scores: Tensor, lists: CandidateLists, positives: Tensor) -> Tensor:
        """Compute the loss; a subclass that needs more of the lists than scores takes it here."""
        return self.loss_from_scores(student_scores, lists.scores.detach(), positives, lists.mask)

    def _scores(self, embeddings: list[Tensor], lists: CandidateLists) -> Tensor:
        """Score the lists, and show the scores to whoever watches."""
        scores = score_lists(embeddings, lists, self.similarity_fct)
        self._check_student(scores)
        if self.observer is not None and scores.requires_grad:
            self.observer(scores.detach(), lists)
        return scores

    def _check_student(self, scores: Tensor) -> None:
        """Stop at a student that has diverged."""

        def found(count: int) -> None:
            row = int((~scores.isfinite()).any(dim=1).nonzero()[0])
            what = "NaN" if bool(scores.isnan().any()) else "infinite"
            raise ValueError(
                f"{type(self).__name__}: the student's scores in row {row} of this batch are {what}, so its weights "
                "have diverged. Start again from the last good checkpoint with a smaller learning rate, or train in "
                "bf16 or fp32 if this was fp16."
            )

        check(~scores.isfinite(), found)

    def _count_missing(self, missing: int, rows: int) -> None:
        """Count rows without a positive, and say so once."""
        if not self.rows_without_positive:
            logger.warning(
                "%s: %d of %d lists of this batch have no positive (gain of at least %g). They are %s; "
                "without_positive chooses. rows_without_positive goes on counting.",
                type(self).__name__,
                missing,
                rows,
                self.positive_threshold,
                "left out" if self.without_positive == "skip" else self.if_nothing_is_positive,
            )
        self.rows_without_positive += missing

    def _lists(self, embeddings: list[Tensor], labels: Tensor | None) -> CandidateLists:
        name = type(self).__name__
        if labels is None:
            raise ValueError(
                f"{name} needs the teacher's scores: add a column 'label' that holds, for each row, a list with one "
                "float per candidate column, in their order. DistillationDatasetBuilder makes it."
            )
        if holds_lists(labels):
            return unpack(labels, len(embeddings[0]) if self.output == "score" else sum(map(len, embeddings[1:])))
        rows, candidates = len(embeddings[0]), len(embeddings) - 1
        if self.output == "score":
            rows, candidates = len(labels), len(embeddings[0]) // max(len(labels), 1)
        if candidates < 2:
            raise ValueError(
                f"{name} expects the columns query, positive, negative_1, … but got {candidates + 1} of them. With one "
                "candidate there is nothing to rank, and the loss would be constant. Add a column of negatives, or "
                "pass data_collator=ListwiseCollator(model) to the trainer if a column holds lists of documents."
            )
        if labels.shape != (rows, candidates):
            fewer = ((rows, candidates - 1), (rows,) if candidates == 2 else ())
            margins = (
                " With one number less than candidates they look like margins, as upstream's MarginMSELoss takes them: "
                "scores with the margins m are [0.0, *(-m for m in margins)]."
            )
            raise ValueError(
                f"{name} expects teacher scores of shape (batch, candidates) = ({rows}, {candidates}), but the labels "
                f"have shape {tuple(labels.shape)}. Every column besides the labels counts as text, an id column too: "
                "remove what is neither query nor candidate (dataset.remove_columns), and give each row one score per "
                "candidate, the positive's first. Inside MatryoshkaLoss, labels as wide as the embedding dimension are "
                "cut as if they were embeddings: use another number of candidates, or ListwiseCollator."
                f"{margins if tuple(labels.shape) in fewer else ''}"
            )
        lists = from_columns(labels)
        if "short" not in self._said:
            check(lists.mask.sum(dim=1) < 2, lambda short: self._say_short(short, rows))
        return lists

    def _say_short(self, short: int, rows: int) -> None:
        self._said.add("short")
        logger.warning(
            "%s: %d of %d lists of this batch keep fewer than two candidates whose label is not -inf, so there is "
            "nothing to rank in them: they add no gradient. Said once.",
            type(self).__name__,
            short,
            rows,
        )

    def _check_scale(self, lists: CandidateLists) -> None:
        """Say once that the teacher's softmax leaves candidates nothing."""
        scores = lists.scores.detach()
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).masked_fill(~lists.mask, -math.inf)
        lost = lists.mask & ((scores / self.teacher_temperature).softmax(dim=1) == 0)

        def found(count: int) -> None:
            self._said.add("scale")
            spread = float((scores.amax(dim=1, keepdim=True) - scores)[lists.mask].max())
            logger.warning(
                "%s: teacher_temperature=%g leaves %d of %d candidates of this batch a teacher's probability of "
                "exactly 0, so the teacher says nothing about them. The scores of a list are up to %.4g apart: take a "
                "teacher_temperature above %.3g. Said once.",
                type(self).__name__,
                self.teacher_temperature,
                count,
                int(lists.mask.sum()),
                spread,
                spread / 100,
            )

        check(lost, found)


@cache
def _asked(function: Callable[..., Any]) -> tuple[str, ...]:
    """Return what a function takes besides the student's scores."""
    return tuple(inspect.signature(function).parameters)[1:]
