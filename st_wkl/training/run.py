"""One training run: its parts fit together, it goes on where it was stopped, and ends with the record of its making."""

from __future__ import annotations

import logging
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from sentence_transformers.base.evaluation import BaseEvaluator
from sentence_transformers.util import get_rank
from torch import nn
from transformers import PrinterCallback

import st_wkl.training.checkpoints as checkpoints
import st_wkl.training.dev as dev
from st_wkl._processes import is_first
from st_wkl._versions import package_versions
from st_wkl.files import content_hash, sync_tree
from st_wkl.losses.embedding import save_projections
from st_wkl.model_checks import check_student
from st_wkl.models import check_reloads, hash_weights, load_model, prompts_of
from st_wkl.publish.model_card import headed, write_model_card
from st_wkl.record import RECORD_FILE, Exposure, TrainingRecord
from st_wkl.training.data import TrainingData, try_loss, whole_batches
from st_wkl.training.guard import (
    FiniteWeightsCallback,
    ProgressLine,
    check_loss_values,
    check_weights,
    say_few_steps,
    say_unchanged,
    watch,
)
from st_wkl.training.identity import Describer, run_identity, told_arguments, told_losses
from st_wkl.training.lora import check_config, has_adapter, prepare, save
from st_wkl.training.mixture import data_of, of_dataset, parts_of
from st_wkl.training.students import check_loss, kind_of, name_of, named_dtype

if TYPE_CHECKING:
    from peft import LoraConfig
    from sentence_transformers.base.trainer import BaseTrainer
    from sentence_transformers.base.training_args import BaseTrainingArguments
    from transformers import TrainerCallback

    from st_wkl.losses.scoring import Student

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True, repr=False)
class Distilled:
    """What `distill` returns.

    Args:
        student: The trained student, as it is saved in `folder`.
        results: `seconds` of training; its mean `train_loss`, unless the run was stopped after its last step; with a
            dev split `dev_before` and `dev_after`, its main metric.
        record: How it was made.
        folder: Weights, card, `distillation.json` and hashes of the training texts.
        history: The trainer's log, for a table or a picture: `pandas.DataFrame(made.history).plot("step", "loss")`.
            Empty where the student was complete already.
    """

    student: Student
    results: dict[str, float]
    record: TrainingRecord
    folder: Path
    history: list[dict[str, Any]] = field(default_factory=list)

    def __repr__(self) -> str:
        dev = " → ".join(f"{value:.4f}" for value in self.record.dev.values())
        return f"Distilled in {self.folder}\n{self.record!r}" + (f"\ndev split: {dev}" if dev else "")


