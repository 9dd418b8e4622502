"""A whole run: candidates, dataset, training, evaluation and card, each stage done once and skipped from then on."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from st_wkl._files import write_text
from st_wkl.config import RunConfig, check_training_arguments
from st_wkl.packaged import named

if TYPE_CHECKING:
    from st_wkl.data.collection import Collection
    from st_wkl.data.dataset import DistillationDataset
    from st_wkl.evaluation import Comparison, Results

logger = logging.getLogger(__name__)

RUN_FILE, CONFIG_FILE = "run.json", "config.yaml"
_MARKERS = ".stages"
# What a student's folder holds beside what decides its output.
_ABOUT = {"README.md", "distillation.json", "training.png", "training_texts.json", "results.json"}
STAGES = ("candidates", "dataset", "train", "before", "after", "card")


@dataclass
class RunResult:
    """What a run made.

    Args:
        student: Folder of the student.
        before: Results of the untrained student; None without evaluation.
        after: Results of the trained student; None without evaluation.
        comparisons: The paired difference on each task.
        done: Stages that were worked on now.
        skipped: Stages that were complete already.
    """

    student: Path
    before: Results | None = None
    after: Results | None = None
    comparisons: dict[str, Comparison] = field(default_factory=dict)
    done: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def run(config: RunConfig, *, show_progress: bool = True, command: str | None = None) -> RunResult:
    """Do all stages of a run that are not done yet.

    A stage's marker, written last and in one step, holds a fingerprint of its inputs. While that is the same the stage
    is skipped. A stage whose inputs have changed is done again, and so is every later one that its outcome reaches;
    what it had made is moved to `replaced/`, not deleted. A run that was killed goes on where it was, training at its
    last checkpoint, and ends with the same weights.

    Args:
        config: The run.
        show_progress: Show bars.
        command: What the card says to reproduce the student; by default none.

    Returns:
        The student's folder and the results.

    Raises:
        FileExistsError: If the output folder holds something else, or the run of another collection, teacher or
            student, or is in use.
        ValueError: If the configuration cannot work; known before any work is done.

    Example:
        >>> run(RunConfig.load("config.yaml")).student  # doctest: +SKIP
    """
    output = Path(config.output)
    job = _Run(config, output, show_progress)
    with _claimed(output, job):
        job.check()
        config.save(output / CONFIG_FILE)
        result = RunResult(output / "student")
        for name in STAGES:
            if name in ("before", "after") and config.evaluation is None:
                continue
            job.stage(name, result)
        if config.evaluation is not None:
            result.before, result.after = job.results("before"), job.results("after")
            result.comparisons = job.comparisons()
        return result


class _Run:
    """The stages of one run: what each depends on, and how it is done."""

    def __init__(self, config: RunConfig, output: Path, show_progress: bool) -> None:
        self.config, self.output, self.show_progress = config, output, show_progress

    @property
    def who(self) -> dict[str, str]:
        """What makes a folder this run's, whatever else is tried."""
        config = self.config
        return {
            "collection": config.collection.source,
            "teacher": config.teacher.model,
            "student": config.student.model,
        }

    @cached_property
    def collection(self) -> Collection:
        from st_wkl.data.collection import Collection

        return Collection.load(self.config.collection.source)

    @cached_property
    def query_ids(self) -> list[str]:
        return list(self.collection.judgements(self.config.collection.split))[: self.config.collection.limit]

    @cached_property
    def student(self) -> tuple[str, str]:
        """Folder or Hub id of the untrained student, and what it is called."""
        found, name = named(self.config.student.model)
        return found, self.config.student.name or name

    @cached_property
    def teacher(self) -> Any:
        from st_wkl.data.teachers import CrossEncoderTeacher

        return CrossEncoderTeacher(named(self.config.teacher.model)[0], max_length=self.config.teacher.max_length)

    def check(self) -> None:
        """Find what cannot work before anything is done.

        Raises:
            ValueError: If there is such a thing.
        """
        from st_wkl.evaluation.identity import load_model
        from st_wkl.evaluation.tasks import resolve_tasks
        from st_wkl.training import LOSSES
        from st_wkl.training.students import kind_of

        config = self.config
        if config.loss.name not in LOSSES:
            from st_wkl.config import nearest

            raise ValueError(f"loss.name: there is no loss {config.loss.name!r}{nearest(config.loss.name, LOSSES)}.")
        self.collection.judgements(config.collection.split)
        student = load_model(self.student[0])[0]
        check_training_arguments(config.training, kind_of(student).arguments)
        self._make_loss(student)
        self._arguments(student)
        self._dev(student)
        if config.dev is not None and config.evaluation is not None and config.dev.split == config.evaluation.split:
            logger.warning(
                "dev.split and evaluation.split are both %r: a checkpoint that is chosen on the queries that are "
                "reported looks better than it is.",
                config.dev.split,
            )
        if config.evaluation is not None:
            if type(student).__name__ == "CrossEncoder":
                raise ValueError(
                    "evaluation: a cross-encoder can only rerank, and a run has no lists for it. Set evaluation: null "
                    "and use evaluate_run, or dev: {split: ...}, which reranks the candidates."
                )
            resolve_tasks(self._tasks(), config.evaluation.split)

    def stage(self, name: str, result: RunResult) -> None:
        """Do a stage, unless it is done."""
        inputs, made = getattr(self, f"_{name}_inputs")(), self._made(name)
        marker = self.output / _MARKERS / f"{name}.json"
        inputs = json.loads(json.dumps(inputs, sort_keys=True))
        found = _read_marker(marker)
        if found.get("inputs") == inputs and found.get("complete") and made.exists():
            logger.info("%s: complete, nothing to do", name)
            result.skipped.append(name)
            return
        if found and found.get("inputs") != inputs:
            changed = sorted(key for key in inputs if found.get("inputs", {}).get(key) != inputs[key])
            logger.info("%s: done again, since these have changed: %s", name, ", ".join(changed))
            self._set_aside(name, made)
        else:
            logger.info("%s: %s", name, "goes on" if found else "begins")
        # Before the work, too: what a killed stage left behind is only of use while its inputs are the same.
        write_text(marker, json.dumps({"inputs": inputs, "complete": False}, indent=2) + "\n")
        getattr(self, f"_do_{name}")()
        write_text(marker, json.dumps({"inputs": inputs, "complete": True}, indent=2) + "\n")
        result.done.append(name)

    def results(self, name: str) -> Results:
        """Return the results of the stage `before` or `after`."""
        from st_wkl.evaluation import Results

        return Results.load(self._made(name))

    def comparisons(self) -> dict[str, Comparison]:
        """Compare after with before on each task that has queries."""
        from st_wkl.evaluation import compare

        before, after = self.results("before"), self.results("after")
        names = [entry.task for entry in after.tasks if entry.per_query]
        return {name: compare(before, after, task=name) for name in names if names.count(name) == 1}

    def _made(self, name: str) -> Path:
        return (
            self.output
            / {
                "candidates": "candidates.trec.gz",
                "dataset": "dataset",
                "train": "student",
                "before": "results/before.json",
                "after": "results/after.json",
                "card": "student/README.md",
            }[name]
        )

    def _set_aside(self, name: str, made: Path) -> None:
        if name == "card" or not made.exists():
            return
        number = 1
        while (kept := self.output / "replaced" / f"{number}-{made.name}").exists():
            number += 1
        kept.parent.mkdir(parents=True, exist_ok=True)
        os.replace(made, kept)
        logger.info("%s: what it had made is now %s", name, kept)

    # candidates

    def _candidates_inputs(self) -> dict[str, Any]:
        sources = [_fingerprint(named(source)[0]) for source in self.config.candidates.sources]
        return {
            "collection": self.collection.fingerprint,
            "queries": [*self.query_ids, *self._dev_queries()],
            "sources": sources,
            "top_k": self.config.candidates.top_k,
        }

    def _do_candidates(self) -> None:
        from st_wkl.data.candidates import bm25_candidates
        from st_wkl.data.dense import retriever_candidates
        from st_wkl.data.runs import read_run, reciprocal_rank_fusion, write_run

        queries = list(dict.fromkeys([*self.query_ids, *self._dev_queries()]))
        top_k = self.config.candidates.top_k
        lists = []
        for source in self.config.candidates.sources:
            found = named(source)[0]
            if source == "bm25":
                lists.append(bm25_candidates(self.collection, queries, top_k=top_k, show_progress=self.show_progress))
            elif Path(found).is_file():
                lists.append(read_run(found, self.collection, top_k=top_k))
            else:
                lists.append(
                    retriever_candidates(
                        self.collection,
                        found,
                        queries,
                        top_k=top_k,
                        cache=self.output / "embeddings",
                        show_progress=self.show_progress,
                    )
                )
        fused = lists[0] if len(lists) == 1 else reciprocal_rank_fusion(*lists, top_k=top_k)
        write_run(fused, self._made("candidates"))

    # dataset

    def _dataset_inputs(self) -> dict[str, Any]:
        config = self.config
        return {
            "candidates": _digest(self._made("candidates")),
            "collection": self.collection.fingerprint,
            "split": config.collection.split,
            "queries": self.query_ids,
            "num_negatives": config.candidates.num_negatives,
            "teacher": self.teacher.identity,
            "selection": dataclasses.asdict(config.selection),
        }

    def _do_dataset(self) -> None:
        from st_wkl.data.builder import DistillationDatasetBuilder
        from st_wkl.data.runs import read_run
        from st_wkl.data.selection import Selection

        config = self.config
        builder = DistillationDatasetBuilder(
            self.collection,
            self.teacher,
            split=config.collection.split,
            query_ids=self.query_ids,
            candidates=read_run(self._made("candidates")),
            num_negatives=config.candidates.num_negatives,
            store=config.teacher.store,
            selection=Selection(**dataclasses.asdict(config.selection)),
            engine=config.teacher.engine,
        )
        builder.build(show_progress=self.show_progress).save_to_disk(self._made("dataset"))

    # training

    def _train_inputs(self) -> dict[str, Any]:
        config = self.config
        return {
            "dataset": _digest(self._made("dataset"), without={"README.md"}),
            "student": _fingerprint(self.student[0]),
            "loss": dataclasses.asdict(config.loss),
            "training": config.training,
            "lora": config.lora,
            "dev": None if config.dev is None else dataclasses.asdict(config.dev),
            "judgements": self.collection.fingerprint if config.dev is not None else None,
        }

    def _do_train(self) -> None:
        from transformers import EarlyStoppingCallback

        from st_wkl.evaluation.identity import load_model
        from st_wkl.training import distill

        student: Any = load_model(self.student[0])[0]
        dataset = self._dataset()
        options: dict[str, Any] = {}
        if self.config.lora is not False:
            options["lora"] = self._lora()
        if self.config.dev is not None:
            options["eval"] = self._dev(student)
            if self.config.dev.patience is not None:
                options["callbacks"] = [EarlyStoppingCallback(self.config.dev.patience)]
        distill(
            student,
            dataset,
            self._make_loss(student, dataset),
            self._arguments(student),
            output_dir=self._made("train"),
            resume=True,
            base_name=self.student[1],
            **options,
        )

    def _dataset(self) -> DistillationDataset:
        from st_wkl.data.dataset import DistillationDataset

        return DistillationDataset.load_from_disk(self._made("dataset"))

    def _make_loss(self, student: Any, dataset: DistillationDataset | None = None) -> Any:
        from st_wkl.training import make_loss

        loss = self.config.loss
        report = None if dataset is None else dataset.provenance.get("report")
        options = {"in_batch": loss.in_batch, "mini_batch_size": loss.mini_batch_size, **loss.parameters}
        return make_loss(student, loss.name, report=report, **options)

    def _arguments(self, student: Any) -> Any:
        from st_wkl.training import default_arguments

        args = default_arguments(student, self._made("train"), lora=self.config.lora is not False)
        # Made anew, so that the class checks and completes what the user says.
        values = {entry.name: getattr(args, entry.name) for entry in dataclasses.fields(args) if entry.init}
        values |= {"disable_tqdm": not self.show_progress, **self.config.training}
        try:
            return type(args)(**values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"training: {error}") from error

    def _lora(self) -> Any:
        if not isinstance(self.config.lora, Mapping):
            return self.config.lora
        from peft import LoraConfig

        from st_wkl.config import nearest

        known = [entry.name for entry in dataclasses.fields(LoraConfig)]
        for name in self.config.lora:
            if name not in known:
                raise ValueError(f"lora.{name}: peft's LoraConfig has no such parameter{nearest(name, known)}.")
        return LoraConfig(**self.config.lora)

    def _dev_queries(self) -> list[str]:
        dev = self.config.dev
        return [] if dev is None else list(self.collection.positives(dev.split))

    def _dev(self, student: Any) -> Any:
        if self.config.dev is None:
            return None
        from sentence_transformers import CrossEncoder

        from st_wkl.data.runs import read_run
        from st_wkl.training.dev import GradedEvaluator

        dev, candidates = self.config.dev, None
        if isinstance(student, CrossEncoder):
            path = self._made("candidates")
            # Before the first stage there are none yet: then only the split is checked.
            candidates = read_run(path) if path.is_file() else {}
        return GradedEvaluator.of(
            self.collection,
            dev.split,
            candidates=candidates,
            max_queries=dev.max_queries,
            max_documents=dev.max_documents,
        )

    # evaluation

    def _tasks(self) -> list[Any]:
        assert self.config.evaluation is not None
        return list(self.config.evaluation.tasks) or [self.collection]

    def _tasks_inputs(self) -> dict[str, Any]:
        assert self.config.evaluation is not None
        tasks = [_fingerprint(task) for task in self.config.evaluation.tasks] or [self.collection.fingerprint]
        return {"tasks": tasks, "split": self.config.evaluation.split}

    def _before_inputs(self) -> dict[str, Any]:
        return {"student": _fingerprint(self.student[0]), "name": self.student[1], **self._tasks_inputs()}

    def _after_inputs(self) -> dict[str, Any]:
        return {"student": _digest(self._made("train"), without=_ABOUT), **self._tasks_inputs()}

    def _do_before(self) -> None:
        self._evaluate(self.student[0], self.student[1], "before")

    def _do_after(self) -> None:
        self._evaluate(str(self._made("train")), f"{self.student[1].split('/')[-1]}-{self.collection.name}", "after")

    def _evaluate(self, model: str, name: str, stage: str) -> None:
        from st_wkl.evaluation import evaluate

        assert self.config.evaluation is not None
        evaluate(
            model,
            self._tasks(),
            split=self.config.evaluation.split,
            name=name,
            output=self._made(stage),
            batch_size=self.config.evaluation.batch_size,
            show_progress=self.show_progress,
        )

    # card

    def _card_inputs(self) -> dict[str, Any]:
        stages = [] if self.config.evaluation is None else ["before", "after"]
        return {
            # The record says when it was trained, so a student that is trained again gets a new card.
            "record": _digest(self._made("train") / "distillation.json"),
            **{stage: _digest(self._made(stage)) for stage in stages},
        }

    def _do_card(self) -> None:
        from st_wkl.cards.model_card import write_model_card
        from st_wkl.training import TrainingRecord

        folder, results, comparisons = self._made("train"), {}, {}
        if self.config.evaluation is not None:
            results = {stage: self.results(stage) for stage in ("before", "after")}
            comparisons = self.comparisons()
        write_model_card(
            folder,
            record=TrainingRecord.load(folder),
            results=results,
            comparison=next(iter(comparisons.values())) if len(comparisons) == 1 else None,
            command=f"st-wkl run {CONFIG_FILE}",
        )
        # Beside the student, which travels alone: how it can be made again.
        shutil.copyfile(self.output / CONFIG_FILE, folder / CONFIG_FILE)


