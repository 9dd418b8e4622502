"""What differs between the four model classes in training: trainer, arguments, learning rate, number type."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import safe_open
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
from sentence_transformers.util import load_file_path
from torch import nn

from st_wkl._processes import launched
from st_wkl.losses.cached import StudentLoss
from st_wkl.losses.make import is_static
from st_wkl.losses.weighted_sum import WeightedSumLoss

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
# Of 8 and 11 significant bits: an update of less than a thousandth of a weight is rounded away.
HALF = (torch.bfloat16, torch.float16)
_SAVED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class StudentKind(NamedTuple):
    """The parts of sentence-transformers that train one model class, and where fine-tuning starts by default."""

    model: type
    trainer: type[BaseTrainer]
    arguments: type[BaseTrainingArguments]
    learning_rate: float


KINDS = (
    StudentKind(SparseEncoder, SparseEncoderTrainer, SparseEncoderTrainingArguments, 2e-5),
    # Only the projection of a late-interaction model is new, but every token's embedding takes part in the score.
    StudentKind(MultiVectorEncoder, MultiVectorEncoderTrainer, MultiVectorEncoderTrainingArguments, 1e-5),
    StudentKind(CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments, 2e-5),
    StudentKind(SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments, 2e-5),
)


def kind_of(student: Student) -> StudentKind:
    """Return what trains a student."""
    for kind in KINDS:
        if isinstance(student, kind.model):
            return kind
    raise TypeError(
        f"A {type(student).__name__} cannot be trained here: give a SentenceTransformer, SparseEncoder, "
        "MultiVectorEncoder or CrossEncoder, or its Hub id or folder."
    )


def default_arguments(
    student: Student, output_dir: str | Path, *, lora: bool = False, **changes: Any
) -> BaseTrainingArguments:
    """Return the arguments that `distill` uses when it is given none, of the student's own class.

    Batches of 32 lists for 3 epochs with linear decay after a tenth of warm-up. The learning rate is 0.1 for static
    students, whose embeddings are independent of each other, 1e-5 for late interaction, 2e-5 for other transformers and
    2e-4 for adapters, which start at zero. Ten checkpoints, of which the last is kept (and the best, where something
    tells which is best), so that a killed run loses a tenth of its time.

    Args:
        student: The model to be trained.
        output_dir: Where the trained student goes.
        lora: Whether adapters are trained.
        **changes: Other values, by the names of the arguments.
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


def own_arguments(
    args: BaseTrainingArguments | None, student: Student, output_dir: Path, *, lora: bool
) -> BaseTrainingArguments:
    """Return the arguments to train with, a copy of those that are given: the user's stay as they are."""
    expected = kind_of(student).arguments
    if args is not None and not isinstance(args, expected):
        raise TypeError(
            f"args is a {type(args).__name__}, but a {type(student).__name__} is trained with {expected.__name__}."
        )
    args = copy.copy(args) if args is not None else default_arguments(student, output_dir, lora=lora)
    stock = next(entry.default for entry in dataclasses.fields(args) if entry.name == "learning_rate")
    if is_static(student) and args.learning_rate == stock:
        args.learning_rate = STATIC_LEARNING_RATE
        logger.warning(
            "learning_rate stands at the trainer's own default of %g, at which a static student does not move: it is "
            "trained with %g. default_arguments(student, output_dir) has all that suits it.",
            stock,
            STATIC_LEARNING_RATE,
        )
    if launched() > 1 and args.world_size == 1:
        raise ValueError(
            f"There are {launched()} processes, and by these arguments each would train alone and write the same "
            "folder. Without a GPU, set use_cpu=True in args."
        )
    return args


def named_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Return one of the number types that weights are saved in."""
    found = _SAVED.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if found is None or found not in _SAVED.values():
        raise ValueError(f"There is no number type {dtype!r} to save weights in; those are {', '.join(_SAVED)}.")
    return found


def name_of(dtype: torch.dtype | None) -> str:
    """Return how a record names a number type."""
    return str(dtype).removeprefix("torch.")


def to_master(student: Student) -> torch.dtype | None:
    """Turn weights in half precision into float32, in place, and return the type that they had.

    A folder that was saved in bfloat16 or float16 is loaded so unless somebody says otherwise, and a step of training
    is smaller than what such a number can hold. The values stay as they are. A student that its owner has cast, so that
    it is of another type than what its folder holds, is trained as it was given.
    """
    weights = [weight for weight in student.parameters() if weight.is_floating_point()]
    half = {weight.dtype for weight in weights} & {*HALF}
    if not half:
        return weights[0].dtype if weights else None
    given = min(half, key=str)
    config = getattr(student, "config", None)
    loaded, stored = getattr(config, "dtype", None), _stored_dtype(getattr(config, "name_or_path", None))
    if (isinstance(loaded, torch.dtype) and loaded is not given) or stored not in (None, given):
        logger.warning(
            "The student was cast to %s and is trained in it: updates that are small beside their weights are rounded "
            "away. Leave it in float32 and set bf16=True in args for speed.",
            name_of(given),
        )
        return given
    for tensor in (*student.parameters(), *student.buffers()):
        if tensor.dtype in HALF:
            tensor.data = tensor.data.float()
    logger.info(
        "The student's weights are %s; they are trained, and saved unless save_dtype says otherwise, in float32. For "
        "speed, set bf16=True in args.",
        name_of(given),
    )
    return given


def _stored_dtype(source: str | None) -> torch.dtype | None:
    """Return the number type that transformers loads a folder or Hub id in by default, None if that is not known."""
    if not source:
        return None

    def read(file: str) -> Any:
        path = load_file_path(source, file)
        return json.loads(Path(path).read_text(encoding="utf-8")) if path else None

    try:
        folder = (read("modules.json") or [{"path": ""}])[0]["path"]
        prefix = f"{folder}/" if folder else ""
        config = read(f"{prefix}config.json") or {}
        if named := config.get("dtype") or config.get("torch_dtype"):
            return getattr(torch, name_of(named), None)
        if (weights := load_file_path(source, f"{prefix}model.safetensors")) is None:
            return None
    except (OSError, ValueError, LookupError):
        return None
    with safe_open(weights, framework="pt") as file:  # the header alone
        dtypes = (file.get_slice(name)[:0].dtype for name in file.keys())  # noqa: SIM118 - no mapping
        return next((dtype for dtype in dtypes if dtype.is_floating_point), None)


def takes_lists(loss: nn.Module) -> bool:
    """Tell whether a loss understands what `ListwiseCollator` makes; upstream's losses need columns."""
    if isinstance(loss, WeightedSumLoss):
        return all(takes_lists(term) for term in loss.losses)
    if isinstance(loss, StudentLoss) or hasattr(loss, "loss_from_scores"):
        return True
    inner = getattr(loss, "loss", None)
    return isinstance(inner, nn.Module) and takes_lists(inner)


def check_loss(loss: nn.Module, student: Student) -> None:
    """Stop where a loss would train nothing, or another model class."""
    package, name = kind_of(student).model.__module__.rpartition(".")[0], type(loss).__name__
    for part in loss.modules():
        home = type(part).__module__
        if ".losses" not in home or not home.startswith("sentence_transformers.") or ".base." in home:
            continue
        if not home.startswith(f"{package}."):
            other = home.removeprefix("sentence_transformers.").split(".")[0]
            raise TypeError(
                f"{type(part).__name__} is a loss for a {other}, the student is a {type(student).__name__}. Take one "
                f"from {package}.losses or from st_wkl.losses, which serve all model classes."
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
