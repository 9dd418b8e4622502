"""Candidate lists as the losses see them, and how they travel through a trainer as one label tensor.

A trainer hands a loss nothing but features and `labels`. Columns (query, positive, negative_1, …) come with `(B, N)`
teacher scores. Lists of any length come as two columns, all queries and all different documents of the batch, with
`(B, N, 4)` labels that say which document stands where. Four channels also keep the tensor from being mistaken: some
wrapper losses read two-dimensional labels whose last size is the embedding dimension as embeddings.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SCORE, GAIN, INDEX, IDENTITY = range(4)
CHANNELS = 4
ABSENT = -1.0


@dataclass(frozen=True)
class CandidateLists:
    """The lists of a batch, all tensors `(B, N)`.

    Args:
        scores: Teacher scores; NaN where there is no document.
        gains: Judged gains, 0 where unjudged.
        index: Which of the batch's embedded documents stands here; 0 where there is none.
        mask: False where there is no document.
        identity: A number per document text, equal for equal texts on every process; None where only embeddings tell.
    """

    scores: Tensor
    gains: Tensor
    index: Tensor
    mask: Tensor
    identity: Tensor | None


def pack(
    indices: Sequence[Sequence[int]],
    texts: Sequence[str],
    scores: Sequence[Sequence[float]] | None,
    gains: Sequence[Sequence[float]],
) -> Tensor:
    """Pack ragged lists into the `(B, N, 4)` label tensor.

    Args:
        indices: For each row, which of `texts` stand in its list.
        texts: The different documents of the batch.
        scores: Teacher scores of each list, or None where no teacher took part.
        gains: Judged gains of each list.

    Returns:
        float32 tensor, padded with NaN scores and gains, and index −1.
    """
    # 24 bits are what float32 holds exactly. Two documents that share them by chance, one pair in 17 million, only
    # cost the contrastive term one negative.
    identities = [int.from_bytes(hashlib.blake2b(text.encode(), digest_size=3).digest(), "big") for text in texts]
    width = max((len(row) for row in indices), default=0)
    labels = torch.full((len(indices), width, CHANNELS), float("nan"))
    labels[:, :, INDEX:] = ABSENT
    for row, places in enumerate(indices):
        here = labels[row, : len(places)]
        if scores is not None:
            here[:, SCORE] = torch.as_tensor(scores[row], dtype=torch.float32)
        here[:, GAIN] = torch.as_tensor(gains[row], dtype=torch.float32)
        here[:, INDEX] = torch.as_tensor(places, dtype=torch.float32)
        here[:, IDENTITY] = torch.as_tensor([identities[place] for place in places], dtype=torch.float32)
    return labels


def unpack(labels: Tensor) -> CandidateLists:
    """Read the lists of a batch from a `(B, N, 4)` label tensor."""
    mask = labels[..., INDEX] >= 0
    return CandidateLists(
        scores=labels[..., SCORE],
        gains=torch.where(mask, labels[..., GAIN], 0.0),
        index=labels[..., INDEX].clamp_min(0).long(),
        mask=mask,
        identity=labels[..., IDENTITY].long(),
    )


def from_columns(scores: Tensor) -> CandidateLists:
    """Read `(B, N)` teacher scores of the columns positive, negative_1, …, whose embeddings stand one after another."""
    rows, candidates = scores.shape
    places = torch.arange(rows * candidates, device=scores.device).view(candidates, rows).T
    gains = torch.zeros_like(scores, dtype=torch.float32)
    gains[:, 0] = 1.0
    return CandidateLists(scores, gains, places, torch.ones_like(places, dtype=torch.bool), None)
