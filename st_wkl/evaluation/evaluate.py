"""Evaluate models and runs: always through MTEB, or the library that MTEB scores with, and never from a cache."""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sentence_transformers import SentenceTransformer

from st_wkl.data.candidates import BM25
from st_wkl.data.collection_files import whole_gains
from st_wkl.data.selection import without_own
from st_wkl.evaluation.benchmark import Estimate, size_of, smallest_first, with_progress
from st_wkl.evaluation.efficiency import measure_efficiency
from st_wkl.evaluation.results import Results, TaskScores, check_replaceable, results_file, saved
from st_wkl.evaluation.runs import run_scores
from st_wkl.files import parents_of
from st_wkl.metrics import MEASURES
from st_wkl.model_checks import say_new
from st_wkl.models import identity, load_model
from st_wkl.packaged import named
from st_wkl.ranges import check_options
from st_wkl.record import EXPOSURE_FILE, Exposure

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask

    from st_wkl.data.teacher import Teacher
    from st_wkl.evaluation.tasks import Task
    from st_wkl.evaluation.two_stage import FirstStage
    from st_wkl.models import AnyModel

_KEPT = tuple(f"{name}_at_" for name in (*MEASURES.values(), "mrr"))
# What MTEB and sentence-transformers warn each other of; no user can do anything about it.
_UPSTREAM_WARNINGS = (
    (DeprecationWarning, "The fill_missing parameter is deprecated"),
    (FutureWarning, ".*get_sentence_embedding_dimension"),
)
# MTEB logs these of every static model, whose embedding parameters it cannot count for a leaderboard.
_UPSTREAM_LOGS = ("Could not determine vocab size", "Model does not have a recognized architecture")


