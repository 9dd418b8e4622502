"""Checkpoints: which run they belong to, which are complete, and what they keep of adapters and of shards."""

from __future__ import annotations

import copy
import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from st_wkl.files import holds_nothing, sync_tree, write_text
from st_wkl.models import is_trusted, load_model
from st_wkl.record import RECORD_FILE, TrainingRecord
from st_wkl.training.identity import dataset_fingerprint as dataset_fingerprint
from st_wkl.training.identity import differences, told
from st_wkl.training.lora import (
    TOLERANCE,
    complete_names,
    difference,
    merged_in_place,
    outputs,
    save,
    unfreeze,
    unusual_options,
)

if TYPE_CHECKING:
    from sentence_transformers.base.trainer import BaseTrainer
    from sentence_transformers.base.training_args import BaseTrainingArguments

    from st_wkl.losses.scoring import Student
    from st_wkl.training.identity import Describer

logger = logging.getLogger(__name__)

IDENTITY_FILE = "run.json"
# Format 1 held thirteen of the training arguments and what a loss shows on its card: runs of different options looked
# alike. What it does not hold cannot be compared.
FORMAT = 2
# The trainer writes these in this order; the last is a JSON file, of which half does not parse.
_FILES = ("optimizer.pt", "scheduler.pt", "trainer_state.json")
_LOSS_FILE = "loss.safetensors"
# Adding an update to a weight rounds, in proportion to what comes out.
_MERGED = 1e-4
# Large beside what a loader that makes weights anew would leave, small beside the weights.
_NOISE = 0.02


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint of the trainer: its folder, and the content of its `trainer_state.json`."""

    folder: Path
    state: dict[str, Any]

    @property
    def finished(self) -> bool:
        """Whether training had come to its end here, by its last step or by early stopping."""
        control = self.state.get("stateful_callbacks", {}).get("TrainerControl", {}).get("args", {})
        return bool(control.get("should_training_stop")) or self.state["global_step"] >= self.state["max_steps"]


class DurableCheckpoints(TrainerCallback):
    """Waits until a checkpoint is on the disk, so that a power cut costs no more than a killed process."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write what the system still holds in memory."""
        if state.is_world_process_zero and (folder := checkpoint_folder(args, state)).is_dir():
            sync_tree(folder)


def checkpoint_folder(args: Any, state: Any, *, resumed: bool = False) -> Path:
    """Return the folder of the checkpoint at a step, or of the one that training goes on from."""
    given = args.resume_from_checkpoint
    if resumed and isinstance(given, str) and Path(given).is_dir():
        return Path(given)
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


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


def finished_record(folder: Path, identity: dict[str, Any]) -> TrainingRecord | None:
    """Return the record of the complete student of this very run, None if there is none yet."""
    if not (folder / RECORD_FILE).is_file():
        return None
    record = TrainingRecord.load(folder)
    if not record.identity:
        raise FileExistsError(
            f"{folder} holds a student of an earlier version of st-wkl, whose record does not tell all that it was "
            "trained with, so whether this is the same run cannot be told. Choose another folder, or delete it if it "
            "may go."
        )
    if found := differences(record.identity, identity):
        raise FileExistsError(
            f"{folder} holds a student that was trained from another student, dataset, loss or arguments "
            f"({told(found)}). Choose another folder, or delete it if it may go."
        )
    return record


def check_folder(folder: Path, work: Path) -> None:
    """Refuse a folder that holds anything but the unfinished run whose checkpoints are in `work`."""
    there = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    # The trainer makes the folder of checkpoints before this package writes whose they are.
    begun = there == [work.name] and holds_nothing(work)
    ours = begun or ((work / IDENTITY_FILE).is_file() and RECORD_FILE not in there)
    if (folder.exists() and not folder.is_dir()) or (there and not ours):
        raise FileExistsError(f"{folder} is not empty. Choose another folder, or delete it if it may go.")


def start_run(folder: Path, identity: dict[str, Any], *, resume: bool) -> Checkpoint | None:
    """Check that a folder of checkpoints is empty or holds the very same run; return where that one stopped."""
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
    args: BaseTrainingArguments, loss: nn.Module, describe: Describer, count: int | None, *, resume: bool
) -> None:
    """Stop, or say so, where a run that is killed could not go on as if it had not been."""
    reasons = []
    if args.save_only_model and args.save_strategy != "no":
        reasons.append("save_only_model=True keeps no optimizer in the checkpoints: leave it away")
    if args.world_size > 1 and (own := own_weights(loss, describe.student)):
        raise ValueError(
            f"{type(loss).__name__} has weights of its own ({next(iter(own))}), of which each of the {args.world_size} "
            "processes would train another copy. Train it in one process, or without a learned projection."
        )
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
    if resume and count is None:
        logger.warning(
            "The rows of an IterableDataset pass once, so whether they are the same as before is not checked."
        )


