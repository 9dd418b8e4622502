"""A loss by its name, with what suits the student and the teacher."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from sentence_transformers import SentenceTransformer, SparseEncoder
from sentence_transformers.base.losses import has_static_embedding_input
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from sentence_transformers.sparse_encoder.losses import CachedSpladeLoss, SpladeLoss
from torch import nn

import st_wkl.losses as ours
from st_wkl.losses.options import constructor_defaults
from st_wkl.ranges import check_options, nearest

if TYPE_CHECKING:
    from st_wkl.losses.scoring import Student

logger = logging.getLogger(__name__)

LOSSES: dict[str, Callable[..., nn.Module]] = {
    "kl": partial(ours.WeightedKLDistillationLoss, gamma=0.0, alpha=0.0),
    "weighted-kl": ours.WeightedKLDistillationLoss,
    "margin-kl": ours.MarginKL,
    "pair-distill": ours.PairDistillLoss,
    "adaptive-margin": ours.AdaptiveRelevanceMarginLoss,
    "pearson": ours.PearsonDistillLoss,
    "margin-mse": ours.MarginMSEDistillLoss,
    "mse": ours.MSEDistillLoss,
    "rank-net": ours.RankNetDistillLoss,
    "regularised-kl": ours.RegularisedKLDistillLoss,
    "list-contrastive": ours.ListContrastiveLoss,
    "in-batch": ours.InBatchContrastiveLoss,
    "embedding": ours.EmbeddingDistillLoss,
}
# What may be added to any other loss: `kl+in-batch` is what students with one embedding per text learn by default.
IN_BATCH, EMBEDDING = "in-batch", "embedding"
# Batches of 32 lists of 16 documents hold 512 texts, whose activations fill 10 GB even of a small transformer.
MINI_BATCH_SIZE = 32
# Below and above these shares of its largest entropy a teacher's softmax over a list says nothing but "the first" or
# "all alike"; the losses then have no order to learn from.
SENSIBLE_ENTROPY = (0.05, 0.9)
# Those of the examples of `SpladeLoss`. Without them a sparse student learns to use its whole vocabulary.
DOCUMENT_REGULARIZER, QUERY_REGULARIZER = 3e-5, 5e-5


def is_static(student: Student) -> bool:
    """Tell whether a student looks its embeddings up."""
    return isinstance(student, SentenceTransformer) and has_static_embedding_input(student)


def split_name(name: str) -> tuple[str, list[str]]:
    """Return the name of a loss without what is added to it, and that.

    Raises:
        ValueError: If there is no such loss, or something else is added.

    Example:
        >>> split_name("kl+in-batch")
        ('kl', ['in-batch'])
    """
    first, *added = (part.strip() for part in name.split("+"))
    for part in (first, *added):
        if part not in LOSSES:
            raise ValueError(f"there is no loss {part!r}{nearest(part, LOSSES)}. Those by name: {', '.join(LOSSES)}.")
    if not {*added} <= {IN_BATCH, EMBEDDING} or len({first, *added}) <= len(added):
        raise ValueError(
            f"loss {name!r}: by name, {IN_BATCH} alone can be added to another loss, as in 'kl+in-batch', and "
            f"{EMBEDDING}, each once. WeightedSumLoss(student, [(1.0, …), (1.0, …)]) adds any."
        )
    return first, added


def make_loss(
    student: Student,
    name: str | None = None,
    *,
    in_batch: float | None = None,
    mini_batch_size: int | None = None,
    matryoshka: Sequence[int] | None = None,
    report: Mapping[str, Any] | None = None,
    vectors: Any = None,
    **parameters: Any,
) -> nn.Module:
    """Make a loss by its name, or the one that the study of this project found best over its collections.

    That is `kl+in-batch`, KL with an in-batch contrastive term, which adds more than any choice of the divergence; for
    students without one embedding per text, late interaction and cross-encoders, `kl` alone. A sparse student's loss is
    put into `SpladeLoss`, with the regularizers of its examples (3e-5 for documents, 5e-5 for queries).

    Args:
        student: The student.
        name: A key of `LOSSES`, with `+in-batch` behind it for an in-batch contrastive term of weight 1, and
            `+embedding` for an `EmbeddingDistillLoss`. Default: `kl+in-batch` if the student has one embedding per
            text, otherwise `kl`; with vectors also `+embedding`.
        in_batch: Weight of the in-batch term, at the loss's own student temperature; 0 for none. Default: what the name
            says.
        mini_batch_size: Texts that are embedded at once. Default: 32 for transformers, all for static students.
        matryoshka: Dimensions to which the student's embeddings can be cut, such as `[256, 128, 64]`: the mean of the
            loss over these and the full one, by upstream's `MatryoshkaLoss`, so that each of them ranks.
        report: The teacher report in a dataset's provenance. If it says that the teacher's softmax over a list is
            nearly one-hot or nearly flat (less than 5 % or more than 90 % of the largest entropy), the teacher's
            temperature is the one that the report suggests; otherwise 1, which suits a cross-encoder's logits.
        vectors: A teacher's embeddings of all texts, for `embedding`; see `VectorStore.embed`.
        **parameters: Parameters of the loss; of an `embedding` that is added, too.

    Raises:
        ValueError: If there is no such loss or parameter, or a parameter is out of range.

    Example:
        >>> make_loss(student, "margin-kl", pairs="all")  # doctest: +SKIP
        >>> make_loss(student, "kl+in-batch")  # what make_loss(student) is  # doctest: +SKIP
    """
    check_options(in_batch=in_batch, mini_batch_size=mini_batch_size)
    sparse = isinstance(student, SparseEncoder)
    if name is None:
        name = "kl+in-batch" if sparse or isinstance(student, SentenceTransformer) else "kl"
        name = name if vectors is None else f"{name}+{EMBEDDING}"
    whole, (name, added) = name, split_name(name)
    _check_vectors(whole, vectors)
    weight = float(IN_BATCH in added) if in_batch is None else in_batch
    also = _take_parameters(name, parameters) if EMBEDDING in added else {}
    known = _check_parameters(name, student, parameters)
    if mini_batch_size is None and not is_static(student):
        mini_batch_size = MINI_BATCH_SIZE
    try:
        size = None if sparse else mini_batch_size
        alone = not weight and EMBEDDING not in added
        defaults = {
            "teacher_temperature": None if name == EMBEDDING else _temperature(report),
            "mini_batch_size": size if alone else None,
        }
        given = {key: value for key, value in defaults.items() if value is not None and key in known}
        given |= {"vectors": vectors} if name == EMBEDDING else {}
        loss = LOSSES[name](student, **{**given, **parameters})
        terms = [(1.0, loss)]
        if weight:
            term = ours.InBatchContrastiveLoss(student, student_temperature=getattr(loss, "student_temperature", None))  # type: ignore[arg-type]
            terms.append((weight, term))
        if EMBEDDING in added:
            terms.append((1.0, ours.EmbeddingDistillLoss(student, vectors, **also)))
        if not alone:
            loss = ours.WeightedSumLoss(student, terms, mini_batch_size=size)
    except TypeError as error:
        raise ValueError(f"The loss {name!r} on a {type(student).__name__}: {error}.") from error
    if matryoshka is not None:
        return _at_dimensions(student, loss, matryoshka)
    if not isinstance(student, SparseEncoder):
        return loss
    weights = (DOCUMENT_REGULARIZER, QUERY_REGULARIZER)
    if mini_batch_size is None:
        return SpladeLoss(student, loss, *weights)
    return CachedSpladeLoss(student, loss, *weights, mini_batch_size=mini_batch_size)


def _at_dimensions(student: Student, loss: nn.Module, dimensions: Sequence[int]) -> nn.Module:
    """Put `MatryoshkaLoss` around a loss, over some dimensions and the full one."""
    if not isinstance(student, SentenceTransformer):
        raise ValueError(
            f"matryoshka cuts the one embedding of a text, and a {type(student).__name__} has none. Leave it out."
        )
    if student.similarity_fn_name not in (None, "cosine"):
        raise ValueError(
            f"MatryoshkaLoss normalises what it cuts, and this student ranks by {student.similarity_fn_name}, which "
            "lengths make a difference to: set student.similarity_fn_name to 'cosine', or leave matryoshka out."
        )
    if not isinstance(dimensions, Sequence) or isinstance(dimensions, str):
        raise ValueError(f"matryoshka is a list of dimensions, such as [256, 128, 64], got {dimensions!r}.")
    full: Any = student.get_embedding_dimension()
    wrong = [size for size in dimensions if isinstance(size, bool) or not isinstance(size, int) or not 0 < size <= full]
    if wrong or not dimensions or len({*dimensions}) < len(dimensions):
        raise ValueError(
            f"matryoshka must be different dimensions from 1 to the student's {full}, got {list(dimensions)!r}."
        )
    sizes = sorted({*dimensions, full}, reverse=True)
    # A mean, so that learning rates and the weights of other terms mean what they do without it.
    return MatryoshkaLoss(student, loss, sizes, [1 / len(sizes)] * len(sizes))


def _check_vectors(name: str, vectors: Any) -> None:
    """Stop where a teacher's embeddings are missing, or would be used for nothing."""
    wanted = EMBEDDING in (part.strip() for part in name.split("+"))
    if wanted and vectors is None:
        raise ValueError(
            f"The loss {name!r} learns from a teacher's embeddings: name it, as in distill(…, embedding_teacher=…) or "
            "--embedding-teacher, or give make_loss(…, vectors=VectorStore().embed(teacher, texts))."
        )
    if vectors is not None and not wanted:
        raise ValueError(f"The loss {name!r} does not look at an embedding teacher's vectors: {name}+{EMBEDDING} does.")


