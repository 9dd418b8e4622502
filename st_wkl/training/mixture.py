"""Several data sets at once: their names, a loss for each, and what is trained on and said of all of them."""

from __future__ import annotations

import copy
import itertools
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from datasets import Dataset, DatasetDict, IterableDatasetDict, interleave_datasets
from sentence_transformers.base.sampler import MultiDatasetBatchSamplers
from torch import nn

from st_wkl.data.collator import DOCUMENTS, LABELS, QUERY
from st_wkl.data.selection import shared_judgements, twin_queries
from st_wkl.record import collection_of
from st_wkl.training.data import TrainingData, training_data
from st_wkl.training.identity import told_options

if TYPE_CHECKING:
    from sentence_transformers.base.training_args import BaseTrainingArguments

    from st_wkl.losses.scoring import Student

logger = logging.getLogger(__name__)


def named_datasets(dataset: Any, loss: Any = None) -> tuple[Any, Any]:
    """Return several datasets as `{name: dataset}`, those of a list by their collections, and the losses.

    One dataset in a dictionary or list is as good as that one. What is none of these stays as it is.

    Raises:
        TypeError: If the names are no texts, or losses go by names and there is one dataset without.
        ValueError: If there is no dataset, two have one name or one of a list has none, or the losses' names are
            others than the datasets'.

    Example:
        >>> named_datasets({"nq": 1, "squad": 2}, {"nq": "kl", "squad": "mse"})[0]
        {'nq': 1, 'squad': 2}
    """
    found = dataset
    if isinstance(dataset, list | tuple) and not any(isinstance(part, str | Mapping) for part in dataset):
        found = _by_collection(dataset)
    several = isinstance(found, Mapping) and not isinstance(found, DatasetDict | IterableDatasetDict)
    if not several:
        if isinstance(loss, Mapping):
            raise TypeError("loss is a dictionary, and there is one dataset: name it, as in {'nq': dataset}.")
        return dataset, loss
    if not found:
        raise ValueError("There is no dataset: give one, or several as {name: dataset}.")
    if wrong := [name for name in found if not isinstance(name, str) or not name.strip()]:
        raise TypeError(f"The datasets' names have to be texts, got {wrong[0]!r}.")
    if isinstance(loss, Mapping) and (other := sorted(loss.keys() ^ found.keys(), key=str)):
        where = "is no dataset of that name" if other[0] in loss else "is no loss for that dataset"
        raise ValueError(
            f"{other[0]!r}: there {where}. The losses are for {', '.join(map(repr, loss))}, the datasets are "
            f"{', '.join(map(repr, found))}."
        )
    if len(found) == 1:
        (name,) = found
        return found[name], loss[name] if isinstance(loss, Mapping) else loss
    # The trainer puts the losses into a module, by these names.
    if isinstance(loss, Mapping) and (bad := [name for name in found if "." in name or hasattr(nn.Sequential, name)]):
        raise ValueError(f"A dataset with a loss of its own cannot be called {bad[0]!r}: torch keeps modules by name.")
    return dict(found), loss


def _by_collection(datasets: list[Any] | tuple[Any, ...]) -> dict[str, Any]:
    names = [collection_of(getattr(part, "provenance", {})) for part in datasets]
    remedy = "Name them: {'nq': first, 'squad': second}."
    for place, name in enumerate(names):
        if not name and len(names) > 1:
            raise ValueError(f"dataset {place} of the list does not say which collection it is of. {remedy}")
        if name in names[:place]:
            raise ValueError(f"datasets {names.index(name)} and {place} of the list are both of {name!r}. {remedy}")
    return dict(zip(names, datasets, strict=True))


def parts_of(dataset: Any) -> dict[str, Any]:
    """Return the datasets by their names; a single one has none, and a `DatasetDict` is one, of splits."""
    return dataset if type(dataset) is dict else {"": dataset}


