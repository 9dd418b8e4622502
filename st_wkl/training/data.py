"""The rows that a loss is trained on, in the layout that it understands, and the checks before any work."""

from __future__ import annotations

import copy
import itertools
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from sentence_transformers import CrossEncoder
from sentence_transformers.base.data_collator import DEFAULT_LABEL_COLUMNS
from sentence_transformers.base.modules import Router
from sentence_transformers.util import batch_to_device
from torch import nn
from transformers import TrainerCallback

from st_wkl.data.arrow import Ragged
from st_wkl.data.collator import DOCUMENTS, OWN, TEXT, ListwiseCollator
from st_wkl.data.selection import NOTHING_RELEVANT, WITHOUT_POSITIVES, shared_judgements, twin_queries
from st_wkl.losses.base import NOTHING_TO_COMPARE, NOTHING_TO_WEIGH
from st_wkl.losses.cached import StudentLoss
from st_wkl.losses.embedding import EmbeddingDistillLoss
from st_wkl.losses.pair_distill import PairwisePreferenceLoss
from st_wkl.losses.weighted_sum import WeightedSumLoss
from st_wkl.models import own_prompt, set_prompts
from st_wkl.training.students import takes_lists

if TYPE_CHECKING:
    from datasets import IterableDataset
    from sentence_transformers.base.data_collator import BaseDataCollator
    from sentence_transformers.base.trainer import BaseTrainer
    from sentence_transformers.base.training_args import BaseTrainingArguments

    from st_wkl.data.dataset import DistillationDataset
    from st_wkl.losses.scoring import Student

logger = logging.getLogger(__name__)

_TRIAL_LETTERS = 80


@dataclass(frozen=True)
class TrainingData:
    """What a trainer is given."""

    # Lists (query, documents, scores, labels) or columns (query, positive, negative_1, …, label); of several datasets
    # by their names.
    rows: Dataset | IterableDataset | dict[str, Dataset]
    # `ListwiseCollator` for lists; None leaves columns to the trainer's own, with their prompts and, for a student
    # that treats queries and documents apart, their tasks.
    collator: BaseDataCollator | None
    count: int | None  # of an epoch; None where it is unknown, as in an iterable dataset
    provenance: dict[str, Any]
    prompts: str | dict[str, Any] | None = None
    routes: dict[str, Any] | None = None

    @property
    def callbacks(self) -> list[TrainerCallback]:
        """What its collator needs among a trainer's callbacks."""
        if isinstance(self.collator, ListwiseCollator) and self.collator.negatives_per_step is not None:
            return [DrawAnewCallback(self.collator)]
        return []


def training_data(
    dataset: DistillationDataset | Dataset | IterableDataset,
    loss: nn.Module,
    student: Student,
    args: BaseTrainingArguments,
    draws: Mapping[str, Any] = MappingProxyType({}),
    what: str = "this dataset",
) -> TrainingData:
    """Lay a dataset out for a loss; one of pairs gets the teacher's own where no pairwise teacher was asked.

    `draws` are those options of `ListwiseCollator` that say which negatives a step sees; `what` is what messages call
    the dataset.
    """
    check_dataset(dataset)
    lists = takes_lists(loss)
    rows: Any = dataset
    if hasattr(dataset, "to_lists"):
        wants_pairs = any(isinstance(part, PairwisePreferenceLoss) for part in loss.modules())
        if wants_pairs and "preferences" not in dataset.train.column_names:
            logger.warning(
                "No pairwise teacher has seen %s: %s learns from the pairs that its pointwise scores imply. "
                "DistillationDatasetBuilder(pairwise=…) asks one.",
                what,
                type(loss).__name__,
            )
            dataset = dataset.with_pointwise_preferences()
        _check_texts(loss, dataset.train.column_names, draws)
        rows = dataset.to_lists() if lists else dataset.to_columns()
    elif TEXT in (rows.column_names or []):
        _check_texts(loss, rows.column_names, draws)
    elif DOCUMENTS in (rows.column_names or []):
        if not lists:
            raise ValueError(
                f"{type(loss).__name__} needs the columns query, positive, negative_1, …, label, and the dataset holds "
                "lists. DistillationDataset.to_columns() makes columns; the losses of st_wkl.losses take lists."
            )
        _say_contradictions(rows)
    _check_positives(loss, dataset, what)
    _check_draws(dataset, draws.get("negatives_per_step"), what)
    count = len(rows) if hasattr(rows, "__len__") else None
    _check_batch(args, count)
    columns = [name for name in rows.column_names or [] if name not in DEFAULT_LABEL_COLUMNS]
    _take_prompts(student, args.prompts, columns)
    provenance = getattr(dataset, "provenance", {})
    vectors = _vectors(loss)
    if TEXT in columns and vectors is not None:
        provenance = {**provenance, "teacher": {"model": vectors.name, **vectors.teacher}}
    if TEXT in columns or DOCUMENTS in columns or (lists and hasattr(dataset, "to_lists")):
        collator = ListwiseCollator(student, max_length=getattr(args, "max_length", None), vectors=vectors, **draws)
        collator.seed = args.seed if args.data_seed is None else args.data_seed
        return TrainingData(rows, collator, count, provenance)
    if draws.get("negatives_per_step") is not None:
        raise ValueError(
            f"negatives_per_step draws from lists, and {type(loss).__name__} is trained on columns, which hold one "
            "document each: take a loss of st_wkl.losses, or fewer columns: DistillationDataset.to_columns(n=…)."
        )
    if isinstance(student, CrossEncoder):
        return TrainingData(rows, None, count, provenance, own_prompt(student))
    sides = {name: "document" if place else "query" for place, name in enumerate(columns)}
    prompts = {name: prompt for name, side in sides.items() if (prompt := own_prompt(student, side))}
    first: Any = next(iter(student))
    apart = any(getattr(first, name, None) for name in ("query_length", "document_length", "query_expansion"))
    apart = apart or any(isinstance(module, Router) for module in student.children())
    return TrainingData(rows, None, count, provenance, prompts or None, sides if apart else None)