def evaluate(
    model: AnyModel | BM25 | Teacher | str | Path,
    tasks: Task | Iterable[Task],
    *,
    split: str | None = None,
    name: str | None = None,
    revision: str | None = None,
    output: str | Path | None = None,
    exposure: Exposure | None = None,
    first_stage: FirstStage | None = None,
    top_k: int = 100,
    cache: str | Path | None = None,
    datasets: str | Path | None = None,
    efficiency: bool = False,
    truncate_dim: int | None = None,
    batch_size: int = 32,
    ignore_identical_ids: bool | None = None,
    show_progress: bool = True,
    trust_remote_code: bool = False,
) -> Results:
    """Evaluate a model with MTEB and keep every query's nDCG@10.

    The queries of a student that carries hashes of its training texts are told apart by whether one of their relevant
    documents was a training positive: `TaskScores.groups`, and three columns of the table.

    MTEB's shared result cache, which tells two local models apart by a name that they share, is never used. The results
    carry a hash of the model's weights and settings, under which a cache of your own is safe. Each query's nDCG@10 is
    computed from MTEB's own rankings with pytrec_eval, and must average to the value that MTEB reports.

    Args:
        model: A `SentenceTransformer`, `SparseEncoder`, `MultiVectorEncoder` or `CrossEncoder`, or a folder or Hub id,
            which is loaded with the class that it was saved from; or `"bm25"`, or a `BM25` with parameters of its own.
            A `CrossEncoder` needs a first stage or a task with candidates; so does a `Teacher`, such as a function in
            a `CallableTeacher`, and a folder that holds a cross-encoder in the ONNX format.
        tasks: One or several of: MTEB task or benchmark name, BEIR folder, Hub dataset id in MTEB's layout,
            `Collection`, MTEB task.
        split: Split of the judgements. None for the task's own; for a collection `"test"`, or its only split.
        name: Name of the model in the results. None for its folder's name or Hub id.
        revision: None for the hash of weights and settings; give one only for a model that torch cannot read.
        output: A `.json` file or a folder (which gets `results.json`) to write the results to.
        exposure: What the model was trained on. None for what its folder or Hub repository says, if anything.
        first_stage: What finds the candidates that the model reranks: `"bm25"`, a `BM25`, a run (query id to document
            id to score), `Candidates`, a run file of TREC, or a retriever (model, folder or Hub id). The task's name
            then says so, as `SciFact-rerank-bm25-top100`. None to let the model search.
        top_k: Candidates of a query; means nothing without `first_stage`.
        cache: Folder for MTEB's results and rankings; a task is computed once for each model revision and dataset
            revision. None to compute always.
        datasets: Folder with the data of MTEB's tasks, each in a folder called after the task or its dataset, as
            `huggingface_hub.snapshot_download(..., local_dir=)` writes it. None for the Hub.
        efficiency: Measure speed and size on the texts of the first task, too: `results.model["efficiency"]`, see
            `st_wkl.evaluation.efficiency.measure_efficiency`.
        truncate_dim: Dimensions to which embeddings are cut, as those of a student that was trained with `matryoshka`
            can be; the results' name says so. None for all that the model is used with.
        batch_size: Texts per forward pass.
        ignore_identical_ids: Whether the document of a query's own id is left out of its results; None for what the
            task says, and for collections see `Collection`.
        show_progress: Show progress bars.
        trust_remote_code: Run code of the repositories of `model` and `first_stage`. Only for repositories that you
            have read.

    Returns:
        The results, as they are also written to `output`.

    Raises:
        ValueError: If a task is unknown, a score is not finite, a cross-encoder has nothing to rerank, or the queries
            do not average to what MTEB reports.
        FileNotFoundError: If a model, a task or a first stage is a path to nothing, or a name that no Hub id can have.
        FileExistsError: If `output` holds a file that is no results file.

    Example:
        >>> results = evaluate("student", ["NFCorpus", "data/my_corpus"], output="student")  # doctest: +SKIP
        >>> print(results.table())  # doctest: +SKIP
    """
    from st_wkl.evaluation.identity import TeacherWrapper, check_source
    from st_wkl.evaluation.tasks import resolve_tasks
    from st_wkl.evaluation.two_stage import staged

    check_options(batch_size=batch_size, top_k=top_k)
    bm25 = BM25.of(model)
    if bm25 is None:
        check_source(model, "model", "a model's folder or Hub id, or 'bm25'")
    if BM25.of(first_stage) is None:
        takes = "'bm25', a run, a run file, or a retriever's folder or Hub id"
        check_source(first_stage, "first_stage", takes, file=True)
    resolved = resolve_tasks(tasks, split, ignore_identical_ids, datasets)
    if output is not None:
        check_replaceable(output)
    other = bm25 or TeacherWrapper.of(model, name, revision)
    if efficiency and other:
        what = "BM25" if bm25 else "a teacher of this kind"
        raise ValueError(
            f"efficiency is measured on a model's forward pass, and {what} has none; leave out efficiency="
        )
    if exposure is None and isinstance(model, str | Path) and not other:
        exposure = _carried_exposure(str(model))
    speed = {"batch_size": batch_size, "show_progress": show_progress}
    stage = partial(staged, first_stage=first_stage, top_k=top_k, speed=speed, trust_remote_code=trust_remote_code)
    kept = {} if cache is None else {"cache": Path(cache).expanduser(), "top_k": top_k}
    scores: dict[int, list[TaskScores]] = {}
    # That nothing can be written there is found out before the work.
    with quiet(show_progress), nullcontext() if output is None else parents_of(results_file(output)):
        runner, about = _runner(other or model, name, revision, truncate_dim, trust_remote_code)
        for task in with_progress(resolved, None if first_stage is None else top_k, show_progress):
            used, scores[id(task)] = _evaluate_task(runner, task, exposure, stage, {**speed, **kept})
            if bm25 and len(used.name) >= len(about["name"]):  # the longer one says more of what was done
                about |= {"name": used.name, "revision": used.mteb_model_meta.revision}
    about["name"] = name or about["name"]
    if efficiency:
        about["efficiency"] = _measured(runner.model, resolved[0], batch_size)
    return saved(Results(model=about, tasks=[entry for task in resolved for entry in scores[id(task)]]), output)


