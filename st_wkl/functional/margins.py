"""Losses that set a margin from the documents themselves, without a teacher."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def adaptive_relevance_margin(
    query_embeddings: Tensor,
    positive_embeddings: Tensor,
    negative_embeddings: Tensor,
    *,
    target: float | Literal["adaptive", "distributed"] = "distributed",
    error: Literal["l2", "l1", "soft"] = "l2",
    in_batch: bool = False,
) -> Tensor:
    """Adaptive relevance margins (ARM): how far apart two documents are says how far apart their scores should be.

    No teacher takes part. With m_i = cos(q_i, d⁺_i) − cos(q_i, d⁻_i), the loss is the mean error of m − target.

    Args:
        query_embeddings: `(B, D)`.
        positive_embeddings: `(B, D)`.
        negative_embeddings: `(B, D)`, one negative per query.
        target: A number for one margin for all; `"adaptive"` for cos(d⁺_i, d⁻_i)/2 + 1/2; `"distributed"` for
            cos(d⁺_i, d⁻_j)/2 + 1/2 over the whole batch, against m_j, the authors' best.
        error: `"l2"`, as in the published runs, `"l1"`, or `"soft"` for log(1 + exp(−x)).
        in_batch: Compare every query with every negative of the batch: the margin is cos(q_i, d⁺_i) − cos(q_i, d⁻_j).

    Returns:
        The loss, a scalar. The target is not detached, as in the published code.

    Raises:
        ValueError: If shapes differ, an option is unknown, or an embedding has length 0, as it has no cosine.

    Source:
        https://arxiv.org/abs/2407.21515 (ICTIR 2025) and its published code. Difference: with `in_batch`, that code
        takes the positive of the negative's row, cos(q_j, d⁺_j), almost certainly by a slip of broadcasting.

    Example:
        >>> import torch
        >>> query, positive, negative = torch.eye(3)[:1], torch.eye(3)[:1], torch.eye(3)[1:2]
        >>> adaptive_relevance_margin(query, positive, negative, target="adaptive").item()  # margin 1, target 0.5
        0.25
    """
    errors = {"l2": torch.square, "l1": torch.abs, "soft": lambda x: F.softplus(-x)}
    if error not in errors:
        raise ValueError(f"error must be 'l2', 'l1' or 'soft', got {error!r}.")
    if isinstance(target, str) and target not in ("adaptive", "distributed"):
        raise ValueError(f"target must be a number, 'adaptive' or 'distributed', got {target!r}.")
    query, positive, negative = (
        _unit(name, embeddings, query_embeddings.shape)
        for name, embeddings in (
            ("query", query_embeddings),
            ("positive", positive_embeddings),
            ("negative", negative_embeddings),
        )
    )
    own = (query * positive).sum(dim=1)
    everywhere = positive @ negative.T / 2 + 0.5
    if in_batch:
        margins = own[:, None] - query @ negative.T
        goal = everywhere if isinstance(target, str) else torch.full_like(margins, target)
    else:
        margins = own - (query * negative).sum(dim=1)
        goal = {"adaptive": everywhere.diagonal(), "distributed": everywhere}.get(str(target), margins.new_tensor(0.0))
        goal = goal if isinstance(target, str) else torch.full_like(margins, target)
    return errors[error](margins - goal).mean()


def _unit(name: str, embeddings: Tensor, shape: torch.Size) -> Tensor:
    if embeddings.ndim != 2 or embeddings.shape != shape:
        raise ValueError(
            f"{name}_embeddings must be (B, D) like the queries, {tuple(shape)}, got {tuple(embeddings.shape)}."
        )
    embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
    lengths = embeddings.norm(dim=1, keepdim=True)
    if not bool((lengths > 0).all()):
        row = int((~(lengths > 0)).nonzero()[0, 0])
        raise ValueError(
            f"the {name} embedding of row {row} has length {lengths[row].item()}, so it has no cosine with anything. "
            "An empty text does that to some models: drop the row."
        )
    return embeddings / lengths