def write_identity(folder: Path, identity: dict[str, Any]) -> None:
    """Say which run a folder of checkpoints belongs to."""
    write_text(folder / IDENTITY_FILE, json.dumps({"format": FORMAT, **identity}, indent=2) + "\n")


def train(trainer: BaseTrainer, checkpoint: Checkpoint | None) -> list[dict[str, Any]]:
    """Train, or do what is left of it, and return the log."""
    if checkpoint is None:
        trainer.train()
    elif checkpoint.finished:
        # The trainer would take one more step after the last one, so only the weights are taken.
        best = checkpoint.state.get("best_model_checkpoint") if trainer.args.load_best_model_at_end else None
        source = checkpoint.folder if best is None else checkpoint.folder.with_name(Path(best).name)
        logger.info("Training was complete at step %d.", checkpoint.state["global_step"])
        trainer._load_from_checkpoint(str(source))
        return list(checkpoint.state["log_history"])
    else:
        logger.info("Going on at step %d of %d.", checkpoint.state["global_step"], checkpoint.state["max_steps"])
        trainer.train(resume_from_checkpoint=str(checkpoint.folder))
    return list(trainer.state.log_history)


def check_sharded(args: BaseTrainingArguments, loss: nn.Module, *, resuming: bool) -> None:
    """Stop where training with FSDP would hang, or lose what it is asked to keep.

    Seen with sentence-transformers 6.2, transformers 5.23, accelerate 1.15 and torch 2.13.
    """
    if any(getattr(part, "mini_batch_size", None) is not None for part in loss.modules()):
        raise ValueError(
            "With FSDP every forward pass is one of all processes together, and their batches do not make the same "
            "number of mini-batches: they would wait for each other for ever. Give a loss without mini_batch_size, "
            "such as loss=lambda student: WeightedKLDistillationLoss(student), and smaller batches."
        )
    if args.load_best_model_at_end:
        raise ValueError(
            "With FSDP the trainer of sentence-transformers cannot load the best checkpoint; it goes on with the last "
            "one. Set eval_strategy and leave load_best_model_at_end=False, or leave `evaluator` away."
        )
    if resuming:
        raise ValueError(
            "The trainer of sentence-transformers cannot go on from a checkpoint that was written with FSDP. Delete "
            "the unfinished run, or give another folder, and train from the start."
        )


class WholeCopy:
    """A copy of a student that stays whole while the trainer shards the original (FSDP2), to be saved in its place.

    Sharded tensors have no storage that safetensors could write, and the trainer of sentence-transformers leaves the
    gathered weights aside that transformers hands to it. So the first process keeps a copy in memory.
    """

    def __init__(self, trainer: BaseTrainer, *, main: bool) -> None:
        self.trainer = trainer
        self.student: Any = copy.deepcopy(trainer.model).cpu() if main else None
        trainer._save = self._save  # type: ignore[method-assign]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save a checkpoint; transformers calls this in all processes, with the gathered weights."""
        if self.student is not None:
            self.student.load_state_dict(state_dict)
            save(self.student, output_dir or str(self.trainer.args.output_dir))

    def gathered(self, dtype: torch.dtype | None = None) -> Student | None:
        """Return the trained student in the process that writes, rounded to a number type; all have to ask."""
        state = self.trainer.accelerator.get_state_dict(self.trainer.model)
        if self.student is not None:
            self.student.load_state_dict(state)
            self.student.to(dtype)
        return self.student


def own_weights(loss: nn.Module, student: nn.Module | None) -> dict[str, Any]:
    """Return the weights of a loss that are trained and are none of the student's."""
    trained = set() if student is None else {id(weight) for weight in student.parameters()}
    return {name: w for name, w in loss.named_parameters() if w.requires_grad and id(w) not in trained}


