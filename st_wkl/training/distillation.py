"""From a student and a distillation dataset to a trained student: what is asked for, and the checks of each part."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from sentence_transformers.base.evaluation import BaseEvaluator
from torch import nn

from st_wkl._processes import is_first
from st_wkl._versions import check_adapters
from st_wkl.data.provenance import licence_of
from st_wkl.data.texts import teacher_vectors
from st_wkl.files import owned
from st_wkl.losses.make import EMBEDDING, make_loss
from st_wkl.models import is_trusted, load_model
from st_wkl.ranges import check_arguments, check_options
from st_wkl.record import RECORD_FILE, TrainingRecord
from st_wkl.training.asymmetric import frozen_documents
from st_wkl.training.data import check_dataset
from st_wkl.training.lora import check_base, has_adapter
from st_wkl.training.mixture import losses_for, named_datasets, of_dataset, parts_of
from st_wkl.training.run import Distilled, Run
from st_wkl.training.students import HALF, name_of, named_dtype, own_arguments, to_master

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from peft import LoraConfig
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.training_args import BaseTrainingArguments
    from transformers import TrainerCallback

    from st_wkl.data.dataset import DistillationDataset
    from st_wkl.data.embedding_teacher import Embedder
    from st_wkl.data.selection import Choice
    from st_wkl.data.texts import EmbeddingDataset
    from st_wkl.data.vectors import TeacherVectors
    from st_wkl.losses.scoring import Student

    Trainable: TypeAlias = DistillationDataset | EmbeddingDataset | Dataset | IterableDataset
    Loss: TypeAlias = str | nn.Module | Callable[[Any], nn.Module]

logger = logging.getLogger(__name__)


def distill(
    student: str | Path | Student,
    dataset: Trainable | Sequence[Trainable] | Mapping[str, Trainable],
    loss: Loss | Mapping[str, Loss | None] | None = None,
    args: BaseTrainingArguments | None = None,
    *,
    output_dir: str | Path,
    evaluator: BaseEvaluator | None = None,
    lora: bool | LoraConfig = False,
    resume: bool = False,
    callbacks: Iterable[TrainerCallback] = (),
    mini_batch_size: int | None = None,
    matryoshka: Sequence[int] | None = None,
    negatives_per_step: int | None = None,
    draw: Choice = "random",
    embedding_teacher: str | Path | SentenceTransformer | Embedder | TeacherVectors | None = None,
    freeze_documents: bool = False,
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
            `IterableDataset` in either layout; or an `EmbeddingDataset` of texts, for an embedding teacher. Or several
            of these, `{"nq": …, "squad": …}`, or a list of them, which are called as their collections. A batch holds
            rows of one of them, so what answers a query in one and is a negative of it in another meets no in-batch
            contrast; lists that contradict each other so are counted and said. Each is drawn from in proportion to its
            size until all are at their end, or, with `multi_dataset_batch_sampler="round_robin"` in `args`, in turns
            until the smallest is. Rows of several `IterableDataset`s take turns within a batch, with one loss.
        loss: Name of a loss (a key of `st_wkl.training.LOSSES`), a loss over the student, or a function that makes one
            from it. Of several datasets, one for all, or one for each by their names, with temperatures of their own.
            By default only the teacher's temperature differs, where a dataset's report suggests one.
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
        matryoshka: Dimensions to which embeddings can be cut, for a loss that is made here; see `make_loss`.
        negatives_per_step: Negatives of a list that a step sees at most, drawn anew for each epoch and list: 31 that
            the teacher has scored cost 7 in a step. Default: all.
        draw: How they are drawn, see `ListwiseCollator`.
        embedding_teacher: A model whose embeddings of all texts teach, for `loss="embedding"` or one with `+embedding`,
            as in "kl+in-batch+embedding"; what `VectorStore.embed` takes, or returned. They are computed once and
            stored. With an `EmbeddingDataset`, texts are enough. Default: none.
        freeze_documents: Leave the document encoder of an `asymmetric_student` as it is, and with it the index.
        base_name: What the record calls the model that training started from. Default: its Hub id or folder name.
        trust_remote_code: Run code of the student's repository, whenever it is loaded. Only for repositories that you
            have read. A student that was loaded with it stays so.
        save_dtype: Number type that the student is rounded to before it is measured and saved, such as "bfloat16".
            Default: the one that it was trained in, since a step of training is smaller than what half precision holds.
        eval: The former name of `evaluator`, for one release.

    Returns:
        The student with its record and folder.

    Raises:
        FileExistsError: If `output_dir` holds something already, and it is not this run to be resumed, or another
            process is at work in it.
        ImportError: If an adapter is to be trained, and the installed transformers refuses the installed peft.
        TypeError: If arguments or loss are those of another model class, or something is none of what is asked for.
        ValueError: If two datasets have one name, losses and datasets have different ones, or one trainer cannot train
            them together; if no batch comes of the rows, or their scores are unusable; if the loss fails on the first
            rows, was made over another model or is not finite, or the weights are not; if the run to resume had another
            student, dataset, loss or arguments; or if processes of `torchrun` would train alone.

    Example:
        >>> from st_wkl import DistillationDatasetBuilder, distill
        >>> builder = DistillationDatasetBuilder("mteb/nfcorpus", "BAAI/bge-reranker-v2-m3")  # doctest: +SKIP
        >>> distill("minishlab/potion-base-8M", builder.build(), output_dir="my-student").student  # doctest: +SKIP
    """
    if eval is not None:
        warnings.warn("distill(eval=…) is called evaluator= now.", DeprecationWarning, stacklevel=2)
        evaluator = eval if evaluator is None else evaluator
    _check_given(evaluator, args, resume=resume, trust_remote_code=trust_remote_code, freeze_documents=freeze_documents)
    _check_frozen(freeze_documents, lora=bool(lora), save_dtype=save_dtype is not None)
    check_adapters(lora)
    check_options(mini_batch_size=mini_batch_size, negatives_per_step=negatives_per_step)
    dataset, loss = named_datasets(dataset, loss)
    for part_name, part in parts_of(dataset).items():
        with of_dataset(part_name):
            check_dataset(part)
    folder = Path(output_dir).expanduser()
    # One run at a time trains into a folder; under `torchrun` the first process speaks for all.
    with owned(folder) if is_first() else contextlib.nullcontext():
        loaded, name, given = _load(student, trust_remote_code)
        run = Run(
            student=loaded,
            name=base_name or name,
            licence=licence_of(student, loaded),
            precision={"loaded": name_of(given), "trained": name_of(loaded.dtype)},
            trusted=is_trusted(loaded, trust_remote_code),
            lora=lora,
            rounded=_rounding(save_dtype, adapted=bool(lora) or has_adapter(loaded)),
            folder=folder,
            args=own_arguments(args, loaded, folder, lora=bool(lora) or has_adapter(loaded)),
            evaluator=evaluator,
            callbacks=list(callbacks),
            dataset=dataset,
            loss=_make_losses(
                loss,
                loaded,
                dataset,
                mini_batch_size=mini_batch_size,
                matryoshka=matryoshka,
                vectors=None if embedding_teacher is None else teacher_vectors(embedding_teacher, dataset),
            ),
            draws=_draws(negatives_per_step, draw),
            freeze_documents=freeze_documents,
        )
        with frozen_documents(loaded) if freeze_documents else contextlib.nullcontext():
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


