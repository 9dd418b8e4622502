"""Losses over whole lists besides weighted KL: KL, with and without a regulariser, correlation, order, contrast."""

from __future__ import annotations

from dataclasses import field

import torch
from torch import Tensor

import st_wkl.functional as functional
from st_wkl.losses.base import NOTHING_TO_COMPARE, CandidateListLoss
from st_wkl.losses.lists import CandidateLists
from st_wkl.losses.options import spelled_out
from st_wkl.losses.scoring import is_bounded


@spelled_out
class KLDistillLoss(CandidateListLoss):
    """KL divergence of the student's ranking of each query's candidates from the teacher's.

    The same number and gradient as `WeightedKLDistillationLoss(model, gamma=0, alpha=0)`, under a name of its own.
    Unlike upstream's `DistillKLDivLoss` it takes the model's own similarity and lists of any length, stops at a score
    that is none, and is not multiplied by the squared temperature.

    Args:
        model: The student, of any of the four model classes.

    Source:
        Hinton et al., https://arxiv.org/abs/1503.02531.

    Example:
        >>> from sentence_transformers import SentenceTransformer
        >>> student = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")  # doctest: +SKIP
        >>> KLDistillLoss(student)  # doctest: +SKIP
        KLDistillLoss(similarity_fct='pairwise_cos_sim', student_temperature=0.05, teacher_temperature=1.0)
    """

    function = staticmethod(functional.kl_divergence)
    teacher_softmax = True
    paper = "hinton2015distilling"


@spelled_out
class RegularisedKLDistillLoss(CandidateListLoss):
    """KL divergence plus a term that asks for certainty about the labels: the baseline that CKL's authors began with.

    Args:
        model: The student, of any of the four model classes.
        beta: Strength of the regulariser; the authors used 0.01 and 0.02. They sum it over the batch and average the
            divergence, so with other batch sizes, per device under distributed training, β is another.

    Source:
        Earlier code of CKL's authors, https://arxiv.org/abs/2406.05977; see `st_wkl.functional.regularised_kl`.

    Example:
        >>> from sentence_transformers import SentenceTransformer
        >>> student = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")  # doctest: +SKIP
        >>> loss = RegularisedKLDistillLoss(student, beta=0.01)  # doctest: +SKIP
    """

    beta: float = 0.02

    shown = ("beta", *CandidateListLoss.shown)
    function = staticmethod(functional.regularised_kl)
    teacher_softmax = True
    paper = "yang2024weighted"


@spelled_out
class PearsonDistillLoss(CandidateListLoss):
    """One minus the correlation of the student's and the teacher's scores over each query's candidates.

    Scale and offset of either side do not matter, so there is no temperature to choose; in exchange the student learns
    nothing about how sure the teacher is. It knows no positives.

    Args:
        model: The student, of any of the four model classes.

    Source:
        The row term of DIST, Huang et al., NeurIPS 2022, https://arxiv.org/abs/2205.10536.

    Example:
        >>> from sentence_transformers import SentenceTransformer
        >>> loss = PearsonDistillLoss(SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2"))  # doctest: +SKIP
    """

    student_temperature: float = field(default=None, init=False)  # type: ignore[assignment]
    teacher_temperature: float = field(default=1.0, init=False)
    positive_threshold: float = field(default=1.0, init=False)
    without_positive: str = field(default="all-negative", init=False)  # type: ignore[assignment]

    shown = ("similarity_fct",)
    function = staticmethod(functional.pearson)
    paper = "huang2022knowledge"


@spelled_out
class RankNetDistillLoss(CandidateListLoss):
    """Logistic loss on every two candidates, for the order that the teacher gives them.

    Only the order of the teacher's scores counts, so there is no teacher temperature, and any ranking will do as a
    teacher. It knows no positives.

    Args:
        model: The student, of any of the four model classes.

    Source:
        Burges et al., ICML 2005.

    Example:
        >>> from sentence_transformers import SentenceTransformer
        >>> student = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")  # doctest: +SKIP
        >>> loss = RankNetDistillLoss(student)  # doctest: +SKIP
    """

    teacher_temperature: float = field(default=1.0, init=False)
    positive_threshold: float = field(default=1.0, init=False)
    without_positive: str = field(default="all-negative", init=False)  # type: ignore[assignment]

    shown = ("similarity_fct", "student_temperature")
    function = staticmethod(functional.rank_net)
    paper = "burges2005ranknet"


@spelled_out
class MSEDistillLoss(CandidateListLoss):
    """Mean squared error between the student's raw scores and the teacher's, for small rerankers.

    Unlike upstream's `MSELoss` of cross-encoders it takes lists, and counts each list alike. A student of cosines
    cannot take over logits: for retrievers there is `MarginMSEDistillLoss`. A cross-encoder's `predict` puts a sigmoid
    on top by default: `predict(pairs, activation_fn=torch.nn.Identity())` gives what was taught.

    Args:
        model: The student: a `CrossEncoder`, or a retriever whose similarity has no bounds.

    Raises:
        ValueError: If the student's similarity lies within [-1, 1].

    Source:
        See `st_wkl.functional.pointwise_mse`.

    Example:
        >>> from sentence_transformers import CrossEncoder
        >>> student = CrossEncoder("jhu-clsp/ettin-encoder-17m", num_labels=1)  # doctest: +SKIP
        >>> loss = MSEDistillLoss(student, teacher_temperature=5.0)  # doctest: +SKIP
    """

    positive_threshold: float = field(default=1.0, init=False)
    without_positive: str = field(default="all-negative", init=False)  # type: ignore[assignment]

    function = staticmethod(functional.pointwise_mse)

    def __post_init__(self) -> None:
        super().__post_init__()
        if is_bounded(self.similarity_fct):
            raise ValueError(
                "MSEDistillLoss asks the student for the teacher's own scores, and this student's similarity lies "
                "within [-1, 1]. Take MarginMSEDistillLoss, or similarity_fct=pairwise_dot_score."
            )


@spelled_out
class ListContrastiveLoss(CandidateListLoss):
    """Softmax cross entropy of each positive against the negatives of its own list; no teacher needed.

    The baseline that a distillation has to beat on the same candidates. `InBatchContrastiveLoss` takes the other
    documents of the batch as negatives, too. Columns may come without labels; teacher scores make no difference.

    Args:
        model: The student, of any of the four model classes.
        without_positive: A list without a positive counts 0 in the mean (`"all-negative"`), or not at all (`"skip"`).

    Source:
        van den Oord et al., https://arxiv.org/abs/1807.03748; several positives are averaged outside the logarithm.

    Example:
        >>> from sentence_transformers import SentenceTransformer
        >>> student = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")  # doctest: +SKIP
        >>> loss = ListContrastiveLoss(student)  # doctest: +SKIP
    """

    teacher_temperature: float = field(default=1.0, init=False)

    shown = ("similarity_fct", "student_temperature")
    function = staticmethod(functional.list_contrastive)
    if_nothing_is_positive = NOTHING_TO_COMPARE
    paper = "oord2019representationlearningcontrastivepredictive"

    def _lists(self, embeddings: list[Tensor], labels: Tensor | None) -> CandidateLists:
        # Columns say by their order what a label would; only a cross-encoder's scores do not say how many there are.
        if labels is None and self.output != "score":
            labels = torch.zeros(len(embeddings[0]), len(embeddings) - 1, device=embeddings[0].device)
        return super()._lists(embeddings, labels)