def _take_parameters(name: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """Take those parameters out that belong to an `embedding` which is added to a loss."""
    known: Any = LOSSES[name]
    own = constructor_defaults(getattr(known, "func", known))
    of_embedding = constructor_defaults(ours.EmbeddingDistillLoss)
    return {key: parameters.pop(key) for key in [*parameters] if key in of_embedding and key not in own}


def _check_parameters(name: str, student: Student, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a loss has, stop at a parameter that it has not, and say where one makes another loss of it."""
    kind: Any = LOSSES[name]
    known = constructor_defaults(getattr(kind, "func", kind))
    for parameter in parameters:
        if parameter not in known:
            raise ValueError(
                f"The loss {name!r} on a {type(student).__name__}: it has no parameter {parameter!r}"
                f"{nearest(parameter, known)}. It has {', '.join(known)}."
            )
    weights = [f"{key}={parameters[key]}" for key in ("gamma", "alpha") if name == "kl" and parameters.get(key)]
    if weights:
        logger.warning(
            "%s weighs the terms of KL, so this is the loss weighted-kl, with 0 for what is not named. Leave it out "
            "for plain KL.",
            " and ".join(weights),
        )
    return known


def _temperature(report: Mapping[str, Any] | None) -> float | None:
    """Return the teacher's temperature that a report suggests, None where 1 will do."""
    if not report or report.get("entropy") is None or not report.get("suggested_temperature"):
        return None
    low, high = SENSIBLE_ENTROPY
    if report.get("temperature", 1.0) != 1.0 or low <= report["entropy"] <= high:
        return None
    logger.info(
        "teacher_temperature=%.3g, from the teacher report: at 1 its softmax has %.0f %% of the largest entropy.",
        report["suggested_temperature"],
        100 * report["entropy"],
    )
    return float(report["suggested_temperature"])