def _check_frozen(freeze_documents: bool, **others: bool) -> None:
    for name in (name for name, given in others.items() if freeze_documents and given):
        raise ValueError(
            f"freeze_documents leaves documents' embeddings as they are, and {name} would not: leave one out."
        )


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


def _rounding(save_dtype: str | torch.dtype | None, *, adapted: bool) -> torch.dtype | None:
    if save_dtype is not None and adapted:
        raise ValueError(
            "An adapter is saved as it was trained, in float32, and its base model stays as it is: give save_dtype to "
            "`st_wkl.training.lora.merge`."
        )
    return None if save_dtype is None else named_dtype(save_dtype)


def _draws(negatives_per_step: int | None, draw: str) -> dict[str, Any]:
    if negatives_per_step is None and draw != "random":
        raise ValueError(f"draw={draw!r} means nothing without negatives_per_step.")
    return {} if negatives_per_step is None else {"negatives_per_step": negatives_per_step, "draw": draw}


def _make_losses(loss: Any, student: Student, dataset: Any, **options: Any) -> nn.Module | dict[str, nn.Module]:
    """Return the loss, or those of several datasets by their names."""
    if isinstance(loss, Mapping):
        # Vectors are for those that look at them.
        plain = {**options, "vectors": None}
        looks = {name for name, own in loss.items() if own is None or (isinstance(own, str) and EMBEDDING in own)}
        return {
            name: _make_loss(loss[name], student, part, **(options if name in looks else plain))
            for name, part in dataset.items()
        }
    if isinstance(dataset, dict) and (loss is None or isinstance(loss, str)):
        return losses_for(dataset, lambda _, part: _make_loss(loss, student, part, **options))
    return _make_loss(loss, student, dataset, **options)


def _make_loss(loss: Any, student: Student, dataset: Any, **options: Any) -> nn.Module:
    loss = getattr(dataset, "loss", None) if loss is None else loss
    if loss is None or isinstance(loss, str):
        report = getattr(dataset, "provenance", {}).get("report")
        return make_loss(student, loss, report=report, **options)
    if given := [name for name in options if options[name] is not None]:
        own = "put MatryoshkaLoss around your own" if given[0] == "matryoshka" else "give it to your own"
        name = "embedding_teacher" if given[0] == "vectors" else given[0]
        raise ValueError(f"{name} is for a loss that is made here: {own} loss instead.")
    made = loss if isinstance(loss, nn.Module) else loss(student)
    if not isinstance(made, nn.Module):
        raise TypeError(f"loss has to be a name, a loss or a function that returns one; this gave {made!r}.")
    return made
