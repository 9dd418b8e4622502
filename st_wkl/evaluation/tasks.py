"""What to evaluate on: MTEB tasks by name and local collections as MTEB tasks, their data, and running MTEB on them.

Importing this module imports MTEB, which takes seconds.
"""

from __future__ import annotations

import difflib
import json
import re
import tempfile
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
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
from mteb.results import TaskResult

from st_wkl.data.collection import Collection, document_text
from st_wkl.evaluation.identity import FILES, check_source
from st_wkl.evaluation.runs import relevant_qrels
from st_wkl.files import content_hash, file_name

_TAKES = "the name of an MTEB task or benchmark, a BEIR folder, a dataset id of the Hub, a Collection or an MTEB task"


class CollectionTask(AbsTaskRetrieval):
    """One split of a collection as an MTEB retrieval task, held in memory.

    Queries without any relevant document are left out with a counted warning, as MTEB would score them 0.

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
        FileNotFoundError: If a path is no folder.
        ValueError: If a name is unknown (the nearest ones are given), two tasks have the same name, or an MTEB task is
            to leave out other documents than it says.
    """
    items = [tasks] if isinstance(tasks, str | Path | Collection | AbsTask) else list(tasks)
    resolved = [task for item in items for task in _resolve(item, split, ignore_identical_ids)]
    names = [task.metadata.name for task in resolved]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two tasks are called {', '.join(repeated)}; give the collections different names")
    if not resolved:
        raise ValueError("there is no task to evaluate on; pass a task name, a BEIR folder or a Collection")
    return resolved


def _resolve(item: Task, split: str | None, ignore_identical_ids: bool | None) -> list[AbsTask]:
    if not isinstance(item, str | Path | Collection | AbsTask):
        raise TypeError(f"a task is a {type(item).__name__}; it has to be {_TAKES}")
    given: Any = item
    named = isinstance(item, Path) or (isinstance(item, str) and ("/" in item or Path(item).is_dir()))
    if named or (isinstance(item, str) and Path(item).suffix.lower() in FILES):
        check_source(item, "a task", _TAKES)
    if named or isinstance(item, Collection):
        collection = Collection.load(given, ignore_identical_ids=ignore_identical_ids)
        return [CollectionTask(collection, split or _default_split(collection))]
    whole = [item] if isinstance(item, AbsTask) else _registered(given)
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
    if "test" in splits or len(splits) == 1:
        return "test" if "test" in splits else splits[0]
    raise ValueError(f"collection {collection.name} has the splits {', '.join(splits) or 'none'}; name one with split=")


def _registered(name: str) -> list[AbsTask]:
    """Return the task or the tasks of the benchmark that MTEB knows by this name."""
    with suppress(KeyError):
        return [mteb.get_task(name)]
    with suppress(KeyError):
        return list(mteb.get_benchmark(name).tasks)
    known = [task.metadata.name for task in mteb.get_tasks(exclude_superseded=False)]
    known += [benchmark.name for benchmark in mteb.get_benchmarks()]
    by_lower = {candidate.lower(): candidate for candidate in known}
    nearest = [by_lower[match] for match in difflib.get_close_matches(name.lower(), by_lower, n=5, cutoff=0.5)]
    hint = f"did you mean {', '.join(nearest)}?" if nearest else "nothing has a similar name."
    raise ValueError(f"{name!r} is neither a folder here nor an MTEB task or benchmark; {hint}")


def load_task(task: AbsTask) -> None:
    """Load a task's data; where they cannot be had, such as offline, an OSError says what to do."""
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


@contextmanager
def loaded(task: AbsTask) -> Iterator[None]:
    """Load a task's data for a while, retrieval tasks in MTEB's newer layout; what the caller has loaded stays so."""
    borrowed = task.data_loaded
    if not borrowed:
        load_task(task)
    try:
        if isinstance(task, AbsTaskRetrieval):
            task.convert_v1_dataset_format_to_v2(None)
        yield
    finally:
        if not borrowed:
            task.unload_data()


def data_of(task: AbsTaskRetrieval) -> Iterator[tuple[str, str, Any]]:
    """Yield subset, split and data of a loaded task."""
    for subset, splits in task.dataset.items():
        for split, data in splits.items():
            yield subset, split, data


def rows_of(corpus: Any, wanted: Container[str]) -> Any:
    """Return the rows of a corpus that have one of the ids."""
    return corpus.select([place for place, document in enumerate(corpus["id"]) if document in wanted])


def texts_of(corpus: Any) -> dict[str, str]:
    """Return document id to text as MTEB reads it."""
    titles = corpus["title"] if "title" in corpus.column_names else [""] * len(corpus)
    return {
        key: document_text(title, text) for key, title, text in zip(corpus["id"], titles, corpus["text"], strict=True)
    }


def run_mteb(
    model: Any, task: AbsTask, *, batch_size: int, show_progress: bool, cache: Path | None = None, top_k: int = 0
) -> tuple[TaskResult, Mapping[str, Any]]:
    """Return MTEB's result and its rankings by subset and split, from the cache if both are there."""
    ranked, results, strategy = isinstance(task, AbsTaskRetrieval), None, "always"
    with tempfile.TemporaryDirectory(prefix="st_wkl_") as temporary:
        folder = Path(temporary)
        if cache is not None:
            # One folder of rankings for each model, task and dataset: MTEB merges what it finds in a file.
            meta = model.mteb_model_meta
            key = [str(meta.name), str(meta.revision), task.metadata.name, task.metadata.dataset["revision"], top_k]
            folder = cache / "rankings" / content_hash([*key, sorted(task.eval_splits)])[:20]
            results = NamedCache(cache)
            if not ranked or (folder / task.prediction_file_name).is_file():
                strategy = "only-missing"
        outcome = mteb.evaluate(
            model,
            task,
            co2_tracker=False,
            encode_kwargs={"batch_size": batch_size, "show_progress_bar": show_progress},
            cache=results,
            overwrite_strategy=strategy,
            prediction_folder=folder,
            show_progress_bar=show_progress,
        )
        file = folder / task.prediction_file_name
        return outcome.task_results[0], json.loads(file.read_text(encoding="utf-8")) if ranked else {}
