"""What differs between the four model classes in training: trainer, arguments, learning rate and loss."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from sentence_transformers import (
    CrossEncoder,
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
    MultiVectorEncoder,
    MultiVectorEncoderTrainer,
    MultiVectorEncoderTrainingArguments,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    SparseEncoder,
    SparseEncoderTrainer,
    SparseEncoderTrainingArguments,
)
from sentence_transformers.base.losses import has_static_embedding_input
from sentence_transformers.sparse_encoder.losses import CachedSpladeLoss, SpladeLoss
from torch import nn

from st_wkl import losses as ours
from st_wkl._processes import launched
from st_wkl.losses.cached import StudentLoss
from st_wkl.losses.options import constructor_defaults
from st_wkl.ranges import check_options, nearest

if TYPE_CHECKING:
    from sentence_transformers.base.trainer import BaseTrainer
    from sentence_transformers.base.training_args import BaseTrainingArguments

    from st_wkl.losses.scoring import Student

logger = logging.getLogger(__name__)

# A static student's embeddings are looked up, not computed, so each token moves on its own and needs a step a thousand
# times larger than the shared weights of a transformer.
STATIC_LEARNING_RATE = 0.1
# An adapter starts as zero and has few weights; peft's examples and the papers take about ten times the full rate.
LORA_LEARNING_RATE = 2e-4
# Batches of 32 lists of 16 documents hold 512 texts, whose activations fill 10 GB even of a small transformer.
MINI_BATCH_SIZE = 32
# Below and above these shares of its largest entropy a teacher's softmax over a list says nothing but "the first" or
# "all alike"; the losses then have no order to learn from.
SENSIBLE_ENTROPY = (0.05, 0.9)
# Those of the examples of `SpladeLoss`. Without them a sparse student learns to use its whole vocabulary.
DOCUMENT_REGULARIZER, QUERY_REGULARIZER = 3e-5, 5e-5

LOSSES: dict[str, Callable[..., nn.Module]] = {
    "kl": partial(ours.WeightedKLDistillationLoss, gamma=0.0, alpha=0.0),
    "weighted-kl": ours.WeightedKLDistillationLoss,
    "margin-kl": ours.MarginKL,
    "pair-distill": ours.PairDistillLoss,
    "adaptive-margin": ours.AdaptiveRelevanceMarginLoss,
    "pearson": ours.PearsonDistillLoss,
    "margin-mse": ours.MarginMSEDistillLoss,
    "rank-net": ours.RankNetDistillLoss,
    "regularised-kl": ours.RegularisedKLDistillLoss,
    "list-contrastive": ours.ListContrastiveLoss,
    "in-batch": ours.InBatchContrastiveLoss,
}


@dataclass(frozen=True)
class StudentKind:
    """The parts of sentence-transformers that train one model class.

    Args:
        model: The model class.
        trainer: Its trainer.
        arguments: Its training arguments.
        learning_rate: Where fine-tuning starts by default.
        package: The subpackage that holds its losses.
    """

    model: type
    trainer: type[BaseTrainer]
    arguments: type[BaseTrainingArguments]
    learning_rate: float
    package: str


KINDS = (
    StudentKind(
        SparseEncoder,
        SparseEncoderTrainer,
        SparseEncoderTrainingArguments,
        2e-5,
        "sentence_transformers.sparse_encoder",
    ),
    # Only the projection of a late-interaction model is new, but every token's embedding takes part in the score.
    StudentKind(
        MultiVectorEncoder,
        MultiVectorEncoderTrainer,
        MultiVectorEncoderTrainingArguments,
        1e-5,
        "sentence_transformers.multi_vector_encoder",
    ),
    StudentKind(
        CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments, 2e-5, "sentence_transformers.cross_encoder"
    ),
    StudentKind(
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
        2e-5,
        "sentence_transformers.sentence_transformer",
    ),
)


def kind_of(student: Student) -> StudentKind:
    """Return what trains a student.

    Raises:
        TypeError: If it is none of the four model classes.
    """
    for kind in KINDS:
        if isinstance(student, kind.model):
            return kind
    raise TypeError(
        f"A {type(student).__name__} cannot be trained here: give a SentenceTransformer, SparseEncoder, "
        "MultiVectorEncoder or CrossEncoder, or its Hub id or folder."
    )


def is_static(student: Student) -> bool:
    """Tell whether a student looks its embeddings up."""
    return isinstance(student, SentenceTransformer) and has_static_embedding_input(student)


def default_arguments(
    student: Student, output_dir: str | Path, *, lora: bool = False, **changes: Any
) -> BaseTrainingArguments:
    """Return the arguments that `distill` uses when it is given none.

    Batches of 32 lists for 3 epochs with linear decay after a tenth of warm-up. The learning rate is 0.1 for static
    students, whose embeddings are independent of each other, 1e-5 for late interaction, 2e-5 for other transformers and
    2e-4 for adapters, which start at zero. Ten checkpoints, of which the last is kept (and the best, where something
    tells which is best), so that a killed run loses a tenth of its time.

    Args:
        student: The model to be trained.
        output_dir: Where the trained student goes.
        lora: Whether adapters are trained.
        **changes: Other values, by the names of the arguments.

    Returns:
        Arguments of the student's own class, to use as they are or to change.
    """
    kind = kind_of(student)
    rate = LORA_LEARNING_RATE if lora else STATIC_LEARNING_RATE if is_static(student) else kind.learning_rate
    chosen = {
        "per_device_train_batch_size": 32,
        "num_train_epochs": 3,
        "learning_rate": rate,
        "lr_scheduler_type": "linear",
        # A table needs none: its rows do not disturb each other.
        "warmup_steps": 0 if is_static(student) else 0.1,
        "logging_steps": 0.02,  # a curve of fifty points, however long the run
        "save_strategy": "steps",
        "save_steps": 0.1,
        "save_total_limit": 1,
        "report_to": "none",
        "dataloader_pin_memory": torch.cuda.is_available(),
        # Without it accelerate lets every process of `torchrun` train alone where there is no accelerator.
        "use_cpu": launched() > 1 and not torch.accelerator.is_available(),
    }
    return kind.arguments(output_dir=str(output_dir), **{**chosen, **changes})


def make_loss(
    student: Student,
    name: str | None = None,
    *,
    in_batch: float | None = None,
    mini_batch_size: int | None = None,
    report: Mapping[str, Any] | None = None,
    **parameters: Any,
) -> nn.Module:
    """Make a loss by its name, or the one that the study of this project found best over its collections.

    That is KL with an in-batch contrastive term, which adds more than any choice of the divergence; for students
    without one embedding per text, late interaction and cross-encoders, KL alone. A sparse student's loss is put into
    `SpladeLoss`, with the regularizers of its examples (3e-5 for documents, 5e-5 for queries).

    Args:
        student: The student.
        name: A key of `LOSSES`. Default: `kl`, with the in-batch term.
        in_batch: Weight of an in-batch contrastive term beside it, at the loss's own student temperature; 0 for none.
            Default: 1 if no name is given and the student has one embedding per text, otherwise 0.
        mini_batch_size: Texts that are embedded at once. Default: 32 for transformers, all for static students.
        report: The teacher report in a dataset's provenance. If it says that the teacher's softmax over a list is
            nearly one-hot or nearly flat (less than 5 % or more than 90 % of the largest entropy), the teacher's
            temperature is the one that the report suggests; otherwise 1, which suits a cross-encoder's logits.
        **parameters: Parameters of the loss.

    Raises:
        ValueError: If there is no such loss or parameter, or a parameter is out of range.

    Example:
        >>> make_loss(student, "margin-kl", pairs="all")  # doctest: +SKIP
    """
    check_options(in_batch=in_batch, mini_batch_size=mini_batch_size)
    if in_batch is None:
        in_batch = 1.0 if name is None and isinstance(student, (SentenceTransformer, SparseEncoder)) else 0.0
    name = name or "kl"
    if name not in LOSSES:
        raise ValueError(f"There is no loss {name!r}{nearest(name, LOSSES)}. Those by name: {', '.join(LOSSES)}.")
    _check_parameters(name, student, parameters)
    if mini_batch_size is None and not is_static(student):
        mini_batch_size = MINI_BATCH_SIZE
    sparse = isinstance(student, SparseEncoder)
    try:
        inner = None if sparse or in_batch else mini_batch_size
        defaults = {"teacher_temperature": _temperature(report), "mini_batch_size": inner}
        loss = LOSSES[name](student, **{**_accepted(LOSSES[name], defaults), **parameters})
        if in_batch:
            term = ours.InBatchContrastiveLoss(student, temperature=getattr(loss, "student_temperature", None))  # type: ignore[arg-type]
            size = None if sparse else mini_batch_size
            loss = ours.WeightedSumLoss(student, [(1.0, loss), (in_batch, term)], mini_batch_size=size)
    except TypeError as error:
        raise ValueError(f"The loss {name!r} on a {type(student).__name__}: {error}.") from error
    if not isinstance(student, SparseEncoder):
        return loss
    weights = (DOCUMENT_REGULARIZER, QUERY_REGULARIZER)
    if mini_batch_size is None:
        return SpladeLoss(student, loss, *weights)
    return CachedSpladeLoss(student, loss, *weights, mini_batch_size=mini_batch_size)


def _check_parameters(name: str, student: Student, parameters: Mapping[str, Any]) -> None:
    """Stop at a parameter that a loss does not have, and say where one makes another loss of it."""
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


def _accepted(loss: Callable[..., nn.Module], defaults: dict[str, Any]) -> dict[str, Any]:
    """Return the defaults that are set and that a loss has a parameter for."""
    known = inspect.signature(loss).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    return {name: value for name, value in defaults.items() if value is not None and (takes_all or name in known)}


def _temperature(report: Mapping[str, Any] | None) -> float | None:
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


def takes_lists(loss: nn.Module) -> bool:
    """Tell whether a loss understands what `ListwiseCollator` makes; upstream's losses need columns."""
    if isinstance(loss, ours.WeightedSumLoss):
        return all(takes_lists(term) for term in loss.losses)
    if isinstance(loss, StudentLoss) or hasattr(loss, "loss_from_scores"):
        return True
    inner = getattr(loss, "loss", None)
    return isinstance(inner, nn.Module) and takes_lists(inner)


