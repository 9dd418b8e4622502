"""From a student and a distillation dataset to a trained student and the record of how it was made."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.losses.gradcache import has_static_embedding_input
from torch import nn

from st_wkl.cards.model_card import write_model_card
from st_wkl.evaluation.results import package_versions
from st_wkl.losses import WeightedKLDistillationLoss
from st_wkl.training.record import TrainingRecord

if TYPE_CHECKING:
    from st_wkl.data.dataset import DistillationDataset

logger = logging.getLogger(__name__)

# A static student's embeddings are looked up, not computed, so each token moves on its own and needs a step a thousand
# times larger than the shared weights of a transformer.
STATIC_LEARNING_RATE = 3e-2
TRANSFORMER_LEARNING_RATE = 2e-5


def default_arguments(student: SentenceTransformer, output_dir: str | Path) -> SentenceTransformerTrainingArguments:
    """Return the arguments that `distill` uses when it is given none.

    Batches of 32 lists for 3 epochs with linear decay. The learning rate is 3e-2 for static students, whose
    embeddings are independent of each other, and 2e-5 for transformers. No checkpoints in between: a run that needs
    them deserves arguments of its own.

    Args:
        student: The model to be trained.
        output_dir: Where the trained student goes.

    Returns:
        Arguments to use as they are or to change.
    """
    return SentenceTransformerTrainingArguments(
        output_dir=str(output_dir),
        per_device_train_batch_size=32,
        num_train_epochs=3,
        learning_rate=STATIC_LEARNING_RATE if has_static_embedding_input(student) else TRANSFORMER_LEARNING_RATE,
        lr_scheduler_type="linear",
        logging_steps=50,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def distill(
    student: str | Path | SentenceTransformer,
    dataset: DistillationDataset,
    loss: nn.Module | Callable[[SentenceTransformer], nn.Module] | None = None,
    args: SentenceTransformerTrainingArguments | None = None,
    *,
    output_dir: str | Path,
    base_name: str | None = None,
) -> SentenceTransformer:
    """Train a student on a distillation dataset with the stock trainer, and save it with the record of its making.

    Args:
        student: The student, or its Hub id or folder.
        dataset: What `DistillationDatasetBuilder.build` returned.
        loss: A loss over the student, or a function that makes one from it. Default: `WeightedKLDistillationLoss`.
        args: Training arguments. Default: `default_arguments`.
        output_dir: Folder for the trained student: weights, card and `distillation.json`. Must not hold a model yet.
        base_name: What the record calls the model that training started from. Default: its Hub id or folder name.

    Returns:
        The trained student. Its card gains a results table from `st_wkl.cards.model_card.write_model_card`.

    Raises:
        FileExistsError: If `output_dir` holds something already.
        ValueError: If the dataset has no row that fits the columns, or holds unusable scores.

    Example:
        >>> from st_wkl import DistillationDatasetBuilder, distill
        >>> builder = DistillationDatasetBuilder("mteb/nfcorpus", "cross-encoder/ms-marco-MiniLM-L12-v2")  # doctest: +SKIP
        >>> distill("minishlab/potion-base-8M", builder.build(), output_dir="my-student")  # doctest: +SKIP
    """  # noqa: E501
    output_dir = Path(output_dir)
    if output_dir.exists() and any(output_dir.iterdir()):
        raise FileExistsError(f"{output_dir} is not empty. Choose another folder, or delete it if it may go.")
    if isinstance(student, SentenceTransformer):
        base_name = base_name or student.model_card_data.base_model or type(student).__name__
    else:
        base_name = base_name or (Path(student).name if Path(student).exists() else str(student))
        student = SentenceTransformer(str(student))
    columns = dataset.to_columns()
    if loss is None:
        loss = WeightedKLDistillationLoss(student)
    elif not isinstance(loss, nn.Module):
        loss = loss(student)
    args = args or default_arguments(student, output_dir)

    start = time.perf_counter()
    trainer = SentenceTransformerTrainer(model=student, args=args, train_dataset=columns, loss=loss)
    trainer.train()
    record = TrainingRecord(
        student=base_name,
        loss=type(loss).__name__,
        loss_config=_config(loss),
        loss_citation=str(getattr(loss, "citation", "")),
        teacher=dataset.provenance.get("teacher", {}),
        dataset={**dataset.provenance, "rows_trained": len(columns)},
        arguments=_arguments_that_matter(args),
        seconds=round(time.perf_counter() - start, 1),
        versions=package_versions(("sentence-transformers", "transformers", "torch", "peft")),
    )
    student.save_pretrained(str(output_dir))
    write_model_card(output_dir, record=record, results={})
    record.save(output_dir)
    return student


def _config(loss: nn.Module) -> dict[str, Any]:
    describe: Callable[[], dict[str, Any]] | None = getattr(loss, "get_config_dict", None)  # type: ignore[assignment]
    return {} if describe is None else describe()


def _arguments_that_matter(args: SentenceTransformerTrainingArguments) -> dict[str, Any]:
    names = (
        "num_train_epochs",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "learning_rate",
        "lr_scheduler_type",
        "warmup_steps",
        "weight_decay",
        "seed",
        "bf16",
        "fp16",
    )
    values = {name: getattr(args, name) for name in names}
    return {name: getattr(value, "value", value) for name, value in values.items()}
