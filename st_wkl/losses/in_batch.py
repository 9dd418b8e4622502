"""The contrastive term that practice adds to distillation: the positive against every other document of the batch."""

from __future__ import annotations

from dataclasses import KW_ONLY
from typing import ClassVar

import torch
from sentence_transformers.util import all_gather, all_gather_with_grad, get_rank, get_world_size
from torch import Tensor

from st_wkl.losses.base import NOTHING_TO_COMPARE
from st_wkl.losses.cached import StudentLoss
from st_wkl.losses.lists import CandidateLists, columns_without_teacher, holds_lists, unpack
from st_wkl.losses.options import former, spelled_out
from st_wkl.losses.scoring import BOUNDED_TEMPERATURE, Similarity, compare, concatenate, is_bounded, model_similarity


@spelled_out
class InBatchContrastiveLoss(StudentLoss):
    """InfoNCE of each positive against every other document of the batch.

    Unlike `MultipleNegativesRankingLoss` it takes lists of any length with several positives, and leaves out of the
    denominator what is no negative: the query's other positives, copies of its positives in other rows, the positives
    of rows with the same query, the document that is the query itself, and all but one copy of any document. In lists,
    equal texts are recognised as such, across processes too. In columns (query, positive, negative_1, …) a copy is
    recognised by its equal embedding, which dropout hides; there, use lists or the batch sampler `NO_DUPLICATES`.

    Args:
        model: The student: a `SentenceTransformer`, `SparseEncoder` or `MultiVectorEncoder`. A cross-encoder would
            have to read every query with every document.
        similarity_fct: Similarity of all queries with all documents. Default: the one that the model ranks with.
        student_temperature: Divides the scores. Default: 0.05 for similarities within [-1, 1], 1 for any other.
        positive_threshold: In lists with judged gains, the smallest gain that makes a document a positive.
        own_negatives: Take the query's own hard negatives as negatives, too. PairDistill leaves them to its other
            terms.
        gather_across_devices: Take the documents of all processes as negatives.

    Raises:
        ValueError: If the student is a cross-encoder or a parameter is out of range.

    Source:
        van den Oord et al., https://arxiv.org/abs/1807.03748; several positives are averaged outside the logarithm.

    Example:
        >>> from sentence_transformers import SentenceTransformer
        >>> student = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")  # doctest: +SKIP
        >>> InBatchContrastiveLoss(student).student_temperature  # doctest: +SKIP
        0.05
    """

    _: KW_ONLY
    similarity_fct: Similarity | None = None
    student_temperature: float = None  # type: ignore[assignment]  # a number once the similarity is known
    positive_threshold: float = 1.0
    own_negatives: bool = True
    gather_across_devices: bool = False

    shown = ("similarity_fct", "student_temperature", "own_negatives", "gather_across_devices")
    paper = "oord2019representationlearningcontrastivepredictive"
    if_nothing_is_positive: ClassVar[str] = NOTHING_TO_COMPARE
    renamed: ClassVar = {"temperature": "student_temperature"}
    temperature = former("InBatchContrastiveLoss", "temperature", "student_temperature")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.output == "score":
            raise ValueError(
                "InBatchContrastiveLoss needs embeddings: a cross-encoder would have to read every query with every "
                "document of the batch. Leave this term out for cross-encoder students."
            )
        if self.similarity_fct is None:
            self.similarity_fct = model_similarity(self.model, pairwise=False)
        if self.student_temperature is None:
            self.student_temperature = BOUNDED_TEMPERATURE if is_bounded(self.similarity_fct) else 1.0

    def loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None) -> Tensor:
        """Compute the loss from the embeddings of a batch.

        Args:
            embeddings: One tensor per column, the query first: query, positive, negative_1, …, or query and all
                documents of the lists.
            labels: What `ListwiseCollator` made. Of `(B, N)` labels of columns, where column 1 is the positive, only
                −inf counts: that document is no negative of its query.

        Returns:
            The mean over queries of the mean over their positives, a scalar; 0 if the batch has no positive.
        """
        query, documents = embeddings[0], concatenate(embeddings[1:])
        if labels is not None and holds_lists(labels):
            lists = unpack(labels, len(documents))
        else:
            lists = columns_without_teacher(embeddings, labels)
        identity = _identities(documents.detach(), lists)
        positives = (lists.gains >= self.positive_threshold) & lists.mask
        own, documents, identity = self._gathered(documents, identity)
        scores = compare(query, documents, self.similarity_fct) / self.student_temperature  # type: ignore[arg-type]

        # Equal documents have one number, the place of the first of them.
        number = _first_copies(identity)
        columns = own[lists.index]
        # Which columns hold a text that is a positive of the row, wherever that text stands; and repeats.
        excluded = _marked(positives, number[columns], scores)[:, number]
        if lists.identity is None:  # queries of the same words share their answers, and none is its own negative
            names = _hashes(query.detach())
            same = (names.unsqueeze(1) == names).to(scores.dtype)
            excluded = (same @ excluded.to(scores.dtype) > 0) | (names.unsqueeze(1) == identity)
        excluded |= number != torch.arange(len(number), device=number.device)
        if not self.own_negatives:
            excluded |= _marked(lists.mask, columns, scores)
        # What is in no list of the query and yet no negative: in columns what a label of -inf leaves out, in lists what
        # stands behind them; and copies of these.
        left_out, places = ~lists.mask, number[columns]
        if lists.identity is not None:
            found, places = _places_of(lists.identity, identity)
            left_out, places = left_out & found, number[places]
        excluded |= _marked(left_out, places, scores)[:, number]
        negatives = scores.masked_fill(excluded, -torch.inf).logsumexp(dim=1, keepdim=True)
        positive_scores = scores.gather(1, columns)
        losses = torch.where(positives, torch.logaddexp(positive_scores, negatives) - positive_scores, 0.0)
        # Every query counts the same, however many positives it has.
        counts = positives.sum(dim=1)
        return (losses.sum(dim=1) / counts.clamp_min(1)).sum() / (counts > 0).sum().clamp_min(1)

    def _gathered(self, documents: Tensor, identity: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gather documents across processes; also return where this process's documents are among them."""
        own = torch.arange(len(documents), device=documents.device)
        if not self.gather_across_devices or get_world_size() == 1:
            return own, documents, identity
        # Processes hold different numbers of documents; gathering needs equal ones, so short ones are padded and the
        # padding is dropped again.
        shape = torch.tensor([documents.shape[:2] if documents.ndim == 3 else (len(documents), 1)], device=own.device)
        shapes = all_gather(shape).view(-1, 2)
        most, longest = shapes.max(dim=0).values.tolist()
        if documents.ndim == 3:
            documents = torch.nn.functional.pad(documents, (0, 0, 0, longest - documents.shape[1]))
        extra = most - len(documents)
        documents = torch.cat([documents, documents.new_zeros(extra, *documents.shape[1:])])
        identity = torch.cat([identity, identity.new_full((extra,), -1)])
        present = torch.arange(most, device=own.device) < shapes[:, :1]
        start = int(present[: get_rank()].sum())
        return (
            own + start,
            all_gather_with_grad(documents)[present.flatten()],
            all_gather(identity)[present.flatten()],
        )


def _marked(which: Tensor, places: Tensor, scores: Tensor) -> Tensor:
    """Mark the columns of `(B, M)` scores that `(B, N)` places name where `which` holds."""
    return torch.zeros_like(scores).scatter_add(1, places, which.to(scores.dtype)) > 0


def _first_copies(identity: Tensor) -> Tensor:
    """Return, for every document, the place of the first of those that are equal to it."""
    ordered, places = identity.sort(stable=True)
    begins = torch.ones_like(ordered, dtype=torch.bool)
    begins[1:] = ordered[1:] != ordered[:-1]
    start = torch.where(begins, torch.arange(len(ordered), device=ordered.device), 0).cummax(dim=0).values
    return torch.empty_like(places).scatter(0, places, places[start])


def _places_of(wanted: Tensor, identity: Tensor) -> tuple[Tensor, Tensor]:
    """Return which of the `(B, N)` identities documents have, and where."""
    ordered, order = identity.sort()
    places = torch.searchsorted(ordered, wanted.contiguous()).clamp_max(len(ordered) - 1)
    return (ordered[places] == wanted) & (wanted >= 0), order[places]


def _identities(documents: Tensor, lists: CandidateLists) -> Tensor:
    """Return a number per document, equal for equal documents."""
    if lists.identity is None:
        return _hashes(documents)
    # Places without a document write behind the last one.
    identity = torch.full((len(documents) + 1,), -1, dtype=torch.long, device=documents.device)
    places = torch.where(lists.mask, lists.index, len(documents))
    return identity.scatter(0, places.flatten(), lists.identity.flatten())[:-1]


# Odd numbers without a pattern; as signed ones, since these are the integers of tensors.
_MULTIPLIERS = (0x9E3779B97F4A7C15 - 2**64, 0xBF58476D1CE4E5B9 - 2**64)


def _hashes(documents: Tensor) -> Tensor:
    """Return a number per document that only equal embeddings share: a sum of their bits, multiplied by place."""
    values = documents.flatten(1) + 0.0  # -0 is 0
    bits = values.view(torch.int64) if values.dtype == torch.float64 else values.float().view(torch.int32).long()
    factors = torch.arange(1, bits.shape[1] + 1, device=bits.device) * _MULTIPLIERS[0]
    factors = (factors ^ (factors >> 29)) * _MULTIPLIERS[1] | 1
    return (bits * factors).sum(dim=1)
