"""Which run a folder of checkpoints belongs to, and which of them a killed run left complete."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from st_wkl.files import holds_nothing, sync_tree, write_text
from st_wkl.training.describe import differences, told

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from sentence_transformers.base.training_args import BaseTrainingArguments
    from torch import nn
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from st_wkl.data.dataset import DistillationDataset
    from st_wkl.training.describe import Describer

logger = logging.getLogger(__name__)

IDENTITY_FILE = "run.json"
# Format 1 held thirteen of the training arguments and what a loss shows on its card: runs of different options looked
# alike. What it does not hold cannot be compared.
FORMAT = 2
# The trainer writes these in this order; the last is a JSON file, of which half does not parse.
_FILES = ("optimizer.pt", "scheduler.pt", "trainer_state.json")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint of the trainer.

    Args:
        folder: Where it is.
        state: Its `trainer_state.json`.
    """

    folder: Path
    state: dict[str, Any]

    @property
    def finished(self) -> bool:
        """Whether training had come to its end here, by its last step or by early stopping."""
        control = self.state.get("stateful_callbacks", {}).get("TrainerControl", {}).get("args", {})
        return bool(control.get("should_training_stop")) or self.state["global_step"] >= self.state["max_steps"]


class DurableCheckpoints(TrainerCallback):
    """Waits until a checkpoint is on the disk, so that a power cut costs no more than a killed process."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write what the system still holds in memory."""
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            sync_tree(folder)


def last_checkpoint(folder: Path) -> Checkpoint | None:
    """Return the newest complete checkpoint of a folder, None if there is none."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for path in found:
        try:
            state = json.loads((path / _FILES[-1]).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            logger.info("%s is incomplete, since the run was killed while it was written; it is not used.", path.name)
            continue
        # FSDP and DeepSpeed write folders of shards in place of the optimizer's file.
        if (path / _FILES[0]).is_file() or any(child.is_dir() and "optim" in child.name for child in path.iterdir()):
            return Checkpoint(path, state)
    return None


def start_run(folder: Path, identity: dict[str, Any], *, resume: bool) -> Checkpoint | None:
    """Check that a folder of checkpoints is empty or holds the very same run, and return where that run stopped.

    Args:
        folder: Where checkpoints go. Nothing is written.
        identity: What decides the outcome of training, in JSON values.
        resume: Whether going on is wanted.

    Raises:
        FileExistsError: If the folder holds something that is no run, or a run that nobody asked to resume.
        ValueError: If the run there is of another student, dataset, loss or arguments; the message says of which.
    """
    if holds_nothing(folder):
        return None
    path = folder / IDENTITY_FILE
    if not path.is_file():
        raise FileExistsError(f"{folder} holds something other than checkpoints of this package. Give another folder.")
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}). Delete {folder} and train again.") from error
    if not resume:
        raise FileExistsError(
            f"{folder} holds the checkpoints of a run that was stopped. Go on with resume=True, give another folder, "
            "or delete it if it may go."
        )
    if there.pop("format", None) != FORMAT:
        raise ValueError(
            f"{path} was written by another version of st-wkl, which wrote down other things, so whether these are the "
            f"checkpoints of this run cannot be told. Finish it with that version, give another folder, or delete "
            f"{folder} if it may go."
        )
    if found := differences(there, identity):
        raise ValueError(
            f"The checkpoints in {folder} are those of another run ({told(found)}). Give another folder, or delete it "
            "if it may go."
        )
    checkpoint = last_checkpoint(folder)
    if checkpoint is None:
        logger.warning("%s holds no complete checkpoint: training starts again at its first step.", folder)
    return checkpoint


def check_resumable(
    args: BaseTrainingArguments, loss: nn.Module, describe: Describer, dataset: Any, *, resume: bool
) -> None:
    """Stop, or say so, where a run that is killed could not go on as if it had not been.

    Raises:
        ValueError: If resuming is asked for and cannot work.
    """
    trained = set() if describe.student is None else {id(weight) for weight in describe.student.parameters()}
    own = [name for name, weight in loss.named_parameters() if weight.requires_grad and id(weight) not in trained]
    reasons = []
    if args.save_only_model and args.save_strategy != "no":
        reasons.append("save_only_model=True keeps no optimizer in the checkpoints: leave it away")
    if own:
        reasons.append(f"checkpoints do not hold the loss's own weights, {own[0]!r} and others: freeze them")
    if describe.unknown:
        reasons.append(
            f"{describe.unknown[0]} is an object that cannot be told from another of its kind: give one with a state "
            "in plain attributes, or a function"
        )
    if reasons and resume:
        raise ValueError(f"This run cannot be resumed, since {'; '.join(reasons)}, or leave resume away.")
    if reasons:
        logger.warning("If this run is stopped, it cannot be resumed, since %s.", "; ".join(reasons))
    if args.save_strategy == "no":
        logger.log(
            logging.WARNING if resume else logging.INFO,
            "No checkpoints are kept (save_strategy='no'): if this run is stopped, it starts again at its first step.",
        )
    if resume and not hasattr(dataset, "__len__") and not hasattr(dataset, "train"):
        logger.warning(
            "The rows of an IterableDataset pass once, so whether they are the same as before is not checked."
        )


def write_identity(folder: Path, identity: dict[str, Any]) -> None:
    """Say which run a folder of checkpoints belongs to."""
    write_text(folder / IDENTITY_FILE, json.dumps({"format": FORMAT, **identity}, indent=2) + "\n")


def remove(folder: Path) -> None:
    """Delete the checkpoints of a run that is complete."""
    shutil.rmtree(folder, ignore_errors=True)


def dataset_fingerprint(dataset: DistillationDataset | Dataset | IterableDataset) -> str:
    """Return a hash of all rows in their order; of an iterable dataset's columns only, as its rows pass once.

    Rows that a transform makes as they are asked for are hashed as they are at this moment.
    """
    digest = hashlib.blake2b(digest_size=16)
    # The tables of a distillation dataset hold each document once, its lists many times.
    tables: list[Any] = (
        [dataset] if hasattr(dataset, "column_names") else [dataset.train, dataset.queries, dataset.documents]
    )
    for table in tables:
        digest.update(repr(sorted(table.column_names or [])).encode())
        if hasattr(table, "with_format") and hasattr(table, "__len__"):
            rows = table if table.format["type"] == "custom" else table.with_format(None)
            for batch in rows.iter(batch_size=1000):
                digest.update(json.dumps(batch, sort_keys=True, default=repr).encode())
    return digest.hexdigest()
