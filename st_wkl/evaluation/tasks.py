"""What to evaluate on: MTEB tasks and benchmarks by name, and local collections as MTEB tasks.

Importing this module imports MTEB, which takes seconds.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from copy import copy
from pathlib import Path
from typing import Any, TypeAlias

import mteb
from datasets import Dataset
from mteb.abstasks import AbsTask
from mteb.abstasks.aggregated_task import AbsTaskAggregate
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models import ModelMeta

from st_wkl.data.collection import Collection
from st_wkl.evaluation.runs import relevant_qrels
from st_wkl.files import file_name


class CollectionTask(AbsTaskRetrieval):
    """One split of a collection as an MTEB retrieval task, held in memory.

    Queries without any relevant document are left out with a counted warning, as MTEB would score them 0.

    Args:
        collection: Documents, queries and judgements.
        split: Split of the judgements.

    Raises:
        ValueError: If the collection has no such split, or the split no query with a relevant document.

    Example:
        >>> task = CollectionTask(Collection.from_beir("scifact"), "test")  # doctest: +SKIP
        >>> mteb.evaluate(model, task, cache=None)  # doctest: +SKIP
    """

    def __init__(self, collection: Collection, split: str) -> None:
        self.collection = collection
        self.split = split
        self.qrels = relevant_qrels(collection, split)
        self.ignore_identical_ids = collection.leaves_out_own
        self.metadata = TaskMetadata(
            name=collection.name,
            description=f"The collection {collection.name}",
            type="Retrieval",
            category="t2t",
            dataset={"path": collection.name, "revision": collection.fingerprint},
            eval_splits=[split],
            eval_langs=["eng-Latn"],  # required; what language it is plays no part in the scores
            main_score="ndcg_at_10",
        )
        super().__init__()

    def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
        """Lay the collection out as MTEB reads it."""
        if self.data_loaded:
            return
        documents = self.collection.documents
        queries = {query: self.collection.queries[query] for query in self.qrels}
        self.dataset = {
            "default": {
                self.split: {
                    "corpus": Dataset.from_dict({"id": list(documents), "text": list(documents.values())}),
                    "queries": Dataset.from_dict({"id": list(queries), "text": list(queries.values())}),
                    "relevant_docs": {query: dict(judged) for query, judged in self.qrels.items()},
                    "top_ranked": None,
                }
            }
        }
        self.data_loaded = True

    def unload_data(self) -> None:
        """Give the copy of the data back; MTEB's own version empties the whole object."""
        self.dataset = {}
        self.data_loaded = False

    @property
    def prediction_file_name(self) -> str:
        """The name of MTEB's prediction file, in one folder even for a collection named like a Hub repository."""
        return f"{file_name(re.sub(r'[^A-Za-z0-9_.-]+', '__', self.metadata.name))}_predictions.json"


class NamedCache(mteb.ResultCache):
    """MTEB's cache, whose files are called after models and tasks, with names that stay inside of it."""

    def get_task_result_path(self, task_name: str, model_name: str | ModelMeta, *args: Any, **kwargs: Any) -> Path:
        """Return MTEB's path, with each name made one that a file can have."""
        if isinstance(model_name, ModelMeta):
            names = {"name": model_name.model_name_as_path(), "revision": str(model_name.revision)}
            model_name = model_name.model_copy(update={key: file_name(name) for key, name in names.items()})
        # A collection from the Hub has always been a file in a folder of its organisation.
        task = "/".join(map(file_name, task_name.split("/")))
        return super().get_task_result_path(task, model_name, *args, **kwargs)


Task: TypeAlias = str | Path | Collection | AbsTask