def keep_own_weights(trainer: BaseTrainer, loss: nn.Module) -> None:
    """Let a trainer's checkpoints hold the weights of its loss, too, and give them back."""
    own = own_weights(loss, trainer.model)
    if not own:
        return
    save_checkpoint, load_checkpoint = trainer._save, trainer._load_from_checkpoint

    def _save(output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        save_checkpoint(output_dir, state_dict)
        kept = {name: weight.detach().cpu().contiguous() for name, weight in own.items()}
        save_file(kept, Path(output_dir or str(trainer.args.output_dir)) / _LOSS_FILE)

    def _load_from_checkpoint(checkpoint_path: str) -> None:
        load_checkpoint(checkpoint_path)
        for name, weight in load_file(Path(checkpoint_path) / _LOSS_FILE).items():
            own[name].data.copy_(weight)

    trainer._save = _save  # type: ignore[method-assign]
    trainer._load_from_checkpoint = _load_from_checkpoint  # type: ignore[method-assign]


def keep_exactly(trainer: BaseTrainer, *, trust_remote_code: bool = False) -> None:
    """Let a trainer's checkpoints hold all of an adapter, and give it back in the number type that it is trained in."""
    save_checkpoint = trainer._save

    def _save(output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        save_checkpoint(output_dir, state_dict)
        complete_names(Path(output_dir or str(trainer.args.output_dir)))

    def _load_from_checkpoint(checkpoint_path: str) -> None:
        model: Any = getattr(trainer.model, "_orig_mod", trainer.model)
        # By its default, an adapter is rounded to the number type that its base model is stored in.
        model.load_state_dict(_reloaded(model, checkpoint_path, trust_remote_code).state_dict())

    trainer._save = _save  # type: ignore[method-assign]
    trainer._load_from_checkpoint = _load_from_checkpoint  # type: ignore[method-assign]


def _reloaded(student: Any, folder: str | Path, trust_remote_code: bool) -> Any:
    trusted = is_trusted(student, trust_remote_code)
    return load_model(Path(folder), trust_remote_code=trusted, dtype=student.dtype)[0]


def rehearse(student: Student, *, trust_remote_code: bool = False) -> None:
    """Save, load, unfreeze and merge a student with an adapter that is no longer as it started.

    peft has dozens of variants, of which some lose weights on the way: whether those that are asked for do is tried.
    The student stays as it is, and so do the random numbers.
    """
    devices = [student.device.index or 0] if student.device.type == "cuda" else []
    with torch.random.fork_rng(devices), _changed(student), tempfile.TemporaryDirectory() as folder:
        try:
            save(student, folder)
        except RuntimeError as error:  # two options that own one weight
            lost: str | None = f"the adapter cannot be saved ({str(error).splitlines()[0]})"
        else:
            lost = _lost(student, _reloaded(student, folder, trust_remote_code))
    if lost is None:
        return
    if options := unusual_options(student):
        raise ValueError(
            f"With {options} in the LoraConfig, {lost}, with this model and the installed versions of peft and "
            "transformers. Leave the option away; nothing was trained."
        )
    raise RuntimeError(
        f"{lost}. An adapter carries no weights of its base model that were new or were changed when it was put on, as "
        "the pooler of a fresh cross-encoder. Save the base model first and train on from its folder, or train without "
        "lora."
    )


def _lost(student: Any, loaded: Any) -> str | None:
    """Say what does not come back, None if all does."""
    weights = _trained(student)
    unfreeze(loaded)
    again = _trained(loaded)
    if again.keys() != weights.keys():
        name = sorted(again.keys() ^ weights.keys())[0]
        return f"a saved adapter could not be trained further: {name} would be frozen, or wrongly trained"
    for name, weight in weights.items():
        if not torch.allclose(weight, again[name], rtol=0, atol=TOLERANCE):
            return f"the trained weights {name} do not come back from the adapter's folder"
    if difference(outputs(student), outputs(loaded)) > TOLERANCE:
        return "a student that is loaded from its folder is another one"
    loaded.float()
    before, tokens = outputs(loaded), _tokens(loaded)
    try:
        merged = merged_in_place(loaded)
        merged.transformers_model.tie_weights()  # as loading does
    except (NotImplementedError, ValueError) as error:
        return f"the adapter cannot be merged ({error})"
    allowed = _MERGED * max(1.0, *(float(abs(value).max()) for value in before))
    same = difference(before, outputs(merged)) <= allowed and torch.allclose(tokens, _tokens(merged), atol=1e-5)
    return None if same else "a merged student is another one"


def _trained(student: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach() for name, weight in student.named_parameters() if weight.requires_grad}


def _tokens(student: Any) -> Tensor:
    """Return the table of embeddings of tokens, as a text would be given them; few tokens stand in the samples."""
    table = student.transformers_model.get_input_embeddings()
    with torch.no_grad():
        return torch.as_tensor(table(torch.arange(table.weight.shape[0], device=student.device)))


@contextmanager
def _changed(student: Student) -> Iterator[None]:
    """Change the weights that are trained, and bring them back."""
    kept = {name: weight.clone() for name, weight in _trained(student).items()}
    with torch.no_grad():
        for weight in _trained(student).values():
            weight.add_(torch.randn_like(weight), alpha=_NOISE)
    try:
        yield
    finally:
        for name, weight in _trained(student).items():
            weight.copy_(kept[name])