def estimate(
    model: AnyModel | BM25 | Teacher | str | Path,
    tasks: Task | Iterable[Task],
    *,
    cache: str | Path | None = None,
    first_stage: FirstStage | None = None,
    top_k: int = 100,
    name: str | None = None,
    revision: str | None = None,
    truncate_dim: int | None = None,
    trust_remote_code: bool = False,
    split: str | None = None,
    ignore_identical_ids: bool | None = None,
    datasets: str | Path | None = None,
    batch_size: int = 32,
    **options: Any,
) -> Estimate:
    """Evaluate the smallest task that the cache lacks, and say how long the others will take.

    Args:
        model: As for `evaluate`, as is all else.
        tasks: What is to be evaluated.
        cache: Where the smallest task is kept, too.
        first_stage: What finds candidates. Which tasks are done after it is not known before it has searched.
        top_k: Its candidates of a query.
        name: Name of the model.
        revision: Its revision.
        truncate_dim: Dimensions to which embeddings are cut.
        trust_remote_code: Run code of the repositories.
        split: Split of the judgements.
        ignore_identical_ids: Whether the document of a query's own id is left out.
        datasets: Folder with the data of MTEB's tasks.
        batch_size: Texts per forward pass.
        options: Others of `evaluate`.

    Example:
        >>> print(estimate("student", "BEIR", cache="mteb-cache"))  # doctest: +SKIP
    """
    from st_wkl.evaluation.identity import TeacherWrapper
    from st_wkl.evaluation.tasks import is_kept, resolve_tasks

    resolved = resolve_tasks(tasks, split, ignore_identical_ids, datasets)
    depth = None if first_stage is None else top_k
    other = BM25.of(model) or TeacherWrapper.of(model, name, revision)
    done: list[AbsTask] = []
    if cache is not None and depth is None and not isinstance(other, BM25):
        runner = _runner(other or model, name, revision, truncate_dim, trust_remote_code)[0]
        done = [task for task in resolved if is_kept(runner, task, Path(cache).expanduser(), top_k)]
    left = [task for task in smallest_first(resolved, depth) if task not in done]
    names = tuple(task.metadata.name for task in done)
    if not left:
        return Estimate(names, {}, None, None)
    measured = evaluate(
        model,
        left[0],
        name=name,
        revision=revision,
        first_stage=first_stage,
        top_k=top_k,
        cache=cache,
        truncate_dim=truncate_dim,
        batch_size=batch_size,
        trust_remote_code=trust_remote_code,
        **options,
    )
    seconds = max(entry.seconds for entry in measured.tasks)  # each is of all splits and subsets together
    size = size_of(left[0], depth)
    sizes = {task.metadata.name: size_of(task, depth) for task in left[1:]}
    names = (*names, left[0].metadata.name)
    return Estimate(names, sizes, left[0].metadata.name, size / max(seconds, 1e-3) if size else None)


def _runner(
    model: Any, name: str | None, revision: str | None, truncate_dim: int | None, trust_remote_code: bool
) -> tuple[Any, dict[str, Any]]:
    """Return what MTEB runs, and what the results say about it."""
    from st_wkl.evaluation.identity import TeacherWrapper, identified
    from st_wkl.evaluation.two_stage import bm25_settings

    if truncate_dim is not None and isinstance(model, BM25 | TeacherWrapper):
        raise ValueError("truncate_dim cuts embeddings, and this model has none. Leave it out.")
    if isinstance(model, BM25):
        return model, {"name": model.name, "class": "BM25", "settings": bm25_settings(model)}
    if isinstance(model, TeacherWrapper):
        return model, {**model.about, "revision": model.mteb_model_meta.revision or ""}
    model, found_name = load_model(model, trust_remote_code=trust_remote_code)
    say_new(model)
    if truncate_dim is not None:
        model, found_name = _cut(model, truncate_dim), f"{found_name}, {truncate_dim} dimensions"
    known = identity(model) if model.state_dict() else None
    length = model.get_max_seq_length()
    about = {
        "name": name or found_name,
        "class": type(model).__name__,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "dimension": model.get_embedding_dimension() if hasattr(model, "get_embedding_dimension") else None,
        "max_seq_length": length if length is not None and math.isfinite(length) else None,
        "similarity": getattr(model, "similarity_fn_name", None),
        # By which a card knows whose results these are.
        **({"weights": known["weights"], "settings_hash": known["settings"]} if known else {"weights": None}),
    }  # before wrapping: MTEB replaces half-precision heads
    runner: Any = identified(model, name=name or found_name, revision=revision)
    return runner, {**about, "revision": runner.mteb_model_meta.revision or ""}


def _cut(model: Any, truncate_dim: int) -> Any:
    """Return a model whose embeddings are cut; the one that is given stays as it is, and lends its weights."""
    if not isinstance(model, SentenceTransformer):
        raise ValueError(f"truncate_dim cuts the one embedding of a text, and a {type(model).__name__} has none.")
    full = model.get_embedding_dimension()
    if isinstance(truncate_dim, bool) or not isinstance(truncate_dim, int) or not 0 < truncate_dim <= (full or 0):
        raise ValueError(f"truncate_dim must be from 1 to the model's {full}, got {truncate_dim!r}.")
    cut = copy.copy(model)
    cut.truncate_dim = truncate_dim
    return cut