def resolve_tasks(
    tasks: Task | Iterable[Task], split: str | None = None, ignore_identical_ids: bool | None = None
) -> list[AbsTask]:
    """Return MTEB tasks for names, folders and collections.

    Args:
        tasks: One or several of: an MTEB task or benchmark name, a BEIR folder, a Hub dataset id in MTEB's layout, a
            `Collection`, an MTEB task. A benchmark stands for its tasks, an aggregated task for its parts.
        split: Split to evaluate on. None for the task's own; for a collection `"test"`, or its only split.
        ignore_identical_ids: See `Collection`; None for what a collection or a task says itself.

    Raises:
        ValueError: If a name is unknown (the nearest ones are given), two tasks have the same name, or an MTEB task is
            to leave out other documents than it says.
    """
    items = [tasks] if isinstance(tasks, str | Path | Collection | AbsTask) else list(tasks)
    resolved: list[AbsTask] = []
    for item in items:
        resolved.extend(_resolve(item, split, ignore_identical_ids))
    names = [task.metadata.name for task in resolved]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"two tasks are called {', '.join(repeated)}; give the collections different names")
    if not resolved:
        raise ValueError("there is no task to evaluate on; pass a task name, a BEIR folder or a Collection")
    return resolved


def load_task(task: AbsTask) -> None:
    """Load a task's data, or say what to do where they cannot be had.

    Raises:
        OSError: If a task by name cannot be fetched, such as offline.
    """
    if isinstance(task, CollectionTask):
        return task.load_data()
    try:
        task.load_data()
    except Exception as error:  # whatever breaks inside of datasets, MTEB and the HTTP libraries below them
        path = task.metadata.dataset["path"]
        raise OSError(
            f"the data of {task.metadata.name} could not be loaded ({type(error).__name__}: {error}). They come from "
            f"the Hub ({path}): run with a connection, or fetch them on another machine with huggingface_hub."
            f"snapshot_download({path!r}, repo_type='dataset', local_dir=...) and pass that folder"
        ) from error


def _resolve(item: Task, split: str | None, ignore_identical_ids: bool | None) -> list[AbsTask]:
    if isinstance(item, Path) and not item.expanduser().is_dir():
        raise FileNotFoundError(f"{item}: there is no such folder; a BEIR folder holds corpus.jsonl and qrels/")
    if isinstance(item, Collection | Path) or (isinstance(item, str) and ("/" in item or Path(item).is_dir())):
        collection = Collection.load(item, ignore_identical_ids=ignore_identical_ids)
        return [CollectionTask(collection, split or _default_split(collection))]
    whole = [item] if isinstance(item, AbsTask) else _registered(item)
    parts = [part for task in whole for part in _parts(task, split)]
    for task in parts:
        says = getattr(task, "ignore_identical_ids", False)
        if ignore_identical_ids not in (None, says):
            raise ValueError(
                f"ignore_identical_ids is {ignore_identical_ids}, and {task.metadata.name} says {says}: its numbers "
                "would not be those of MTEB. Leave the option out, or evaluate on its dataset as a collection."
            )
    return parts


def _parts(task: AbsTask, split: str | None) -> list[AbsTask]:
    """Return the tasks that an aggregated task averages, or the task itself, each on `split`."""
    if isinstance(task, AbsTaskAggregate):
        return [part for member in task.metadata.tasks for part in _parts(member, split)]
    if split is not None:
        task = copy(task)  # the caller's own task keeps its splits
        task.filter_eval_splits([split])
    return [task]


def _default_split(collection: Collection) -> str:
    splits = list(collection.qrels)
    if "test" in splits:
        return "test"
    if len(splits) == 1:
        return splits[0]
    raise ValueError(f"collection {collection.name} has the splits {', '.join(splits) or 'none'}; name one with split=")


def _registered(name: str) -> list[AbsTask]:
    """Return the task or the tasks of the benchmark that MTEB knows by this name."""
    try:
        return [mteb.get_task(name)]
    except KeyError:
        pass
    try:
        return list(mteb.get_benchmark(name).tasks)
    except KeyError:
        pass
    known = [task.metadata.name for task in mteb.get_tasks(exclude_superseded=False)]
    known += [benchmark.name for benchmark in mteb.get_benchmarks()]
    by_lower = {candidate.lower(): candidate for candidate in known}
    nearest = [by_lower[match] for match in difflib.get_close_matches(name.lower(), by_lower, n=5, cutoff=0.5)]
    hint = f"did you mean {', '.join(nearest)}?" if nearest else "nothing has a similar name."
    raise ValueError(f"{name!r} is neither a folder here nor an MTEB task or benchmark; {hint}")