def check_loss(loss: nn.Module, student: Student) -> None:
    """Stop where a loss would train nothing, or another model class.

    Raises:
        TypeError: If the loss belongs to another model class.
        ValueError: If it was made over another model.
    """
    kind, name = kind_of(student), type(loss).__name__
    for part in loss.modules():
        home = type(part).__module__
        if ".losses" not in home or not home.startswith("sentence_transformers.") or ".base." in home:
            continue
        if not home.startswith(f"{kind.package}."):
            other = home.removeprefix("sentence_transformers.").split(".")[0]
            raise TypeError(
                f"{type(part).__name__} is a loss for a {other}, the student is a {type(student).__name__}. Take one "
                f"from {kind.package}.losses or from st_wkl.losses, which serve all model classes."
            )
    if not any(part is student for part in loss.modules()):
        raise ValueError(
            f"{name} was made over another model than the student, so training would not change the student. Make it "
            "with the student, or give a function: loss=lambda student: …"
        )
    cut = getattr(student, "truncate_dim", None)
    if cut is not None and not any(isinstance(part, StudentLoss) for part in loss.modules()):
        logger.warning(
            "%s trains all dimensions of the student, of which it is used with the first %d (truncate_dim). The losses "
            "of st_wkl train these only; MatryoshkaLoss trains several such cuts.",
            name,
            cut,
        )
    if (most := getattr(student, "max_active_dims", None)) is not None:
        logger.warning(
            "The student is used with its %d largest dimensions (max_active_dims), and trained with all of them.", most
        )