def _evaluate_task(
    model: Any, task: AbsTask, exposure: Exposure | None, stage: partial[Any], options: Mapping[str, Any]
) -> tuple[Any, list[TaskScores]]:
    """Run MTEB on one task and return the model that it ran, and an entry per split and subset."""
    from mteb.abstasks.retrieval import AbsTaskRetrieval

    from st_wkl.evaluation.tasks import data_of, loaded, run_mteb

    with loaded(task):
        asked = task
        if isinstance(task, AbsTaskRetrieval):
            for subset, split, data in data_of(task):  # as those of a collection: trec_eval can hold no others
                where = f"{task.metadata.name}, {subset}, {split}"
                judged = data["relevant_docs"].items()
                data["relevant_docs"] = {query: whole_gains(g, f"{where}, query {query!r}") for query, g in judged}
            model, asked = stage(model, task)
        elif isinstance(model, BM25) or stage.keywords["first_stage"] is not None:
            raise ValueError(f"{task.metadata.name} is no retrieval task, so there is nothing to search or rerank")
        result, runs = run_mteb(model, asked, **options)
        return model, [
            _entry(asked, split, scores, runs, exposure, result.evaluation_time or 0.0)
            for split, subsets in result.scores.items()
            if split in asked.eval_splits  # a cached result may hold others, too
            for scores in subsets
        ]


def _entry(
    task: Any, split: str, scores: Mapping[str, Any], runs: Mapping[str, Any], exposure: Exposure | None, seconds: float
) -> TaskScores:
    """Return what MTEB says about one split and subset, with the score of every query."""
    from st_wkl.evaluation.tasks import rows_of, texts_of

    subset, main_metric = scores["hf_subset"], task.metadata.main_score
    about: dict[str, Any] = {
        "task": task.metadata.name,
        "split": split,
        "subset": subset,
        "main_metric": main_metric,
        # As MTEB rounds them in its files, so that a run that goes on has the numbers of one that was left alone.
        "metrics": {
            metric: round(float(scores[metric]), 6)
            for metric in scores
            if metric == main_metric or metric.startswith(_KEPT)
        },
        "dataset_revision": task.metadata.dataset["revision"],
        "seconds": seconds,
    }
    if not runs:
        return TaskScores(**about, per_query={})
    data = task.dataset[subset][split]
    qrels, queries, documents = data["relevant_docs"], {}, {}
    if exposure is not None:
        relevant = {document for gains in qrels.values() for document, gain in gains.items() if gain > 0}
        documents = texts_of(rows_of(data["corpus"], relevant))
        queries = dict(zip(data["queries"]["id"], data["queries"]["text"], strict=True))
    run = without_own(runs[subset][split], task.ignore_identical_ids)
    if task.skip_first_result:  # as MTEB counts
        run = {q: dict(sorted(found.items(), key=lambda hit: hit[1], reverse=True)[1:]) for q, found in run.items()}
    return run_scores(run, qrels, queries, documents, exposure, **about)


def _measured(model: AnyModel, task: AbsTask, batch_size: int) -> dict[str, Any]:
    """Return what the model costs on the texts of a retrieval task."""
    from mteb.abstasks.retrieval import AbsTaskRetrieval

    from st_wkl.evaluation.tasks import data_of, loaded, texts_of

    if not isinstance(task, AbsTaskRetrieval):
        raise ValueError(f"efficiency is measured on a retrieval task, and {task.metadata.name} is none; put one first")
    with loaded(task):
        data = next(data_of(task))[2]
        documents = list(texts_of(data["corpus"]).values())
        return measure_efficiency(model, list(data["queries"]["text"]), documents, batch_size=batch_size)


def _carried_exposure(model: str) -> Exposure | None:
    """Return what the folder or Hub repository of a student says about its training texts."""
    from sentence_transformers.util import load_file_path

    path = load_file_path(named(model)[0], EXPOSURE_FILE)
    return None if path is None else Exposure.load(Path(path).parent)


def _is_for_users(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_UPSTREAM_LOGS)


@contextmanager
def quiet(show_progress: bool) -> Iterator[None]:
    """Hide upstream's messages about itself and, without progress, the bars of `datasets` that MTEB leaves on."""
    import datasets

    meta_logger = logging.getLogger("mteb.models.model_meta")
    meta_logger.addFilter(_is_for_users)
    hide_bars = not show_progress and not datasets.are_progress_bars_disabled()
    with warnings.catch_warnings():
        for category, message in _UPSTREAM_WARNINGS:
            warnings.filterwarnings("ignore", message=message, category=category)
        if hide_bars:
            datasets.disable_progress_bars()
        try:
            yield
        finally:
            meta_logger.removeFilter(_is_for_users)
            if hide_bars:
                datasets.enable_progress_bars()
