"""What to evaluate on: MTEB tasks by name and local collections as MTEB tasks, their data, and running MTEB on them.

Importing this module imports MTEB, which takes seconds.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import re
import shutil
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
from st_wkl.files import content_hash, file_name, read_object, set_aside

logger = logging.getLogger(__name__)

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
    tasks: Task | Iterable[Task],
    split: str | None = None,
    ignore_identical_ids: bool | None = None,
    datasets: str | Path | None = None,
) -> list[AbsTask]:
    """Return MTEB tasks for names, folders and collections.

    Private tasks of a benchmark are left out and named, unless `datasets` has their data.

    Args:
        tasks: One or several of: an MTEB task or benchmark name, a BEIR folder, a Hub dataset id in MTEB's layout, a
            `Collection`, an MTEB task. A benchmark stands for its tasks, an aggregated task for its parts.
        split: Split to evaluate on. None for the task's own; for a collection `"test"`, or its only split.
        ignore_identical_ids: See `Collection`; None for what a collection or a task says itself.
        datasets: Folder with the data of MTEB's tasks, see `with_data_of`; None for the Hub.

    Raises:
        FileNotFoundError: If a path is no folder, or `datasets` lacks the data of a task.
        ValueError: If a name is unknown (the nearest ones are given), two tasks have the same name, a task is private,
            or an MTEB task is to leave out other documents than it says.
    """
    items = [tasks] if isinstance(tasks, str | Path | Collection | AbsTask) else list(tasks)
    resolved = [task for item in items for task in _resolve(item, split, ignore_identical_ids)]
    if datasets is not None:
        resolved = [task if isinstance(task, CollectionTask) else with_data_of(task, datasets) for task in resolved]
    elif private := [task for task in resolved if not task.metadata.is_public]:
        told = (
            f"{', '.join(task.metadata.name for task in private)}: private, so only MTEB's maintainers can run it, "
            "when asked in an evaluation request, whose text `st-wkl leaderboard prepare` writes"
        )
        if any(task.metadata.name in items for task in private) or len(private) == len(resolved):
            raise ValueError(f"{told}. Leave it out, or name a folder that has its data with datasets=")
        logger.warning("%s. Left out.", told)
        resolved = [task for task in resolved if task.metadata.is_public]
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


def with_data_of(task: AbsTask, folder: str | Path) -> AbsTask:
    """Return a task of MTEB whose data come from a folder.

    Args:
        task: The task.
        folder: Holds a folder called after the task or its dataset, as `snapshot_download(..., local_dir=)` fills it.
            Where that says of every file that it is of the task's own commit, results count as the Hub's; else their
            dataset revision is a hash of the files.

    Raises:
        FileNotFoundError: If there is no such folder; the message says how to get it.
    """
    path, commit = task.metadata.dataset["path"], task.metadata.dataset["revision"]
    names = (task.metadata.name, path, path.split("/")[-1])
    place = next((found for name in names if (found := Path(folder).expanduser() / name).is_dir()), None)
    if place is None:
        raise FileNotFoundError(
            f"{folder} has no data of {task.metadata.name}: no folder {', '.join(dict.fromkeys(names))} is in "
            f"it. With a connection, huggingface_hub.snapshot_download({path!r}, repo_type='dataset', "
            f"revision={commit!r}, local_dir={str(Path(folder) / names[0])!r}) fetches them"
        )
    files = sorted(file for file in place.rglob("*") if file.is_file() and ".cache" not in file.parts)
    notes = {
        file: place / ".cache" / "huggingface" / "download" / f"{file.relative_to(place)}.metadata" for file in files
    }
    stated = {note.read_text(encoding="utf-8").split("\n")[0] if note.is_file() else "" for note in notes.values()}
    revision = commit
    if stated != {commit}:
        digest = hashlib.blake2b(digest_size=16)
        for file in files:
            digest.update(f"{file.relative_to(place).as_posix()}\n".encode())
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "blake2b").digest())
        revision = f"files.{digest.hexdigest()}"
    task = copy(task)
    task.metadata = task.metadata.model_copy(update={"dataset": {"path": str(place), "revision": revision}})
    return task


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
    """Return MTEB's result and its rankings by subset and split, from the cache if both are there and whole."""
    ranked, results, strategy = isinstance(task, AbsTaskRetrieval), None, "always"
    with tempfile.TemporaryDirectory(prefix="st_wkl_") as temporary:
        folder = Path(temporary)
        if cache is not None:
            results, folder = NamedCache(cache), _rankings(model, task, cache, top_k)
            strategy = "only-missing" if is_kept(model, task, cache, top_k) else "always"
            if strategy == "always":
                shutil.rmtree(folder, ignore_errors=True)  # MTEB would add to what a killed process left
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


def is_kept(model: Any, task: AbsTask, cache: Path, top_k: int = 0) -> bool:
    """Say whether a cache holds the results of a task, and its rankings if it has any; half a file is none."""
    results = NamedCache(cache)
    file = results.get_task_result_path(task.metadata.name, model.mteb_model_meta)
    try:
        found = results.load_task_result(task.metadata.name, model.mteb_model_meta)
    except (ValueError, KeyError):
        set_aside(file)
        return False
    settings = file.with_name("run_settings.jsonl")  # MTEB writes them last, and the leaderboard asks for them
    told = settings.read_text(encoding="utf-8") if settings.is_file() else ""
    if found is None or found.get_missing_evaluations(task) or json.dumps(task.metadata.name) not in told:
        return False
    ranked = read_object(_rankings(model, task, cache, top_k) / task.prediction_file_name)
    places = [
        (subset, split) for split, subsets in found.scores.items() for subset in (s["hf_subset"] for s in subsets)
    ]
    return not isinstance(task, AbsTaskRetrieval) or all(
        split in (ranked or {}).get(subset, {}) for subset, split in places if split in task.eval_splits
    )


def _rankings(model: Any, task: AbsTask, cache: Path, top_k: int) -> Path:
    """Return the folder of a task's rankings: one for each model, task and dataset, as MTEB merges what it finds."""
    meta = model.mteb_model_meta
    key = [str(meta.name), str(meta.revision), task.metadata.name, task.metadata.dataset["revision"], top_k]
    return cache / "rankings" / content_hash([*key, sorted(task.eval_splits)])[:20]
