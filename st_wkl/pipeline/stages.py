"""The stages of a run: what each reads, by which it knows that it has to be done again, and how it is done."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from st_wkl.config.tree import DevConfig, LossConfig, SelectionConfig
from st_wkl.packaged import named
from st_wkl.pipeline.folder import CONFIG_FILE, digest, source_digest
from st_wkl.pipeline.parts import Parts

# What a student's folder holds beside what decides its output.
_ABOUT = {"README.md", "distillation.json", "training.png", "training_texts.json", "results.json"}

# Inputs that are a part of the configuration, and may gain options.
_PARTS = {"loss": LossConfig, "selection": SelectionConfig, "dev": DevConfig}


@dataclass(frozen=True)
class Stage:
    """A stage of a run.

    Args:
        name: What messages and its marker call it.
        inputs: Everything that decides what it makes, in JSON values.
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
    from st_wkl.training.dev import SELECTION_ARGUMENTS
    from st_wkl.training.identity import matters

    found = {
        name: {**_defaults(_PARTS[name]), **value} if name in _PARTS and isinstance(value, dict) else value
        for name, value in inputs.items()
    }
    if isinstance(training := found.get("training"), dict):
        chosen = found.get("dev") is not None
        found["training"] = {
            name: value for name, value in training.items() if matters(name) or (chosen and name in SELECTION_ARGUMENTS)
        }
    return found


def _defaults(part: type) -> dict[str, Any]:
    from st_wkl.losses.options import field_default

    return {entry.name: field_default(entry) for entry in dataclasses.fields(part)}


def _candidates_inputs(parts: Parts) -> dict[str, Any]:
    return {
        "collection": parts.collection.fingerprint,
        "queries": [*parts.query_ids, *parts.dev_queries()],
        "sources": [source_digest(named(source)[0]) for source in parts.config.candidates.sources],
        "top_k": parts.config.candidates.top_k,
    }


def _mine(parts: Parts) -> None:
    from st_wkl.data.candidates import find_candidates

    asked = parts.config.candidates
    find_candidates(
        parts.collection,
        dict.fromkeys([*parts.query_ids, *parts.dev_queries()]),
        asked.sources,
        top_k=asked.top_k,
        cache=parts.output / "embeddings",
        show_progress=parts.show_progress,
        trust_remote_code=asked.trust_remote_code,
    ).save(parts.candidates)


def _dataset_inputs(parts: Parts) -> dict[str, Any]:
    config = parts.config
    return {
        "candidates": digest(parts.candidates),
        "collection": parts.collection.fingerprint,
        "split": config.collection.split,
        "queries": parts.query_ids,
        "num_negatives": config.candidates.num_negatives,
        "teacher": parts.teacher.identity,
        "selection": dataclasses.asdict(config.selection),
    }


def _build(parts: Parts) -> None:
    from st_wkl.data.builder import DistillationDatasetBuilder
    from st_wkl.data.runs import read_run
    from st_wkl.data.selection import Selection

    config = parts.config
    builder = DistillationDatasetBuilder(
        parts.collection,
        parts.teacher,
        split=config.collection.split,
        query_ids=parts.query_ids,
        candidates=read_run(parts.candidates),
        num_negatives=config.candidates.num_negatives,
        store=config.teacher.store,
        selection=Selection(**dataclasses.asdict(config.selection)),
        engine=config.teacher.engine,
    )
    builder.build(show_progress=parts.show_progress).save_to_disk(parts.dataset)


def _train_inputs(parts: Parts) -> dict[str, Any]:
    config = parts.config
    return {
        "dataset": digest(parts.dataset, without={"README.md"}),
        "student": source_digest(parts.start[0]),
        "prompts": config.student.prompts or None,
        "loss": dataclasses.asdict(config.loss),
        "training": config.training,
        "lora": config.lora,
        "dev": None if config.dev is None else dataclasses.asdict(config.dev),
        "judgements": parts.collection.fingerprint if config.dev is not None else None,
        **({"save_dtype": config.student.save_dtype} if config.student.save_dtype else {}),
    }


def _train(parts: Parts) -> None:
    from transformers import EarlyStoppingCallback

    from st_wkl.training import distill

    student, dataset, dev = parts.load_start(), parts.load_dataset(), parts.config.dev
    distill(
        student,
        dataset,
        parts.loss(student, dataset),
        parts.arguments(student),
        output_dir=parts.student,
        lora=parts.lora(),
        evaluator=parts.dev(student),
        callbacks=[] if dev is None or dev.patience is None else [EarlyStoppingCallback(dev.patience)],
        resume=True,
        base_name=parts.start[1],
        trust_remote_code=parts.config.student.trust_remote_code,
        save_dtype=parts.config.student.save_dtype,
    )


def _tasks_inputs(parts: Parts) -> dict[str, Any]:
    assert parts.config.evaluation is not None
    tasks = [source_digest(task) for task in parts.config.evaluation.tasks] or [parts.collection.fingerprint]
    told = parts.config.collection.ignore_identical_ids
    said = {} if told is None else {"ignore_identical_ids": told}  # absent before it was an option
    return {"tasks": tasks, "split": parts.config.evaluation.split, **said}


def _before_inputs(parts: Parts) -> dict[str, Any]:
    return {
        "student": source_digest(parts.start[0]),
        "prompts": parts.config.student.prompts or None,
        "name": parts.start[1],
        **_tasks_inputs(parts),
    }


def _evaluate_before(parts: Parts) -> None:
    model, name = parts.start
    _evaluate(parts, "before", parts.load_start() if parts.config.student.prompts else model, name)


def _after_inputs(parts: Parts) -> dict[str, Any]:
    return {"student": digest(parts.student, without=_ABOUT), **_tasks_inputs(parts)}


def _evaluate_after(parts: Parts) -> None:
    _evaluate(parts, "after", str(parts.student), f"{parts.start[1].split('/')[-1]}-{parts.collection.name}")


def _evaluate(parts: Parts, when: str, model: Any, name: str) -> None:
    from st_wkl.evaluation import evaluate

    assert parts.config.evaluation is not None
    evaluate(
        model,
        parts.tasks(),
        split=parts.config.evaluation.split,
        name=name,
        output=parts.results_file(when),
        batch_size=parts.config.evaluation.batch_size,
        show_progress=parts.show_progress,
        trust_remote_code=parts.config.student.trust_remote_code,
    )


def _card_inputs(parts: Parts) -> dict[str, Any]:
    results = [] if parts.config.evaluation is None else ["before", "after"]
    return {
        # The record says when it was trained, so a student that is trained again gets a new card.
        "record": digest(parts.student / "distillation.json"),
        **{when: digest(parts.results_file(when)) for when in results},
    }


def _write_card(parts: Parts) -> None:
    from st_wkl.publish.model_card import write_model_card
    from st_wkl.training import TrainingRecord

    results, comparisons = {}, {}
    if parts.config.evaluation is not None:
        results = {when: parts.results(when) for when in ("before", "after")}
        comparisons = parts.comparisons()
    write_model_card(
        parts.student,
        record=TrainingRecord.load(parts.student),
        results=results,
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
