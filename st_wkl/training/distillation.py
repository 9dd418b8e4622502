"""From a student and a distillation dataset to a trained student and the record of how it was made."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shutil
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from sentence_transformers.base.evaluation import BaseEvaluator
from sentence_transformers.util import get_rank
from torch import nn

import st_wkl.training.checkpoints as checkpoints
import st_wkl.training.dev as dev
from st_wkl._compat import card_text
from st_wkl._processes import is_first
from st_wkl._versions import check_adapters, package_versions
from st_wkl.data.provenance import license_in, stated_license
from st_wkl.files import content_hash, owned, sync_tree
from st_wkl.losses.make import make_loss
from st_wkl.model_checks import check_student
from st_wkl.models import check_reloads, hash_weights, is_trusted, load_model, prompts_of
from st_wkl.publish.model_card import write_model_card
from st_wkl.ranges import check_arguments, check_options
from st_wkl.record import RECORD_FILE, Exposure, TrainingRecord
from st_wkl.training.data import TrainingData, check_dataset, training_data, try_loss, whole_batches
from st_wkl.training.guard import (
    FiniteWeightsCallback,
    check_loss_values,
    check_weights,
    say_few_steps,
    say_unchanged,
    watch,
)
from st_wkl.training.identity import Describer, run_identity, told_arguments, told_options
from st_wkl.training.lora import check_base, check_config, has_adapter, prepare, save
from st_wkl.training.students import HALF, check_loss, kind_of, name_of, named_dtype, own_arguments, to_master

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from peft import LoraConfig
    from sentence_transformers.base.trainer import BaseTrainer
    from sentence_transformers.base.training_args import BaseTrainingArguments
    from transformers import TrainerCallback

    from st_wkl.data.dataset import DistillationDataset
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
        """Show where it is, how it was made, and what the dev split says."""
        dev = " → ".join(f"{value:.4f}" for value in self.record.dev.values())
        return f"Distilled in {self.folder}\n{self.record!r}" + (f"\ndev split: {dev}" if dev else "")


def distill(
    student: str | Path | Student,
    dataset: DistillationDataset | Dataset | IterableDataset,
    loss: str | nn.Module | Callable[[Any], nn.Module] | None = None,
    args: BaseTrainingArguments | None = None,
    *,
    output_dir: str | Path,
    evaluator: BaseEvaluator | None = None,
    lora: bool | LoraConfig = False,
    resume: bool = False,
    callbacks: Iterable[TrainerCallback] = (),
    mini_batch_size: int | None = None,
    base_name: str | None = None,
    trust_remote_code: bool = False,
    save_dtype: str | torch.dtype | None = None,
    eval: BaseEvaluator | None = None,
) -> Distilled:
    """Train a student on a distillation dataset with its stock trainer, and save it with the record of its making.

    The defaults, and why:

    - Loss: KL and an in-batch contrastive term, the best over the collections of this project's study; KL alone for
      late interaction and cross-encoders, which the study has not seen; inside `SpladeLoss` for sparse students.
      Temperature 0.05 for a student that compares by cosine, whose scores are too close for a softmax otherwise, 1 for
      others and for the teacher's logits, unless the teacher report finds the teacher nearly one-hot or nearly flat
      there: then the temperature that it suggests. See `make_loss`.
    - Arguments: batches of 32 lists, 3 epochs, a learning rate by model class, a checkpoint each tenth of training. See
      `default_arguments`.
    - Memory: transformers embed 32 texts at once (`mini_batch_size`), with the gradient of the whole batch.
    - Precision: weights that a folder holds in bfloat16 or float16 are trained in float32; `bf16=True` in `args` makes
      the arithmetic fast. A student that is cast by hand, as with `student.to(torch.bfloat16)`, is trained as it is.
    - Processes: `torchrun` trains the same curve on several as on one at the same global batch; the first one writes.
      With `fsdp=True` in `args` (FSDP2) the student's weights are spread over them; loss curve and saved weights are
      those of one process, with an adapter too, on CPUs with gloo, which is all that has been verified. It needs a loss
      without `mini_batch_size`, has no best checkpoint, cannot be resumed, and returns shards in other processes.

    Args:
        student: A `SentenceTransformer`, `SparseEncoder`, `MultiVectorEncoder` or `CrossEncoder`, or its Hub id,
            folder or `packaged:` name. A model that is given is changed by training.
        dataset: What `DistillationDatasetBuilder.build` returned. Losses of this package are trained on its full lists
            of any length, through `ListwiseCollator`; upstream's on its columns. Or a `datasets.Dataset` or
            `IterableDataset` in either layout.
        loss: Name of a loss (a key of `st_wkl.training.LOSSES`), a loss over the student, or a function that makes one
            from it.
        args: Training arguments of the student's class. Texts get the student's own prompts for queries and documents,
            as in evaluation; `prompts` in `args` changes them, for good. This function's `output_dir` takes the place
            of theirs: checkpoints go to `checkpoints` in it, and are deleted once the student is complete.
        output_dir: Folder for the trained student: weights, card, `distillation.json` and hashes of the training texts.
            Must not hold anything yet.
        evaluator: A dev split to choose the best checkpoint by, see `st_wkl.training.dev.GradedEvaluator`, or any
            evaluator of sentence-transformers. Unless `args` say when to evaluate, each checkpoint is, and the best is
            kept. `callbacks=[EarlyStoppingCallback(3)]` of transformers stops when it no longer gets better.
        lora: Train an adapter in place of all weights: True for `st_wkl.training.lora.default_config`, or a
            `LoraConfig` of peft. The folder then holds the adapter; `merge` makes a plain model of it. A student that
            was loaded with an adapter goes on with it.
        resume: Go on with the run that was stopped in `output_dir`, with the same result as if it had not been; start
            if there is none; return the student if it is complete.
        callbacks: Further callbacks of the trainer.
        mini_batch_size: Texts embedded at once by a loss that is made here; one that is given has its own.
        base_name: What the record calls the model that training started from. Default: its Hub id or folder name.
        trust_remote_code: Run code of the student's repository, whenever it is loaded. Only for repositories that you
            have read. A student that was loaded with it stays so.
        save_dtype: Number type that the student is rounded to before it is measured and saved, such as "bfloat16".
            Default: the one that it was trained in, since a step of training is smaller than what half precision holds.
        eval: The former name of `evaluator`, for one release.

    Returns:
        The student with its record and folder. `st_wkl.publish.model_card.write_model_card` adds results to its card.

    Raises:
        FileExistsError: If `output_dir` holds something already, and it is not this run to be resumed, or another
            process is at work in it.
        ImportError: If an adapter is to be trained, and the installed transformers refuses the installed peft.
        TypeError: If arguments or loss are those of another model class, or something is none of what is asked for.
        ValueError: If no batch comes of the rows, or their scores are unusable; if the loss fails on the first rows,
            was made over another model or is not finite, or the weights are not; if the run to resume had another
            student, dataset, loss or arguments; or if processes of `torchrun` would train alone.

    Example:
        >>> from st_wkl import DistillationDatasetBuilder, distill
        >>> builder = DistillationDatasetBuilder("mteb/nfcorpus", "BAAI/bge-reranker-v2-m3")  # doctest: +SKIP
        >>> distill("minishlab/potion-base-8M", builder.build(), output_dir="my-student").student  # doctest: +SKIP
    """
    if eval is not None:
        warnings.warn("distill(eval=…) is called evaluator= now.", DeprecationWarning, stacklevel=2)
        evaluator = eval if evaluator is None else evaluator
    _check_given(evaluator, args, resume=resume, trust_remote_code=trust_remote_code)
    check_adapters(lora)
    check_options(mini_batch_size=mini_batch_size)
    check_dataset(dataset)
    folder = Path(output_dir).expanduser()
    # One run at a time trains into a folder; under `torchrun` the first process speaks for all.
    with owned(folder) if is_first() else contextlib.nullcontext():
        loaded, name, given = _load(student, trust_remote_code)
        run = _Run(
            student=loaded,
            name=base_name or name,
            licence=_licence_of(student, loaded),
            precision={"loaded": name_of(given), "trained": name_of(loaded.dtype)},
            trusted=is_trusted(loaded, trust_remote_code),
            lora=lora,
            rounded=_rounding(save_dtype, adapted=bool(lora) or has_adapter(loaded)),
            folder=folder,
            args=own_arguments(args, loaded, folder, lora=bool(lora) or has_adapter(loaded)),
            evaluator=evaluator,
            callbacks=list(callbacks),
            dataset=dataset,
            loss=_make_loss(loss, loaded, dataset, mini_batch_size),
        )
        identity, data = run.prepare(resume=resume)
        if resume and (finished := run.finished(identity)) is not None:
            logger.info("%s is complete: nothing to do.", folder)
            return finished
        return run.train(identity, data, resume=resume)


def _check_given(evaluator: Any, args: Any, **switches: Any) -> None:
    """Stop at values of another kind, which the trainer would take or trip over late."""
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} is {value!r}; it has to be True or False.")
    if evaluator is not None and not isinstance(evaluator, BaseEvaluator):
        raise TypeError(
            f"evaluator is {evaluator!r:.80}; it has to be a GradedEvaluator or another "
            "evaluator of sentence-transformers, of which SequentialEvaluator joins several."
        )
    if dataclasses.is_dataclass(args):
        check_arguments(args, evaluator is not None)


@dataclass
class _Run:
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
    dataset: Any
    loss: nn.Module

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
        check_loss(self.loss, student)
        data = training_data(self.dataset, self.loss, student, args)
        say_few_steps(args, data.count)
        if data.count is None:
            args.accelerator_config = whole_batches(args)
        if self.evaluator is not None:
            dev.set_up(args, self.evaluator, student)
            dev.say_seen(self.evaluator, self.dataset)
        args.output_dir = str(self.work)
        args.restore_callback_states_from_checkpoint = True  # a resumed run has to be as patient as it was
        describe = Describer(student)
        identity = run_identity(self, data, describe)
        if not (resume and (self.folder / RECORD_FILE).is_file()):
            checkpoints.check_resumable(args, self.loss, describe, self.dataset, resume=resume)
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
        student, history, scores = self._fit(trainer, checkpoint)
        record = TrainingRecord(
            student=self.name,
            loss=type(self.loss).__name__,
            loss_config=told_options(self.loss),
            loss_citation=str(getattr(self.loss, "citation", "")),
            teacher=data.provenance.get("teacher", {}),
            dataset={**data.provenance, **({} if data.count is None else {"rows_trained": data.count})},
            arguments=told_arguments(self.args, identity),
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
            callbacks=self.callbacks or None,
        )
        try:
            if trainer.is_fsdp_enabled:
                checkpoints.check_sharded(args, self.loss, resuming=checkpoint is not None)
            elif args.fsdp:
                logger.warning("accelerate leaves FSDP out on this device: every process holds the whole student.")
            try_loss(trainer, self.loss, data.rows)
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
        watch(trainer, self.loss)
        trainer.add_callback(FiniteWeightsCallback())
        trainer.add_callback(checkpoints.DurableCheckpoints())
        watched = self.loss.register_forward_hook(check_loss_values)
        before = None if whole is not None else hash_weights(student)
        scores = {} if self.evaluator is None else {"before": dev.score(self.evaluator, student)}
        try:
            history = checkpoints.train(trainer, checkpoint)
        finally:
            watched.remove()
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
        save(student, self.folder)
        write_model_card(self.folder, record=record, results={})
        if hasattr(self.dataset, "provenance"):
            Exposure.of(self.dataset).save(self.folder)
        sync_tree(self.folder)
        record.save(self.folder)


def _load(student: str | Path | Student, trust_remote_code: bool) -> tuple[Student, str, torch.dtype | None]:
    """Return the student as it is trained, its name, and the number type that it came in."""
    loaded, name = load_model(student, trust_remote_code=trust_remote_code)  # type: ignore[arg-type]
    given = to_master(loaded)
    if isinstance(student, nn.Module):
        return loaded, loaded.model_card_data.base_model or name, given
    if has_adapter(loaded):
        if given in HALF:  # an adapter was rounded to what its base model is stored in
            loaded = load_model(student, trust_remote_code=trust_remote_code, dtype=torch.float32)[0]
        if (Path(student) / RECORD_FILE).is_file():
            check_base(loaded, TrainingRecord.load(student).lora)
    return loaded, name, given


def _licence_of(given: Any, loaded: Student) -> str:
    """Return what the card of the model that training starts from states, `""` if nothing."""
    source = getattr(loaded.config, "name_or_path", None) if isinstance(given, nn.Module) else given
    return license_in(card_text(loaded)) or (stated_license(source) if source else None) or ""


def _rounding(save_dtype: str | torch.dtype | None, *, adapted: bool) -> torch.dtype | None:
    if save_dtype is not None and adapted:
        raise ValueError(
            "An adapter is saved as it was trained, in float32, and its base model stays as it is: give save_dtype to "
            "`st_wkl.training.lora.merge`."
        )
    return None if save_dtype is None else named_dtype(save_dtype)


def _make_loss(loss: Any, student: Student, dataset: Any, mini_batch_size: int | None) -> nn.Module:
    if loss is None or isinstance(loss, str):
        report = getattr(dataset, "provenance", {}).get("report")
        return make_loss(student, loss, mini_batch_size=mini_batch_size, report=report)
    if mini_batch_size is not None:
        raise ValueError("mini_batch_size is for a loss that is made here: give it to your own loss instead.")
    made = loss if isinstance(loss, nn.Module) else loss(student)
    if not isinstance(made, nn.Module):
        raise TypeError(f"loss has to be a name, a loss or a function that returns one; this gave {made!r}.")
    return made


def _results(history: list[dict[str, Any]], record: TrainingRecord) -> dict[str, float]:
    losses = [entry["train_loss"] for entry in history if "train_loss" in entry]
    scores = {f"dev_{when}": value for when, value in record.dev.items()}
    return {"seconds": record.seconds, **({"train_loss": losses[-1]} if losses else {}), **scores}


def _wait() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
