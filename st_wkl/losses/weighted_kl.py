"""Contrastively weighted KL divergence (CKL) as a loss for the sentence-transformers trainers."""

from __future__ import annotations

from dataclasses import KW_ONLY
from typing import Any, Literal

from torch import Tensor

import st_wkl.functional as functional
from st_wkl.functional._checks import check
from st_wkl.losses.base import BY_THE_TEACHER, NOTHING_TO_WEIGH, CandidateListLoss
from st_wkl.losses.cached import cited
from st_wkl.losses.lists import CandidateLists
from st_wkl.losses.listwise import KLDistillLoss
from st_wkl.losses.options import spelled_out


def _lack_ranks(count: int) -> None:
    raise ValueError(
        "WeightedKLDistillationLoss(ranks='dataset') needs lists with a column 'ranks', collated by "
        "ListwiseCollator(model): RefreshCandidatesCallback makes it. Or take ranks='student'."
    )


@spelled_out
class WeightedKLDistillationLoss(CandidateListLoss):
    """Weighted KL divergence between a teacher's and the student's ranking of each query's candidates.

    It weighs every term of the KL divergence by how badly the student still ranks that document: a relevant document
    counts less the better it is ranked, a negative counts more the higher it stands, most above the positive.
    `gamma=0, alpha=0` is plain KL. A list without a positive is weighed as negatives alone: what the teacher puts first
    counts as little as the student thinks of it. `distill` refuses a dataset of such lists only, which KL suits.

    Takes the columns of `DistillKLDivLoss`: query, positive, negative_1, …, and a label column with the teacher's raw
    scores of those candidates; or, with `ListwiseCollator`, lists of any length.

    Args:
        model: The student, of any of the four model classes.
        gamma: Strength of the contrastive weights; 5 is the authors' main setting, 0 turns them off.
        alpha: Strength of the rank bias; 1 is the authors' main setting. Keep it at most `gamma`.
        beta: One constant bias for all negatives in place of the rank bias.
        detach_weights: Treat the weights as constants, which this project's study found ahead or level on every
            collection. False lets gradients flow through them, as the authors do: a student can then lower the loss by
            lowering a weight, without ranking better.
        ranks: `"student"` ranks each list by the student's scores of the moment; `"dataset"` takes the column `ranks`
            of lists, such as `RefreshCandidatesCallback` renews every k steps, as the authors do.
        several_positives: `"best"` or `"first"`: how a list with several positives is ranked and weighted, see
            `st_wkl.functional.weighted_kl`.
        reduction: `"batchmean"` averages the rows; `"mean"` averages over candidates too, as the authors do, which
            makes the loss N times smaller.

    Raises:
        ValueError: If a parameter is out of range, or at training time if labels are missing, of another shape than
            the candidates, or not finite.

    Source:
        Yang, Qiao, He, Yang, SIGIR 2024, https://arxiv.org/abs/2406.05977. `st_wkl.functional.weighted_kl` says what
        differs from the published code.

    Example:
        >>> from datasets import Dataset
        >>> from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
        >>> student = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")     # doctest: +SKIP
        >>> dataset = Dataset.from_dict({
        ...     "query": ["what does a reranker do"],
        ...     "positive": ["A reranker scores a query and a document together."],
        ...     "negative_1": ["A retriever embeds the two apart."],
        ...     "label": [[8.1, -2.3]],
        ... })
        >>> loss = WeightedKLDistillationLoss(student)                                   # doctest: +SKIP
        >>> SentenceTransformerTrainer(student, train_dataset=dataset, loss=loss).train()  # doctest: +SKIP
    """

    gamma: float = 5.0
    alpha: float = 1.0
    _: KW_ONLY
    beta: float | None = None
    detach_weights: bool = True
    ranks: Literal["student", "dataset"] = "student"
    several_positives: Literal["best", "first"] = "best"
    reduction: Literal["batchmean", "mean"] = "batchmean"

    shown = ("gamma", "alpha", *CandidateListLoss.shown, "detach_weights", "reduction")
    function = staticmethod(functional.weighted_kl)
    teacher_softmax = True
    paper = "yang2024weighted"

    @property
    def if_nothing_is_positive(self) -> str:  # type: ignore[override]
        """What becomes of a list without a positive."""
        return NOTHING_TO_WEIGH if self.gamma else BY_THE_TEACHER

    def loss_from_scores(
        self, student_scores: Tensor, teacher_scores: Tensor, positives: Tensor, mask: Tensor
    ) -> Tensor:
        """Compute the loss from `(B, N)` scores and the student's ranks; `positives` and `mask` are boolean."""
        return self._of(student_scores, teacher_scores=teacher_scores, positives=positives, mask=mask, ranks=None)

    def _loss_from_lists(self, student_scores: Tensor, lists: CandidateLists, positives: Tensor) -> Tensor:
        if self.ranks == "student":
            return self.loss_from_scores(student_scores, lists.scores.detach(), positives, lists.mask)
        if lists.ranks is None:
            _lack_ranks(0)
        else:
            check(~(lists.ranks > 0).any(), _lack_ranks)
        tensors = {"teacher_scores": lists.scores.detach(), "mask": lists.mask, "ranks": lists.ranks}
        return self._of(student_scores, positives=positives, **tensors)

    def get_config_dict(self) -> dict[str, Any]:
        """Return the parameters for the model card; a constant bias takes the place of the rank bias."""
        config = super().get_config_dict()
        return config if self.beta is None else {name: value for name, value in config.items() if name != "alpha"}

    @property
    def citation(self) -> str:
        """BibTeX of the paper; of plain KL's, where nothing is weighed."""
        plain = not (self.gamma or self.alpha or self.beta)
        return cited(KLDistillLoss.paper if plain else self.paper)