def _terms(loss: nn.Module) -> list[Any]:
    """Return those losses of this package that a loss consists of."""
    parts = (part for part in loss.modules() if isinstance(part, StudentLoss))
    return [part for part in parts if not isinstance(part, WeightedSumLoss)]


def _vectors(loss: nn.Module) -> Any:
    """Return the teacher's embeddings that a loss looks at, None if at none."""
    found = [term.vectors for term in _terms(loss) if isinstance(term, EmbeddingDistillLoss)]
    if any(vectors is not found[0] for vectors in found):
        raise ValueError("A batch holds the vectors of one teacher, and the terms of this loss were made with several.")
    return next(iter(found), None)


def _check_texts(loss: nn.Module, columns: list[str], draws: Mapping[str, Any]) -> None:
    """Stop where single texts shall teach a loss that needs more."""
    if TEXT not in columns:
        return
    others = [type(term).__name__ for term in _terms(loss) or [loss] if not isinstance(term, EmbeddingDistillLoss)]
    if others:
        raise ValueError(
            f"{others[0]} compares queries with documents, and these are texts without lists: train with "
            "loss='embedding', or on a DistillationDataset."
        )
    if draws.get("negatives_per_step") is not None:
        raise ValueError("negatives_per_step draws from lists, and these are texts without any: leave it out.")


def _labels(dataset: Any) -> pa.ChunkedArray | None:
    """Return the judged gains of all lists, None where they cannot be told without reading all rows."""
    held = getattr(dataset, "train", dataset)
    plain = isinstance(held, Dataset) and held.format["type"] != "custom" and "labels" in held.column_names
    return held.with_format("arrow")[:]["labels"] if plain and len(held) else None


def _check_draws(dataset: Any, negatives: int | None, what: str) -> None:
    """Stop where no list has as many negatives as a step is to see."""
    if negatives is None or (labels := _labels(dataset)) is None:
        return
    gains = Ragged(labels)
    negative = ~pc.fill_null(pc.greater(gains.values, 0), False).to_numpy()
    if (longest := int(np.bincount(gains.rows[negative], minlength=1).max())) < negatives:
        raise ValueError(
            f"negatives_per_step is {negatives}, and the longest list of {what} has {longest} negatives: nothing would "
            "be drawn. Take fewer, leave it out, or build longer lists (num_negatives)."
        )


def _check_positives(loss: nn.Module, dataset: Any, what: str) -> None:
    """Stop where nothing is judged relevant, and the loss, or say so where a term of it, learns of positives alone."""
    if (labels := _labels(dataset)) is None:
        return
    gain = float(pc.max(pc.list_flatten(labels)).as_py() or 0)
    terms = _terms(loss)
    does = {
        NOTHING_TO_COMPARE: "compares relevant documents with others",
        NOTHING_TO_WEIGH: "weighs by what is relevant",
    }
    idle = {
        type(term).__name__: does[term.if_nothing_is_positive]
        for term in terms
        if getattr(term, "if_nothing_is_positive", None) in does and gain < term.positive_threshold
    }
    if not idle:
        return
    told = f"{NOTHING_RELEVANT.format(what)} (the highest gain is {gain:g})"
    if all(type(term).__name__ in idle for term in terms):
        name, why = next(iter(idle.items()))
        raise ValueError(f"{told}, and {name} {why}: the student would learn nothing. {WITHOUT_POSITIVES}")
    logger.warning("%s: %s adds nothing to the loss.", told, ", ".join(idle))


