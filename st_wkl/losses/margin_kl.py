"""Losses over a teacher's margins: as probabilities (MarginKL) and as numbers (MarginMSE)."""

from __future__ import annotations

from typing import Literal

import st_wkl.functional as functional
from st_wkl.losses.base import NOTHING_TO_COMPARE, CandidateListLoss
from st_wkl.losses.options import spelled_out


@spelled_out
class MarginKL(CandidateListLoss):
    """KL divergence between a teacher and the student on which document of each pair wins, and how surely.

    It asks for the teacher's margins, not its scores, and saturates where the teacher is sure: a margin of 20 asks for
    no more than one of 10. That is the difference from `MarginMSELoss`.

    Args:
        model: The student, of any of the four model classes.
        pairs: `"positive-negative"` compares the positive with every negative; `"all"` every two candidates.

    Source:
        Defined by this project; `st_wkl.functional.margin_kl` gives the formula and says why a softmax over margins
        would be degenerate.

    Example:
        >>> from sentence_transformers import SentenceTransformer
        >>> student = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")  # doctest: +SKIP
        >>> MarginKL(student, pairs="all").student_temperature                       # doctest: +SKIP
        0.05
    """

    pairs: Literal["positive-negative", "all"] = "positive-negative"

    shown = ("pairs", *CandidateListLoss.shown)
    function = staticmethod(functional.margin_kl)
    paper = "burges2005ranknet"

    @property
    def if_nothing_is_positive(self) -> str:  # type: ignore[override]
        """What becomes of a list without a positive that is not skipped, in words."""
        return NOTHING_TO_COMPARE if self.pairs == "positive-negative" else CandidateListLoss.if_nothing_is_positive


@spelled_out
class MarginMSEDistillLoss(CandidateListLoss):
    """Mean squared error between the student's and the teacher's margins of positives over negatives.

    Unlike upstream's `MarginMSELoss` it takes the teacher's scores, not their margins, and the model's own similarity,
    scales both margins, and takes lists of any length with several positives. A teacher whose scores lie within 0 and 1
    has margins below 1: give it `teacher_temperature=0.05`, which makes them comparable to logits again. A row without
    a positive or without a negative has no margin and counts 0.

    Args:
        model: The student, of any of the four model classes.

    Source:
        Hofstätter et al., https://arxiv.org/abs/2010.02666; the two temperatures are this project's.

    Example:
        >>> from sentence_transformers import SentenceTransformer
        >>> student = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")  # doctest: +SKIP
        >>> loss = MarginMSEDistillLoss(student)  # doctest: +SKIP
    """

    function = staticmethod(functional.margin_mse)
    if_nothing_is_positive = NOTHING_TO_COMPARE
    paper = "hofstätter2021improving"