@contextmanager
def of_dataset(name: str) -> Iterator[None]:
    """Say of an error which of several datasets it is about."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if not name:
            raise
        raise (TypeError if isinstance(error, TypeError) else ValueError)(f"dataset {name!r}: {error}") from error


def losses_for(datasets: Mapping[str, Any], make: Callable[[str, Any], nn.Module]) -> nn.Module | dict[str, nn.Module]:
    """Make a loss for each of several datasets; one for all where these are the same, as they are by default."""
    made: dict[str, nn.Module] = {}
    for name, part in datasets.items():
        with of_dataset(name):
            made[name] = make(name, part)
    first, *others = made.values()
    alike = all(type(other) is type(first) and _told(other) == _told(first) for other in others)
    return first if alike else named_datasets(datasets, made)[1]


def _told(loss: nn.Module) -> str:
    return json.dumps(told_options(loss), sort_keys=True, default=repr)


def data_of(
    dataset: Any,
    loss: nn.Module | dict[str, nn.Module],
    student: Student,
    args: BaseTrainingArguments,
    draws: Mapping[str, Any],
) -> TrainingData:
    """Lay a dataset out for a loss; of several each for its own, of which a batch holds one at a time."""
    if not isinstance(dataset, dict):
        assert isinstance(loss, nn.Module), "losses go by the names of datasets"
        return training_data(dataset, loss, student, args, draws)
    parts: dict[str, TrainingData] = {}
    for name, part in dataset.items():
        with of_dataset(name):
            own = loss[name] if isinstance(loss, dict) else loss
            parts[name] = training_data(part, own, student, args, draws, what=f"the dataset {name!r}")
    _check_layouts(parts)
    _say_contradictions(parts)
    first = next(iter(parts.values()))
    count: int | None = None
    if any(part.count is None for part in parts.values()):
        rows: Any = _alternating(parts, args, shared=isinstance(loss, nn.Module))
        prompts, routes = first.prompts, first.routes
    else:
        # The trainer writes a dataset's name into its rows, in place: the user's stay as they are.
        rows = {name: copy.copy(part.rows) for name, part in parts.items()}
        count = _rows_of_an_epoch([part.count or 0 for part in parts.values()], args)
        prompts, routes = (_by_dataset(parts, what) for what in ("prompts", "routes"))
    collators = [part.collator for part in parts.values()]
    collator = next((found for found in collators if getattr(found, "vectors", None) is not None), first.collator)
    return TrainingData(rows, collator, count, _provenance(parts), prompts, routes)


def _check_layouts(parts: Mapping[str, TrainingData]) -> None:
    """Stop where some are lists and others columns, or some can be counted and others cannot."""
    (first, one), *others = parts.items()
    for name, part in others:
        if (part.collator is None) != (one.collator is None):
            lists, columns = (first, name) if part.collator is None else (name, first)
            raise ValueError(
                f"The dataset {lists!r} is trained as lists and {columns!r} as columns, and one trainer makes its "
                "batches in one way: give both as lists, with losses of st_wkl.losses for both."
            )
        if (part.count is None) != (one.count is None):
            passing, kept = (name, first) if part.count is None else (first, name)
            raise ValueError(
                f"The dataset {passing!r} is an IterableDataset, and {kept!r} is none: give both as one kind "
                "(DistillationDataset.to_lists().to_iterable_dataset() makes one)."
            )


def _by_dataset(parts: Mapping[str, TrainingData], what: str) -> Any:
    """Return prompts or routes of columns, whose names may mean other things in another dataset."""
    found = {name: getattr(part, what) for name, part in parts.items()}
    if any(isinstance(told, dict) for told in found.values()):
        return {name: told or {} for name, told in found.items()}
    return next(iter(found.values()))  # one for all pairs of a cross-encoder, or none


def _alternating(parts: Mapping[str, TrainingData], args: BaseTrainingArguments, *, shared: bool) -> Any:
    """Return one row of each iterable dataset in turn; the stock trainer takes no dictionary of these."""
    if not shared:
        raise ValueError(
            "Iterable datasets are trained with one loss: the trainer of sentence-transformers cannot tell which of "
            "them a row is of. Give one loss, or datasets that can be counted."
        )
    if args.multi_dataset_batch_sampler != MultiDatasetBatchSamplers.ROUND_ROBIN:
        raise ValueError(
            "How large iterable datasets are is not known, so they cannot be drawn from in proportion: set "
            'multi_dataset_batch_sampler="round_robin" in args, which takes a row of each in turn until one is at its '
            "end."
        )
    rows: dict[str, Any] = {name: part.rows for name, part in parts.items()}
    columns = {name: sorted(found.column_names or []) for name, found in rows.items()}
    (first, expected), *others = columns.items()
    if wrong := [name for name, found in others if found != expected]:
        there = ", ".join(columns[wrong[0]])
        raise ValueError(f"Columns of {first!r} are {', '.join(expected)}, those of {wrong[0]!r} {there}.")
    return interleave_datasets(list(rows.values()))


def _rows_of_an_epoch(counts: Sequence[int], args: BaseTrainingArguments) -> int:
    """Return how many rows an epoch has: all, or with turns as many batches of each as the smallest has."""
    if args.multi_dataset_batch_sampler != MultiDatasetBatchSamplers.ROUND_ROBIN:
        return sum(counts)
    most = -(-min(counts) // args.train_batch_size) * args.train_batch_size
    if (left := sum(counts) - sum(min(count, most) for count in counts)) > 0:
        logger.warning(
            "Datasets take turns until the smallest is at its end (multi_dataset_batch_sampler='round_robin'): each "
            "epoch leaves out %d of %d rows, others each time.",
            left,
            sum(counts),
        )
    return sum(min(count, most) for count in counts)


def _say_contradictions(parts: Mapping[str, TrainingData]) -> None:
    """Warn of documents that answer a query in one dataset and are its negatives in another."""
    rows = {
        str(number): part.rows.with_format(None)
        for number, part in enumerate(parts.values())
        if isinstance(part.rows, Dataset)
        and part.rows.format["type"] != "custom"
        and {QUERY, DOCUMENTS, LABELS} <= {*part.rows.column_names}
    }
    texts = {f"{n} {row}": text for n, held in rows.items() for row, text in enumerate(held[QUERY]) if text is not None}
    judged: dict[str, dict[str, int]] = {}
    for key in itertools.chain.from_iterable(twin_queries(texts)):
        number, _, place = key.partition(" ")
        row = rows[number][int(place)]
        judged[key] = {text: gain or 0 for text, gain in zip(row[DOCUMENTS] or (), row[LABELS] or (), strict=False)}
    shared, _ = shared_judgements({key: texts[key] for key in judged}, judged)
    wrong = [key for key, own in judged.items() if any(gain <= 0 < shared[key][text] for text, gain in own.items())]
    if wrong:
        logger.warning(
            "%d lists hold a document as a negative that answers the same query in another dataset, or row: %r and "
            "others. Leave these documents out, or set their labels.",
            len(wrong),
            texts[wrong[0]],
        )


def _provenance(parts: Mapping[str, TrainingData]) -> dict[str, Any]:
    """Return where all of it comes from: who taught, and each dataset's own provenance with its rows."""
    datasets = {
        name: {**part.provenance, **({} if part.count is None else {"rows_trained": part.count})}
        for name, part in parts.items()
    }
    teachers = {name: part.provenance.get("teacher") or {} for name, part in parts.items()}
    first, *others = teachers.values()
    if any(other != first for other in others):
        names = [str(one.get("model") or one.get("kind") or "no teacher that is known") for one in teachers.values()]
        first = {"name": ", ".join(dict.fromkeys(names)), "teachers": teachers}
    return {"datasets": datasets, "teacher": first}