class DrawAnewCallback(TrainerCallback):
    """Tells a `ListwiseCollator` with `negatives_per_step` which epoch it is, so that each has other negatives.

    A run that is resumed draws what it would have drawn.

    Args:
        collator: The trainer's.

    Raises:
        ValueError: When training starts, if its rows are read by workers that outlive an epoch.

    Example:
        >>> collator = ListwiseCollator(student, negatives_per_step=7)  # doctest: +SKIP
        >>> trainer = SentenceTransformerTrainer(
        ...     student, train_dataset=lists, loss=loss, data_collator=collator, callbacks=[DrawAnewCallback(collator)]
        ... )  # doctest: +SKIP
    """

    def __init__(self, collator: ListwiseCollator) -> None:
        self.collator, self._next = collator, 0
        collator.epoch = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Find the epoch that training begins or goes on with."""
        if args.dataloader_num_workers and args.dataloader_persistent_workers:
            raise ValueError(
                "dataloader_persistent_workers=True: such workers keep the first epoch's negatives. Set it to False."
            )
        self._next = int(round(state.epoch or 0, 6))  # what is left of dividing by the steps of an epoch

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell it, before the rows of the epoch are read."""
        self.collator.epoch, self._next = self._next, self._next + 1


def _check_batch(args: BaseTrainingArguments, count: int | None) -> None:
    """Stop where no batch comes of the rows, since several processes share them or short batches are dropped."""
    batch = args.train_batch_size * args.world_size
    # One process trains a short batch like any other; several would each get a part of it, or none.
    if count is not None and count < batch and (args.world_size > 1 or args.dataloader_drop_last):
        raise ValueError(
            f"The dataset has {count:,} rows, which do not fill one batch of {batch:,} "
            f"({args.per_device_train_batch_size} per device, {args.world_size} processes). Set "
            f"per_device_train_batch_size to {max(count // max(args.world_size, 1), 1)} or less, as in "
            "default_arguments(student, output_dir, per_device_train_batch_size=…), or train on more."
        )


def check_dataset(dataset: Any) -> None:
    """Stop at what is no dataset of one split in a layout that is known, and say what to give."""
    if hasattr(dataset, "to_lists"):
        return
    remedy = ""
    if isinstance(dataset, Mapping):
        remedy = f"Pass one split, such as dataset[{next(iter(dataset), 'train')!r}]."
    elif isinstance(dataset, str | os.PathLike):
        remedy = f"Load it first: DistillationDataset.load({str(dataset)!r})."
    elif isinstance(dataset, list | tuple):
        remedy = "Make one of the rows: datasets.Dataset.from_list(rows)."
    if remedy or not hasattr(dataset, "column_names"):
        raise TypeError(
            f"dataset is a {type(dataset).__name__}; it has to be a DistillationDataset, or a datasets.Dataset or "
            f"IterableDataset of one split. {remedy}".rstrip()
        )
    if not (features := dataset.features) or (getattr(dataset, "format", None) or {}).get("type") == "custom":
        return  # an iterable dataset that does not say, or rows that a transform makes as they are read
    lists = {
        name: getattr(feature.feature, "dtype", "")
        for name, feature in features.items()
        if hasattr(feature, "feature") and not isinstance(feature, dict)
    }
    known = {"query", DOCUMENTS, *DEFAULT_LABEL_COLUMNS, "pairs", "ranks", OWN}
    for name, dtype in lists.items():
        if name in known or (DOCUMENTS in features and ("string" in dtype or "scores" in features)):
            continue
        if name == "document_ids":
            raise TypeError("The dataset holds ids, no texts. DistillationDataset(train, queries, documents) has both.")
        right = DOCUMENTS if "string" in dtype else "scores" if DOCUMENTS in features else "label"
        raise TypeError(
            f"The column {name!r} holds lists of {dtype or 'parts'}, and that name is not known. Rows are either "
            "query, documents, scores, labels (lists), or query, positive, negative_1, …, label (columns). If it is "
            f"{right!r}: dataset.rename_column({name!r}, {right!r}); else remove it."
        )
    if DOCUMENTS in features and "query" not in features:
        others = [name for name in features if name not in known]
        raise TypeError(
            f"Rows of lists need a column 'query'; there are {', '.join(features)}."
            + (f" dataset.rename_column({others[0]!r}, 'query')?" if others else "")
        )


