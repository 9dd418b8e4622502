"""Candidate lists as the losses see them, and how they travel through a trainer as one label tensor.

A trainer hands a loss nothing but features and `labels`. Columns (query, positive, negative_1, …) come with `(B, N)`
teacher scores. Lists of any length come as two columns, all queries and all different documents of the batch, with
`(B, N, C)` labels that say which document stands where. C is 5, or more where a pairwise teacher's preferences or a
teacher's embeddings ride along, which its remainder tells without a look at the device; but always odd: wrapper losses
read labels whose last size is the embedding dimension as embeddings, and no model has an odd one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from st_wkl.functional import _checks

SCORE, GAIN, INDEX, IDENTITY, RANK = range(5)
CHANNELS = 5
# What rides along behind the channels: the sum of these is the remainder of C - CHANNELS.
VECTORS, PREFERENCES, TEXTS, RIDERS = 2, 4, 8, 16
ABSENT = -1.0
# (i, j, probability that document i is better than document j), places in one list.
Preference = tuple[int, int, float]


@dataclass(frozen=True)
class CandidateLists:
    """The lists of a batch, all tensors `(B, N)`.

    Args:
        scores: Teacher scores; NaN where there is no document.
        gains: Judged gains, 0 where unjudged.
        index: Which of the batch's embedded documents stands here; 0 where there is none.
        mask: False where there is no document.
        identity: A number per document text, equal for equal texts on every process; where `mask` is False, −1 or that
            of a document which is no negative of this query. None where only embeddings tell.
        preferences: `(B, N, N)` a pairwise teacher's probability that document i is better than document j, NaN where
            it was not asked; None where no pairwise teacher took part.
        ranks: Ranks that the dataset gives, 1 = best; None, or on an accelerator below 1, where it gives none.
    """

    scores: Tensor
    gains: Tensor
    index: Tensor
    mask: Tensor
    identity: Tensor | None
    preferences: Tensor | None = None
    ranks: Tensor | None = None

    def select(self, rows: Tensor) -> CandidateLists:
        """Return some of the lists, given their places or a boolean `(B,)`."""
        parts: dict[str, Any] = {name: None if part is None else part[rows] for name, part in vars(self).items()}
        return CandidateLists(**parts)


def holds_lists(labels: Tensor | None) -> bool:
    """Tell whether labels are packed lists rather than the scores of columns."""
    return labels is not None and labels.ndim == 3


def pack(
    indices: Sequence[Sequence[int]],
    texts: Sequence[str],
    scores: Sequence[Sequence[float]] | None,
    gains: Sequence[Sequence[float]],
    pairs: Sequence[Sequence[Preference]] | None = None,
    ranks: Sequence[Sequence[int]] | None = None,
    left_out: Sequence[Sequence[str]] | None = None,
) -> Tensor:
    """Pack ragged lists into the label tensor.

    Args:
        indices: For each row, which of `texts` stand in its list.
        texts: The different documents of the batch.
        scores: Teacher scores of each list, or None where no teacher took part.
        gains: Judged gains of each list.
        pairs: A pairwise teacher's preferences within each list, or None where there is none.
        ranks: Ranks of each list's documents that the dataset gives, or None where it gives none.
        left_out: For each row, texts that are no negatives of it though they are not among its positives: these stand
            after its list, with their identity alone, by which other processes know them, too.

    Returns:
        float32 tensor `(B, N, C)`, padded with NaN scores and gains, and index −1.
    """

    # 24 bits are what float32 holds exactly. Two documents that share them by chance, one pair in 17 million, only
    # cost the contrastive term one negative.
    def identity(text: str) -> int:
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=3).digest(), "big")

    identities = [identity(text) for text in texts]
    others = [[*map(identity, row)] for row in left_out] if left_out else [[] for _ in indices]
    width = max((len(row) + len(other) for row, other in zip(indices, others, strict=True)), default=0)
    nan = float("nan")
    nothing: list[list[float]] = [[]] * len(indices)
    filled: list[tuple[Sequence[Sequence[float]], float]] = [
        (nothing if scores is None else scores, nan),
        (gains, nan),
        (indices, ABSENT),
        ([[*(identities[place] for place in row), *rest] for row, rest in zip(indices, others, strict=True)], ABSENT),
        (nothing if ranks is None else ranks, ABSENT),
    ]
    parts = [[[*row, *[fill] * (width - len(row))] for row in rows] for rows, fill in filled]
    labels = torch.stack([torch.tensor(part, dtype=torch.float32) for part in parts], dim=-1)
    if pairs is not None:
        labels = torch.nn.functional.pad(labels, (0, _room(width, PREFERENCES)), value=nan)
        for row, preferences in enumerate(pairs):
            for first, second, probability in preferences:
                labels[row, first, CHANNELS + second] = probability
    return labels


def with_vectors(labels: Tensor, vectors: Tensor, *, texts: bool = False) -> Tensor:
    """Let the teacher's embeddings of a batch ride along.

    Args:
        labels: What `pack` made.
        vectors: `(rows, D)`, those of the queries, then those of the documents.
        texts: Whether the rows of the batch are single texts and no lists.
    """
    before = labels.shape[2] - CHANNELS
    places = max(labels.shape[0] * labels.shape[1], 1)
    # Preferences take a place per document, however much room they were given.
    held = min(before, labels.shape[1]) if before else 0
    flags = VECTORS | (PREFERENCES if before else 0) | (TEXTS if texts else 0)
    found = labels.new_zeros(*labels.shape[:2], CHANNELS + _room(held - (-vectors.numel() // places), flags))
    found[..., : CHANNELS + held] = labels[..., : CHANNELS + held]
    rest = found[..., CHANNELS + held :]
    filled = torch.nn.functional.pad(vectors.flatten().to(rest.dtype), (0, rest.numel() - vectors.numel()))
    found[..., CHANNELS + held :] = filled.view(rest.shape)
    return found


def vectors_of(labels: Tensor, rows: Sequence[int], dimension: int) -> list[Tensor] | None:
    """Return the teacher's embeddings that ride along, `(rows, D)` for each column, None where there are none."""
    if not _riders(labels) & VECTORS:
        return None
    held = labels.shape[1] if _riders(labels) & PREFERENCES else 0
    flat = labels[..., CHANNELS + held :].flatten()
    return list(flat[: sum(rows) * dimension].view(-1, dimension).split(list(rows)))


