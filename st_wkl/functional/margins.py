"""Losses over the margins between a positive and other documents that need no teacher."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from st_wkl.functional._checks import check
from st_wkl.functional._scores import is_number


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
        ValueError: If an embedding has length 0, as it has no cosine.

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
    if target not in ("adaptive", "distributed") and not is_number(target):
        raise ValueError(f"target must be a number, 'adaptive' or 'distributed', got {target!r}.")
    shape = query_embeddings.shape
    query = _unit("query", query_embeddings, shape)
    positive, negative = _unit("positive", positive_embeddings, shape), _unit("negative", negative_embeddings, shape)
    own, everywhere = (query * positive).sum(dim=1), positive @ negative.T / 2 + 0.5
    margins = own[:, None] - query @ negative.T if in_batch else own - (query * negative).sum(dim=1)
    if not isinstance(target, str):
        return errors[error](margins - target).mean()
    return errors[error](
        margins - (everywhere.diagonal() if target == "adaptive" and not in_batch else everywhere)
    ).mean()


def coherence(
    query_embeddings: Tensor,
    paraphrase_embeddings: Tensor,
    document_embeddings: Tensor,
    *,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """How far a query and its paraphrase are from asking the same: in their embeddings, and in what they tell apart.

    With unit embeddings e and m_d(q) = cos(q, d⁺) − cos(q, d) for every document d that is not the query's own:

        distance = mean over queries of ‖e(q) − e(q′)‖²
        margins  = mean over queries and documents of (m_d(q) − m_d(q′))²

    Args:
        query_embeddings: `(B, D)`.
        paraphrase_embeddings: `(B, D)`, one paraphrase q′ per query.
        document_embeddings: `(M, D)`, M ≥ B; document i < B is the positive of query i.
        mask: `(B,)` boolean, False where a query has no paraphrase; it counts in neither mean.

    Returns:
        Distance and margins, two scalars ≥ 0; 0 where no query has a paraphrase, or there is no other document.

    Raises:
        ValueError: If shapes do not fit, or an embedding has length 0.

    Source:
        https://arxiv.org/abs/2508.07975. Its sum over documents is a mean here, so that weights do not depend on the
        size of the batch, and embeddings are brought to length 1 first.

    Example:
        >>> import torch
        >>> query, documents = torch.eye(2)[:1], torch.eye(2)
        >>> [round(term.item(), 4) for term in coherence(query, torch.tensor([[1.0, 1.0]]), documents)]
        [0.5858, 1.0]
    """
    rows, shape = len(query_embeddings), query_embeddings.shape
    if mask is None:
        mask = torch.ones(rows, dtype=torch.bool, device=query_embeddings.device)
    if mask.shape != (rows,) or paraphrase_embeddings.shape != shape or len(document_embeddings) < rows:
        raise ValueError(
            f"coherence needs (B, D) queries and paraphrases, (B,) mask and (M ≥ B, D) documents, got {tuple(shape)}, "
            f"{tuple(paraphrase_embeddings.shape)}, {tuple(mask.shape)} and {tuple(document_embeddings.shape)}."
        )
    query = _unit("query", query_embeddings, shape)
    # What stands in the place of a missing paraphrase may be anything.
    paraphrase = _unit("paraphrase", torch.where(mask[:, None], paraphrase_embeddings, query_embeddings), shape)
    documents = _unit("document", document_embeddings, document_embeddings.shape)
    present = mask.to(query)
    distance = (((query - paraphrase) ** 2).sum(dim=1) * present).sum() / present.sum().clamp_min(1)
    # Both margins are linear in the query, and so is their difference.
    cosines = (query - paraphrase) @ documents.T
    squared = (cosines.diagonal()[:, None] - cosines) ** 2  # 0 for the query's own document
    return distance, (squared.sum(dim=1) * present).sum() / (present.sum() * (len(documents) - 1)).clamp_min(1)


def _unit(name: str, embeddings: Tensor, shape: torch.Size) -> Tensor:
    if embeddings.ndim != 2 or embeddings.shape != shape:
        raise ValueError(
            f"{name}_embeddings must be (B, D) like the queries, {tuple(shape)}, got {tuple(embeddings.shape)}."
        )
    embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
    lengths = embeddings.norm(dim=1, keepdim=True)
    bad = ~(lengths > 0)

    def found(count: int) -> None:
        row = int(bad.nonzero()[0, 0])
        raise ValueError(
            f"the {name} embedding of row {row} has length {lengths[row].item()}, so it has no cosine with anything. "
            "An empty text does that to some models: drop the row."
        )

    check(bad, found)
    return embeddings / lengths