@dataclass
class Run:
    """What a run was given, each part checked for itself; nothing is written yet."""

    student: Student
    name: str
    licence: str
    precision: dict[str, str]
    trusted: bool
    lora: bool | LoraConfig
    rounded: torch.dtype | None
    folder: Path
    args: BaseTrainingArguments
    evaluator: BaseEvaluator | None
    callbacks: list[TrainerCallback]
    dataset: Any  # or several by their names
    loss: nn.Module | dict[str, nn.Module]  # or one for each of them
    draws: dict[str, Any]
    freeze_documents: bool = False

    @property
    def losses(self) -> dict[str, nn.Module]:
        """The losses by the names of datasets, the one of all without."""
        return {"": self.loss} if isinstance(self.loss, nn.Module) else self.loss

    @property
    def whole_loss(self) -> nn.Module:
        """A module that all losses are part of."""
        return self.loss if isinstance(self.loss, nn.Module) else nn.ModuleList(self.loss.values())

    @property
    def work(self) -> Path:
        """Where checkpoints go."""
        return self.folder / CHECKPOINTS

    def prepare(self, *, resume: bool) -> tuple[dict[str, Any], TrainingData]:
        """Check what has to fit together; return the run's identity and its rows."""
        args, student = self.args, self.student
        check_student(student)
        if self.lora and not has_adapter(student):
            check_config(student, self.lora)
        for name, loss in self.losses.items():
            with of_dataset(name):
                check_loss(loss, student)
        if isinstance(self.dataset, dict) and any(hasattr(one, "train_dataset") for one in self.callbacks):
            raise ValueError(
                "Lists are refreshed where there is one dataset; train with several without that callback."
            )
        data = data_of(self.dataset, self.loss, student, args, self.draws)
        say_few_steps(args, data.count)
        if data.count is None:
            args.accelerator_config = whole_batches(args)
        if self.evaluator is not None:
            dev.set_up(args, self.evaluator, student)
            dev.say_seen(self.evaluator, *parts_of(self.dataset).values())
        args.output_dir = str(self.work)
        args.restore_callback_states_from_checkpoint = True  # a resumed run has to be as patient as it was
        describe = Describer(student)
        identity = run_identity(self, data, describe)
        if not (resume and (self.folder / RECORD_FILE).is_file()):
            checkpoints.check_resumable(args, self.whole_loss, describe, data.count, resume=resume)
        return identity, data

    def finished(self, identity: dict[str, Any]) -> Distilled | None:
        """Return the complete student of this very run, None if there is none yet."""
        if (record := checkpoints.finished_record(self.folder, identity)) is None:
            return None
        if is_first():
            shutil.rmtree(self.work, ignore_errors=True)  # of a process that was killed while it did
        # An adapter would be rounded to what its base model is stored in.
        dtype = named_dtype(record.precision["saved"]) if record.precision else None
        student: Any = load_model(self.folder, trust_remote_code=self.trusted, dtype=dtype)[0]
        return Distilled(student, _results([], record), record, self.folder)

    def train(self, identity: dict[str, Any], data: TrainingData, *, resume: bool) -> Distilled:
        """Train, or do what is left of it, and save."""
        checkpoints.check_folder(self.folder, self.work)
        if is_first():
            check_reloads(self.student, self.trusted)
        checkpoint = checkpoints.start_run(self.work, identity, resume=resume)
        _wait()  # the trainer of a quicker process would make the folder that this one has yet to look at
        start = time.perf_counter()
        transformers.set_seed(self.args.seed)  # an adapter starts at random
        adapter = self._adapt()
        trainer = self._trainer(data, checkpoint)
        _wait()  # every process has looked before one of them writes
        if get_rank() == 0:
            checkpoints.write_identity(self.work, identity)
        if adapter:
            checkpoints.keep_exactly(trainer, trust_remote_code=self.trusted)
        checkpoints.keep_own_weights(trainer, self.whole_loss)
        student, history, scores = self._fit(trainer, checkpoint)
        record = TrainingRecord(
            student=self.name,
            **told_losses(self.loss),
            teacher=data.provenance.get("teacher", {}),
            dataset={**data.provenance, **({} if data.count is None else {"rows_trained": data.count})},
            arguments={
                **told_arguments(self.args, identity),
                **self.draws,
                **({"freeze_documents": True} if self.freeze_documents else {}),
            },
            seconds=round(time.perf_counter() - start, 1),
            versions=package_versions(("sentence-transformers", "transformers", "torch", "peft")),
            lora=adapter,
            dev=scores,
            student_license=self.licence,
            prompts=prompts_of(student),
            run=content_hash(identity, size=16),
            identity=identity,
            precision={**self.precision, "saved": name_of(student.dtype)},
        )
        if get_rank() == 0:
            self._save(student, record)
            shutil.rmtree(self.work, ignore_errors=True)
        _wait()
        return Distilled(student, _results(history, record), record, self.folder, history)

    def _adapt(self) -> dict[str, Any]:
        """Put an adapter on, if there is to be one, and try whether it can be kept."""
        if not self.lora and not has_adapter(self.student):
            return {}
        adapter = prepare(self.student, self.lora or True)
        if is_first():  # the others have the same adapter, and transformers lets one process save
            checkpoints.rehearse(self.student, trust_remote_code=self.trusted)
        return adapter

    def _trainer(self, data: TrainingData, checkpoint: checkpoints.Checkpoint | None) -> BaseTrainer:
        """Return a trainer, and find what only the trainer knows before it starts."""
        args = self.args
        args.prompts = data.prompts  # those of lists are their collator's
        args.router_mapping = args.router_mapping or data.routes
        trainer = kind_of(self.student).trainer(
            model=self.student,
            args=args,
            train_dataset=data.rows,
            loss=self.loss,
            data_collator=data.collator,
            evaluator=self.evaluator,
            callbacks=[*self.callbacks, *data.callbacks] or None,
        )
        if any(isinstance(one, ProgressLine) for one in self.callbacks):
            trainer.remove_callback(PrinterCallback)
        try:
            if trainer.is_fsdp_enabled:
                checkpoints.check_sharded(args, self.whole_loss, resuming=checkpoint is not None)
            elif args.fsdp:
                logger.warning("accelerate leaves FSDP out on this device: every process holds the whole student.")
            for name, rows in parts_of(data.rows).items():
                with of_dataset(name):
                    try_loss(trainer, self.losses[name if name in self.losses else ""], rows)
        except Exception:
            for made in (self.work, self.folder):  # the trainer makes its folder at once
                if made.is_dir() and not any(made.iterdir()):
                    made.rmdir()
            raise
        return trainer

    def _fit(
        self, trainer: BaseTrainer, checkpoint: checkpoints.Checkpoint | None
    ) -> tuple[Any, list[dict[str, Any]], dict[str, float]]:
        """Return the trained student, whole on the first process; the log; its dev scores before and after."""
        student: Any = trainer.model
        whole = checkpoints.WholeCopy(trainer, main=get_rank() == 0) if trainer.is_fsdp_enabled else None
        for name, loss in self.losses.items():
            watch(trainer, loss, name)
        trainer.add_callback(FiniteWeightsCallback())
        trainer.add_callback(checkpoints.DurableCheckpoints())
        watched = [loss.register_forward_hook(check_loss_values) for loss in self.losses.values()]
        before = None if whole is not None else hash_weights(student)
        scores = {} if self.evaluator is None else {"before": dev.score(self.evaluator, student)}
        try:
            history = checkpoints.train(trainer, checkpoint)
        finally:
            for hook in watched:
                hook.remove()
        if before is not None and before == hash_weights(student):
            say_unchanged(self.args, trainer.state.global_step)
        if self.rounded is not None and whole is None:
            student.to(self.rounded)  # what is measured is what is saved
            check_weights(student, self.args, trainer.state.global_step)
        if self.evaluator is not None:
            scores["after"] = dev.score(self.evaluator, student)
        return (student if whole is None else whole.gathered(self.rounded) or student), history, scores

    def _save(self, student: Student, record: TrainingRecord) -> None:
        """Write the student and all that belongs to it; the record comes last, so a folder with it is complete."""
        for left in self.folder.glob(".tmp*"):  # safetensors gives weights their name when they are whole
            left.unlink()
        with headed(student, record):
            save(student, self.folder)
        save_projections(self.whole_loss, self.folder)
        write_model_card(self.folder, record=record, results={})
        parts = parts_of(self.dataset)
        unknown = [name for name, part in parts.items() if not hasattr(part, "provenance")]
        if not unknown:
            Exposure.of(*parts.values()).save(self.folder)
        elif len(unknown) < len(parts):
            logger.warning(
                "%s is no DistillationDataset, so what training has seen is not known as a whole: `evaluate` will not "
                "tell apart what the student has seen.",
                ", ".join(map(repr, unknown)),
            )
        sync_tree(self.folder)
        record.save(self.folder)


def _results(history: list[dict[str, Any]], record: TrainingRecord) -> dict[str, float]:
    losses = [entry["train_loss"] for entry in history if "train_loss" in entry]
    scores = {f"dev_{when}": value for when, value in record.dev.items()}
    return {"seconds": record.seconds, **({"train_loss": losses[-1]} if losses else {}), **scores}


def _wait() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
