"""From a student and a distillation dataset to a trained student and the record of how it was made."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

import torch
import transformers
from sentence_transformers.util import get_rank
from torch import nn

from st_wkl._compat import card_text
from st_wkl._processes import is_first, launched
from st_wkl._versions import check_adapters, package_versions
from st_wkl.data.provenance import license_in, stated_license
from st_wkl.files import content_hash, holds_nothing, owned, sync_tree
from st_wkl.losses.make import is_static, make_loss
from st_wkl.model_checks import check_student
from st_wkl.models import check_reloads, is_trusted, load_model, prompts_of
from st_wkl.publish.model_card import write_model_card
from st_wkl.ranges import check_arguments, check_options
from st_wkl.record import RECORD_FILE, Exposure, TrainingRecord
from st_wkl.training import checkpoints, dev
from st_wkl.training.data import TrainingData, check_dataset, training_data, try_loss, whole_batches
from st_wkl.training.describe import Describer, differences, told
from st_wkl.training.fitting import fit
from st_wkl.training.guard import say_few_steps
from st_wkl.training.identity import run_identity, told_arguments, told_options
from st_wkl.training.lora import check_base, check_config, check_reload, has_adapter, prepare, save
from st_wkl.training.plot import PLOT_FILE, plot_training
from st_wkl.training.precision import HALF, name_of, named_dtype, to_master
from st_wkl.training.rehearsal import keep_exactly, rehearse
from st_wkl.training.sharding import check_sharded
from st_wkl.training.students import (
    STATIC_LEARNING_RATE,
    check_loss,
    default_arguments,
    kind_of,
)

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from peft import LoraConfig
    from sentence_transformers.base.evaluation import BaseEvaluator
    from sentence_transformers.base.trainer import BaseTrainer
    from sentence_transformers.base.training_args import BaseTrainingArguments
    from transformers import TrainerCallback

    from st_wkl.data.dataset import DistillationDataset
    from st_wkl.losses.scoring import Student

logger = logging.getLogger(__name__)
_P = ParamSpec("_P")

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Distilled:
    """What `distill` returns.

    Args:
        student: The trained student, as it is saved in `folder`.
        results: `seconds` of training; its mean `train_loss`, unless the run was stopped after its last step; with a
            dev split `dev_before` and `dev_after`, its main metric.
        record: How it was made.
        folder: Weights, card, `distillation.json` and hashes of the training texts.
    """

    student: Student
    results: dict[str, float]
    record: TrainingRecord
    folder: Path


def _alone(train: Callable[_P, Distilled]) -> Callable[_P, Distilled]:
    """Let one run at a time train into a folder; under `torchrun` the first process speaks for all."""

    @functools.wraps(train)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> Distilled:
        with owned(str(kwargs["output_dir"])) if is_first() else contextlib.nullcontext():
            return train(*args, **kwargs)

    return run


@_alone
def distill(
    student: str | Path | Student,
    dataset: DistillationDataset | Dataset | IterableDataset,
    loss: str | nn.Module | Callable[[Any], nn.Module] | None = None,
    args: BaseTrainingArguments | None = None,
    *,
    output_dir: str | Path,
    lora: bool | LoraConfig = False,
    eval: BaseEvaluator | None = None,
    mini_batch_size: int | None = None,
    callbacks: Iterable[TrainerCallback] = (),
    resume: bool = False,
    base_name: str | None = None,
    trust_remote_code: bool = False,
    save_dtype: str | torch.dtype | None = None,
) -> Distilled:
    """Train a student on a distillation dataset with its stock trainer, and save it with the record of its making.

    The defaults, and why:

    - Loss: KL and an in-batch contrastive term, the best over the collections of this project's study, where weighted
      KL is ahead only on documents that were trained on; KL alone for late interaction and cross-encoders, which the
      study has not seen; inside `SpladeLoss` for sparse students.
      Temperature 0.05 for a student that compares by cosine, whose scores are too close for a softmax otherwise, 1 for
      others and for the teacher's logits, unless the teacher report finds the teacher nearly one-hot or nearly flat
      there: then the temperature that it suggests. See `st_wkl.training.make_loss`.
    - Arguments: batches of 32 lists, 3 epochs, a learning rate by model class, a checkpoint each tenth of training. See
      `st_wkl.training.students.default_arguments`.
    - Memory: transformers embed 32 texts at once (`mini_batch_size`), with the gradient of the whole batch; on lists of
      uneven texts that is not slower, since short texts are not padded to the longest of the batch.
    - Precision: weights that a folder holds in bfloat16 or float16 are trained in float32; `bf16=True` in `args` makes
      the arithmetic fast. A student that is cast by hand, as with `student.to(torch.bfloat16)`, is trained as it is.
    - Processes: `torchrun` trains the same curve on several as on one at the same global batch; the first one writes.
      With `fsdp=True` in `args` (FSDP2) the student's weights are spread over them; the loss curve and the saved
      weights are those of one process, with an adapter too, on CPUs with gloo, which is all that has been verified. It
      needs a loss without `mini_batch_size`, has no best checkpoint and cannot be resumed, see
      `st_wkl.training.sharding.check_sharded`. Other processes than the first return the student in shards.

    Args:
        student: A `SentenceTransformer`, `SparseEncoder`, `MultiVectorEncoder` or `CrossEncoder`, or its Hub id,
            folder or `packaged:` name. A model that is given is changed by training.
        dataset: What `DistillationDatasetBuilder.build` returned. Losses of this package are trained on its full lists
            of any length, through `ListwiseCollator`; upstream's on its columns. Or a `datasets.Dataset` or
            `IterableDataset` in either layout.
        loss: Name of a loss (a key of `st_wkl.training.LOSSES`), a loss over the student, or a function that
            makes one from it.
        args: Training arguments of the student's class. Texts get the student's own prompts for queries and documents,
            as in evaluation; `prompts` in `args` changes them, for good. This function's `output_dir` takes the place of theirs:
            checkpoints go to `checkpoints` in it, and are deleted once the student is complete.
        output_dir: Folder for the trained student: weights, card, `distillation.json` and hashes of the training texts.
            Must not hold anything yet.
        lora: Train an adapter in place of all weights: True for `st_wkl.training.lora.default_config`, or a `LoraConfig`
            of peft. The folder then holds the adapter; `st_wkl.training.lora.merge` makes a plain model of it. A
            student that was loaded with an adapter goes on with it.
        eval: A dev split to choose the best checkpoint by, see `st_wkl.training.dev.GradedEvaluator`, or any evaluator
            of sentence-transformers. Unless `args` say when to evaluate, each checkpoint is, and the best is kept.
            `callbacks=[EarlyStoppingCallback(3)]` of transformers stops when it no longer gets better.
        mini_batch_size: Texts embedded at once by a loss that is made here; one that is given has its own.
        callbacks: Further callbacks of the trainer.
        resume: Go on with the run that was stopped in `output_dir`, with the same result as if it had not been; start
            if there is none; return the student if it is complete.
        base_name: What the record calls the model that training started from. Default: its Hub id or folder name.
        trust_remote_code: Run code of the student's repository, whenever it is loaded. Only for repositories that you
            have read. A student that was loaded with it stays so.
        save_dtype: Number type that the student is rounded to before it is measured and saved, such as "bfloat16".
            Default: the one that it was trained in, since a step of training is smaller than what half precision holds.

    Returns:
        The student with its record and folder. The card gains a results table from
        `st_wkl.publish.model_card.write_model_card`.

    Raises:
        FileExistsError: If `output_dir` holds something already, and it is not this run to be resumed, or another process
            is at work in it.
        ImportError: If an adapter is to be trained, and the installed transformers refuses the installed peft.
        TypeError: If arguments or loss are those of another model class, or the dataset is none.
        ValueError: If no batch comes of the dataset's rows, or their scores are unusable; if the loss fails on its first
            rows, was made over another model, or is not finite, nor the weights before they are saved; if the run to
            resume had another student, dataset, loss
            or arguments; or if processes of `torchrun` would train alone.

    Example:
        >>> from st_wkl import DistillationDatasetBuilder, distill
        >>> builder = DistillationDatasetBuilder("mteb/nfcorpus", "cross-encoder/ms-marco-MiniLM-L12-v2")  # doctest: +SKIP
        >>> distill("minishlab/potion-base-8M", builder.build(), output_dir="my-student").student  # doctest: +SKIP
    """  # noqa: E501
    output_dir = Path(output_dir)
    check_adapters(lora)
    check_options(mini_batch_size=mini_batch_size)
    if dataclasses.is_dataclass(args):
        check_arguments(args, eval is not None)
    check_dataset(dataset)
    loaded, found_name, given = _load(student, trust_remote_code)
    name = base_name or (found_name if not isinstance(student, nn.Module) else _name_of(loaded, found_name))
    licence = _licence_of(student, loaded)
    kind = kind_of(loaded)
    check_student(loaded)
    adapted = bool(lora) or has_adapter(loaded)
    rounded = _rounding(save_dtype, adapted=adapted)
    if lora and not has_adapter(loaded):
        check_config(loaded, lora)
    trained = loaded.dtype
    output_dir = output_dir.expanduser()
    args = _arguments(args, loaded, output_dir, lora=adapted)
    made = _make_loss(loss, loaded, dataset, mini_batch_size)
    check_loss(made, loaded)
    data = training_data(dataset, made, loaded, args)
    say_few_steps(args, data.count)
    if data.count is None:
        args.accelerator_config = whole_batches(args)
    if eval is not None:
        dev.set_up(args, eval, loaded)
        dev.say_seen(eval, dataset)
    work = output_dir / CHECKPOINTS
    args.output_dir = str(work)
    args.restore_callback_states_from_checkpoint = True  # a resumed run has to be as patient as it was

    callbacks = list(callbacks)
    describe = Describer(loaded)
    identity = run_identity(
        student=loaded,
        dataset=dataset,
        data=data,
        loss=made,
        args=args,
        lora=lora,
        evaluator=eval,
        callbacks=callbacks,
        describe=describe,
        save_dtype=rounded,
    )
    if resume and (finished := _finished(output_dir, identity, is_trusted(loaded, trust_remote_code))) is not None:
        logger.info("%s is complete: nothing to do.", output_dir)
        return finished
    checkpoints.check_resumable(args, made, describe, dataset, resume=resume)
    _check_folder(output_dir, work)
    if is_first():
        check_reloads(loaded, trust_remote_code)
    checkpoint = checkpoints.start_run(work, identity, resume=resume)
    _wait()  # the trainer of a quicker process would make the folder that this one has yet to look at
    start = time.perf_counter()
    transformers.set_seed(args.seed)  # an adapter starts at random
    adapter = _adapt(loaded, lora, trust_remote_code) if adapted else {}
    args.prompts = data.prompts  # those of lists are their collator's
    args.router_mapping = args.router_mapping or data.routes
    trainer = kind.trainer(
        model=loaded,
        args=args,
        train_dataset=data.rows,
        loss=made,
        data_collator=data.collator,
        evaluator=eval,
        callbacks=callbacks or None,
    )
    try:
        _check_trainer(trainer, made, data, checkpoint)
    except Exception:
        _remove_empty(work, output_dir)  # the trainer makes its folder at once
        raise
    _wait()  # every process has looked before one of them writes
    if get_rank() == 0:
        checkpoints.write_identity(work, identity)
    if adapted:
        keep_exactly(trainer, trust_remote_code=trust_remote_code)
    loaded, history, scores = fit(trainer, made, eval, checkpoint, rounded)
    record = TrainingRecord(
        student=name,
        loss=type(made).__name__,
        loss_config=told_options(made),
        loss_citation=str(getattr(made, "citation", "")),
        teacher=data.provenance.get("teacher", {}),
        dataset={**data.provenance, **({} if data.count is None else {"rows_trained": data.count})},
        arguments=told_arguments(args, identity),
        seconds=round(time.perf_counter() - start, 1),
        versions=package_versions(("sentence-transformers", "transformers", "torch", "peft")),
        lora=adapter,
        dev=scores,
        student_license=licence,
        prompts=prompts_of(loaded),
        run=content_hash(identity, size=16),
        identity=identity,
        precision={"loaded": name_of(given), "trained": name_of(trained), "saved": name_of(loaded.dtype)},
    )
    if get_rank() == 0:
        _save(loaded, output_dir, record, dataset, history, is_trusted(loaded, trust_remote_code))
        checkpoints.remove(work)
    _wait()
    return Distilled(loaded, _results(history, record), record, output_dir)


def _load(student: str | Path | Student, trust_remote_code: bool) -> tuple[Student, str, torch.dtype | None]:
    """Return the student as it is trained, its name, and the number type that it came in."""
    loaded, name = load_model(student, trust_remote_code=trust_remote_code)  # type: ignore[arg-type]
    given = to_master(loaded)
    if has_adapter(loaded) and not isinstance(student, nn.Module):
        if given in HALF:  # an adapter was rounded to what its base model is stored in
            loaded = load_model(student, trust_remote_code=trust_remote_code, dtype=torch.float32)[0]
        if (Path(student) / RECORD_FILE).is_file():
            check_base(loaded, TrainingRecord.load(student).lora)
    return loaded, name, given


def _rounding(save_dtype: str | torch.dtype | None, *, adapted: bool) -> torch.dtype | None:
    if save_dtype is not None and adapted:
        raise ValueError(
            "An adapter is saved as it was trained, in float32, and its base model stays as it is: give save_dtype to "
            "`st_wkl.training.lora.merge`."
        )
    return None if save_dtype is None else named_dtype(save_dtype)


def _adapt(student: Student, lora: bool | LoraConfig, trust_remote_code: bool) -> dict[str, Any]:
    """Put an adapter on, and try whether it can be kept."""
    adapter = prepare(student, lora or True)
    if is_first():  # the others have the same adapter, and transformers lets one process save
        rehearse(student, trust_remote_code=trust_remote_code)
    return adapter


def _arguments(
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


def _finished(folder: Path, identity: dict[str, Any], trust_remote_code: bool) -> Distilled | None:
    """Return the complete student of this very run, None if there is none yet."""
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
    if is_first():
        checkpoints.remove(folder / CHECKPOINTS)  # of a process that was killed while it did
    # An adapter would be rounded to what its base model is stored in.
    dtype = named_dtype(record.precision["saved"]) if record.precision else None
    student: Any = load_model(folder, trust_remote_code=trust_remote_code, dtype=dtype)[0]
    return Distilled(student, _results([], record), record, folder)


def _check_folder(folder: Path, work: Path) -> None:
    """Refuse a folder that holds anything but the unfinished run."""
    if not folder.exists():
        return
    # The trainer makes the folder of checkpoints before this package writes whose they are.
    begun = (
        [path.name for path in folder.iterdir()] == [work.name] and holds_nothing(work) if folder.is_dir() else False
    )
    ours = begun or ((work / checkpoints.IDENTITY_FILE).is_file() and not (folder / RECORD_FILE).exists())
    if not folder.is_dir() or (any(folder.iterdir()) and not ours):
        raise FileExistsError(f"{folder} is not empty. Choose another folder, or delete it if it may go.")


def _remove_empty(*folders: Path) -> None:
    for folder in folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _check_trainer(
    trainer: BaseTrainer, loss: nn.Module, data: TrainingData, checkpoint: checkpoints.Checkpoint | None
) -> None:
    """Find what only the trainer knows, before it starts."""
    if trainer.is_fsdp_enabled:
        check_sharded(trainer.args, loss, resuming=checkpoint is not None)
    elif trainer.args.fsdp:
        logger.warning("accelerate leaves FSDP out on this device: every process holds the whole student.")
    try_loss(trainer, loss, data.rows)


def _save(
    student: Student,
    folder: Path,
    record: TrainingRecord,
    dataset: Any,
    history: list[dict[str, Any]],
    trust_remote_code: bool,
) -> None:
    """Write the student and all that belongs to it; the record comes last, so a folder with it is complete."""
    for left in folder.glob(".tmp*"):  # safetensors gives weights their name when they are whole
        left.unlink()
    save(student, folder)
    if record.lora:
        check_reload(student, folder, trust_remote_code=trust_remote_code)
    write_model_card(folder, record=record, results={})
    if hasattr(dataset, "provenance"):
        Exposure.of(dataset).save(folder)
    _plot(history, folder / PLOT_FILE)
    sync_tree(folder)
    record.save(folder)


def _plot(history: list[dict[str, Any]], path: Path) -> None:
    try:
        plot_training(history, path)
    except ImportError as error:
        _say_once(str(error))


@functools.cache
def _say_once(message: str) -> None:
    logger.info("%s", message)


def _results(history: list[dict[str, Any]], record: TrainingRecord) -> dict[str, float]:
    losses = [entry["train_loss"] for entry in history if "train_loss" in entry]
    scores = {f"dev_{when}": value for when, value in record.dev.items()}
    return {"seconds": record.seconds, **({"train_loss": losses[-1]} if losses else {}), **scores}


def _name_of(student: Student, found: str) -> str:
    return student.model_card_data.base_model or found


def _licence_of(given: Any, loaded: Student) -> str:
    """Return what the card of the model that training starts from states, `""` if nothing."""
    source = getattr(loaded.config, "name_or_path", None) if isinstance(given, nn.Module) else given
    return license_in(card_text(loaded)) or (stated_license(source) if source else None) or ""


def _wait() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
