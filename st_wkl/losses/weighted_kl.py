"""Contrastively weighted KL divergence (CKL) as a loss for the sentence-transformers trainers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Unpack

from torch import Tensor

from st_wkl import functional
from st_wkl.functional._checks import check
from st_wkl.functional._scores import check_at_least_zero
from st_wkl.losses.base import CandidateListLoss, ListLossOptions
from st_wkl.losses.lists import CandidateLists
from st_wkl.losses.options import check_choices

if TYPE_CHECKING:
    from st_wkl.losses.scoring import Student

CKL_CITATION = """
@inproceedings{yang2024weighted,
    title = {Weighted KL-Divergence for Document Ranking Model Refinement},
    author = {Yang, Yingrui and Qiao, Yifan and He, Shanxiu and Yang, Tao},
    booktitle = {Proceedings of the 47th International ACM SIGIR Conference on Research and Development in Information Retrieval},
    year = {2024},
    eprint = {2406.05977},
    archivePrefix = {arXiv},
    url = {https://arxiv.org/abs/2406.05977},
}
"""  # noqa: E501


def _lack_ranks(count: int) -> None:
    raise ValueError(
        "WeightedKLDistillationLoss(ranks='dataset') needs lists with a column 'ranks', collated by "
        "ListwiseCollator(model): RefreshCandidatesCallback makes it. Or take ranks='student'."
    )


class WeightedKLDistillationLoss(CandidateListLoss):
    """Weighted KL divergence between a teacher's and the student's ranking of each query's candidates.

    It weighs every term of the KL divergence by how badly the student still ranks that document: a relevant document
    counts less the better it is ranked, a negative counts more the higher it stands, most above the positive.
    `gamma=0, alpha=0` is plain KL.

    Takes the columns of `DistillKLDivLoss`: query, positive, negative_1, …, and a label column with the teacher's raw
    scores of those candidates; or, with `ListwiseCollator`, lists of any length. The student may be a
    `SentenceTransformer`, `SparseEncoder` (inside `SpladeLoss`, too), `MultiVectorEncoder` or `CrossEncoder`.

    Args:
        model: The student.
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
        **options: `similarity_fct`, `student_temperature`, `teacher_temperature`, `positive_threshold`,
            `without_positive` and `mini_batch_size`, as `CandidateListLoss` describes them.

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

    shown = ("gamma", "alpha", *CandidateListLoss.shown, "detach_weights", "reduction")
    teacher_softmax = True

    def __init__(
        self,
        model: Student,
        gamma: float = 5.0,
        alpha: float = 1.0,
        *,
        beta: float | None = None,
        detach_weights: bool = True,
        ranks: Literal["student", "dataset"] = "student",
        several_positives: Literal["best", "first"] = "best",
        reduction: Literal["batchmean", "mean"] = "batchmean",
        **options: Unpack[ListLossOptions],
    ) -> None:
        super().__init__(model, **options)
        check_choices(
            self,
            ranks=(ranks, ("student", "dataset")),
            several_positives=(several_positives, ("best", "first")),
            reduction=(reduction, ("batchmean", "mean")),
        )
        check_at_least_zero(gamma=gamma, alpha=alpha)
        self.ranks = ranks
        self.gamma = gamma
        self.alpha = alpha
        self.beta = beta
        self.detach_weights = detach_weights
        self.several_positives = several_positives
        self.reduction = reduction

    def loss_from_scores(
        self, student_scores: Tensor, teacher_scores: Tensor, positives: Tensor, mask: Tensor
    ) -> Tensor:
        """Compute the loss from `(B, N)` scores; `positives` and `mask` are boolean `(B, N)`."""
        return self._loss(student_scores, teacher_scores, positives, mask, None)

    def _loss_from_lists(self, student_scores: Tensor, lists: CandidateLists, positives: Tensor) -> Tensor:
        ranks = None
        if self.ranks == "dataset":
            if lists.ranks is None:
                _lack_ranks(0)
            ranks = lists.ranks
            check(~(ranks > 0).any(), _lack_ranks)  # type: ignore[union-attr, operator]
        return self._loss(student_scores, lists.scores.detach(), positives, lists.mask, ranks)

    def _loss(
        self, student_scores: Tensor, teacher_scores: Tensor, positives: Tensor, mask: Tensor, ranks: Tensor | None
    ) -> Tensor:
        return functional.weighted_kl(
            student_scores,
            teacher_scores,
            positives,
            ranks=ranks,
            gamma=self.gamma,
            alpha=self.alpha,
            beta=self.beta,
            mask=mask,
            student_temperature=self.student_temperature,
            teacher_temperature=self.teacher_temperature,
            detach_weights=self.detach_weights,
            several_positives=self.several_positives,
            reduction=self.reduction,
        )

    def get_config_dict(self) -> dict[str, Any]:
        """Return the parameters for the model card; a constant bias takes the place of the rank bias."""
        config = super().get_config_dict()
        return config if self.beta is None else {name: value for name, value in config.items() if name != "alpha"}

    @property
    def citation(self) -> str:
        """BibTeX of the paper, for the model card."""
        return CKL_CITATION