def of_texts(labels: Tensor) -> bool:
    """Tell whether the rows of a batch are single texts and no lists."""
    return bool(_riders(labels) & TEXTS)


def _riders(labels: Tensor) -> int:
    return (labels.shape[2] - CHANNELS) % RIDERS


def _room(size: int, flags: int) -> int:
    """Return the smallest number of channels that hold so many and tell what they hold."""
    return size + (flags - size) % RIDERS


def unpack(labels: Tensor, documents: int | None = None) -> CandidateLists:
    """Read the lists of a batch from its label tensor.

    Args:
        labels: What `pack` made.
        documents: How many documents arrived.

    Raises:
        ValueError: If the lists name more.
    """
    mask = labels[..., INDEX] >= 0
    width = labels.shape[1]
    ranks = labels[..., RANK]
    index = labels[..., INDEX].clamp_min(0).long()
    if documents is not None:

        def found(count: int) -> None:
            raise ValueError(
                f"the lists of this batch name {int(named.max()) + 1} documents, but {documents} arrived at the loss. "
                "With an IterableDataset, accelerate cuts every tensor to the number of rows: set "
                'accelerator_config={"dispatch_batches": False} in the training arguments.'
            )

        named = index
        _checks.check(named >= documents, found)
        index = index.clamp_max(max(documents - 1, 0))  # a device stops for good at a place that is not there
    return CandidateLists(
        scores=labels[..., SCORE],
        gains=torch.where(mask, labels[..., GAIN], 0.0),
        index=index,
        mask=mask,
        identity=labels[..., IDENTITY].long(),
        preferences=labels[..., CHANNELS : CHANNELS + width] if _riders(labels) & PREFERENCES else None,
        ranks=ranks if _checks.waits(ranks) or bool((ranks > 0).any()) else None,
    )


def from_columns(scores: Tensor) -> CandidateLists:
    """Read `(B, N)` teacher scores of the columns positive, negative_1, …, whose embeddings stand one after another.

    A score of −inf leaves the document out of its list, as it does upstream: columns have no other way to say it. In
    packed lists it stays an error, since a list leaves a document out by not holding it.
    """
    rows, candidates = scores.shape
    places = torch.arange(rows * candidates, device=scores.device).view(candidates, rows).T
    gains = torch.zeros_like(scores, dtype=torch.float32)
    gains[:, :1] = 1.0
    return CandidateLists(scores, gains, places, ~scores.isneginf(), None)


def columns_without_teacher(embeddings: Sequence[Tensor], labels: Tensor | None) -> CandidateLists:
    """Read columns for a loss that needs no teacher: of labels, only the −inf that leave a document out count."""
    shape = (len(embeddings[0]), len(embeddings) - 1)
    scores = torch.zeros(shape, device=embeddings[0].device)
    if labels is not None and labels.shape == shape:
        scores = scores.masked_fill(labels.isneginf(), -torch.inf)
    return from_columns(scores)