@contextmanager
def _claimed(output: Path, job: _Run) -> Iterator[None]:
    """Make sure that the folder is this run's, and this process the only one in it."""
    path = output / RUN_FILE
    found = _read_marker(path)
    if output.exists() and not found and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} holds something that is no run of st-wkl. Set another output.")
    if found and (other := {key: found.get(key) for key in job.who if found.get(key) != job.who[key]}):
        told = ", ".join(f"{key} {value!r}" for key, value in other.items())
        raise FileExistsError(
            f"{output} holds another run, with {told}. Set another output, or delete that one if it may go."
        )
    output.mkdir(parents=True, exist_ok=True)
    with (output / ".lock").open("w") as lock:
        try:
            # Given back by the system however the process ends.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise FileExistsError(f"Another process is at work in {output}. Wait for it, or stop it.") from None
        if not found:
            write_text(path, json.dumps({"st-wkl": 1, **job.who}, indent=2) + "\n")
        for left in output.glob(".dataset.*"):  # of a process that was killed while it wrote
            shutil.rmtree(left, ignore_errors=True)
        yield


def _read_marker(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _fingerprint(source: str) -> str:
    """Return the hash of a file or folder, or the name of what is elsewhere."""
    path = Path(source)
    return _digest(path) if path.exists() else source


def _digest(path: Path, *, without: set[str] | frozenset[str] = frozenset()) -> str:
    """Return a hash of a file, or of the names and contents of a folder."""
    digest = hashlib.blake2b(digest_size=16)
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    for file in files:
        name = file.relative_to(path).as_posix()
        if file.name in without or file.name == CONFIG_FILE:
            continue
        digest.update(f"{name}\n".encode())
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "blake2b").digest())
    return digest.hexdigest()