def _say_contradictions(rows: Any) -> None:
    """Warn of lists whose label 0 is an answer to another row of the same query, or is the query itself."""
    if not hasattr(rows, "__len__") or not {"query", "labels"} <= {*rows.column_names}:
        return
    if rows.format["type"] == "custom":
        return
    rows = rows.with_format(None)
    queries = {str(number): text for number, text in enumerate(rows["query"]) if isinstance(text, str)}
    twins = {query for found in twin_queries(queries) for query in found}
    judged: dict[str, dict[str, int]] = {}
    own = 0
    for number, row in enumerate(rows):
        gains = [(text, gain or 0) for text, gain in zip(row[DOCUMENTS] or [], row["labels"] or [], strict=False)]
        own += any(text == row["query"] and not gain > 0 for text, gain in gains)
        if str(number) in twins:
            judged[str(number)] = dict(gains)
    shared, _ = shared_judgements(queries, judged)
    wrong = sum(shared[query][text] != gain for query, found in judged.items() for text, gain in found.items())
    if own or wrong:
        logger.warning(
            "%d lists hold the query itself as no answer, and %d labels contradict another row of the same query, of "
            "which the document is an answer. Leave these documents out, or set their labels.",
            own,
            wrong,
        )


def _take_prompts(student: Student, given: Any, columns: list[str]) -> None:
    """Give a student the prompts that training arguments name: it is trained, evaluated and saved with the same."""
    if given is None or given == {}:
        return
    pairs = isinstance(student, CrossEncoder)
    found: dict[str, str] = {}
    if isinstance(given, str):
        found = {"pair": given} if pairs else {"query": given, "document": given}
    elif pairs:
        raise ValueError(f"A CrossEncoder has one prompt for query and document; prompts is {given!r}. Give a text.")
    else:
        documents = {"document", "passage", "corpus", *columns[1:]}
        for name, prompt in given.items():
            side = "query" if name in ("query", *columns[:1]) else "document"
            if (side == "document" and name not in documents) or found.setdefault(side, prompt) != prompt:
                raise ValueError(
                    f"prompts={given!r}: {name!r} is neither the query nor the documents, or these have several "
                    "prompts. Give one for 'query' and one for 'document'."
                )
    if any((prompt or None) != own_prompt(student, side) for side, prompt in found.items()):
        set_prompts(student, found)
        logger.info("The student takes the prompts of the training arguments, and keeps them: %s", found)


def whole_batches(args: BaseTrainingArguments) -> Any:
    """Return accelerate's settings with which an iterable dataset's batches arrive as the collator made them.

    By default the first process makes the batches of all and cuts every tensor to the number of rows, of which there
    are fewer than documents; and it cannot send what is no tensor.
    """
    config: Any = copy.copy(args.accelerator_config)
    if config.dispatch_batches:
        raise ValueError(
            "An IterableDataset cannot be trained with dispatch_batches=True, which cuts the batches of lists apart. "
            'Leave it away, or set accelerator_config={"dispatch_batches": False}.'
        )
    config.dispatch_batches = False
    return config


def try_loss(trainer: BaseTrainer, loss: nn.Module, rows: Dataset | IterableDataset) -> None:
    """Compute the loss of two rows, so that what does not fit together is known before hours of work."""
    first = list(itertools.islice(iter(rows), 2))
    # Whether things fit together does not hang on how long texts are; a pass over long ones takes seconds. Vectors are
    # found by whole texts.
    if getattr(trainer.data_collator, "vectors", None) is None:
        first = [{name: _shortened(value) for name, value in row.items()} for row in first]
    student = trainer.model
    if not first:
        raise ValueError("The dataset has no rows.")
    training = student.training
    student.eval()
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            batch = batch_to_device(trainer.data_collator(first), student.device)
            # As a cross-encoder's trainer does before it takes everything else for columns.
            read = {name: batch.pop(name) for name in ("prompt", "task") if name in batch}
            batch.pop("dataset_name", None)
            loss(*trainer.collect_features(batch), **read)
    except Exception as error:
        raise ValueError(
            f"{type(loss).__name__} cannot be trained on this {type(student).__name__} and the columns "
            f"{', '.join(first[0])}: {error}"
        ) from error
    finally:
        student.train(training)


def _shortened(value: Any) -> Any:
    if isinstance(value, list):
        return [_shortened(part) for part in value]
    return value[:_TRIAL_LETTERS] if isinstance(value, str) else value
