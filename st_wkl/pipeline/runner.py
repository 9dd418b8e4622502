"""All stages of a run in their order, each done if it is not done yet, in a folder that is the run's alone."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import accelerator

from st_wkl._processes import launched
from st_wkl._versions import installed_versions
from st_wkl.evaluation import Comparison, Results, results_table
from st_wkl.files import content_hash, holds_nothing, owned, read_object, write_text
from st_wkl.packaged import named
from st_wkl.pipeline.options import RunConfig
from st_wkl.pipeline.stages import (
    ALL,
    CONFIG_FILE,
    STAGES,
    TRAIN,
    Parts,
    Stage,
    changed,
    digest,
    source_digest,
)
from st_wkl.pipeline.steps import adapter_folder, named_sources

__all__ = ["STAGES", "RunResult", "run"]

logger = logging.getLogger(__name__)

_RUN_FILE, _MARKERS = "run.json", ".stages"
# The other processes wait while the first one asks the teacher, which may take days.
_PATIENCE = timedelta(days=30)


@dataclass
class RunResult:
    """What a run made.

    Args:
        student: Folder of the student.
        before: Results of the untrained student; None without evaluation.
        after: Results of the trained student; None without evaluation.
        bm25: Results of BM25 on the same tasks; None without evaluation, and for rerankers.
        comparisons: The paired difference on each task.
        done: Stages that were worked on now.
        skipped: Stages that were complete already.
    """

    student: Path
    before: Results | None = None
    after: Results | None = None
    bm25: Results | None = None
    comparisons: dict[str, Comparison] = field(default_factory=dict)
    done: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def table(self) -> str:
        """Return the results before and after, and BM25's, as one table."""
        found = {"before": self.before, "after": self.after, "BM25": self.bm25}
        return results_table({label: results for label, results in found.items() if results is not None})

    def __repr__(self) -> str:
        told = [f"RunResult: {self.student}, done: {', '.join(self.done) or 'nothing'}"]
        return "\n".join([*told, *(f"{task}: {comparison}" for task, comparison in self.comparisons.items())])


def run(config: RunConfig, *, show_progress: bool = True) -> RunResult:
    """Do all stages of a run that are not done yet.

    A stage's marker, written last and in one step, holds a fingerprint of its inputs. While that is the same the stage
    is skipped. A stage whose inputs have changed is done again, and so is every later one that its outcome reaches;
    what it had made is moved to `replaced/`, not deleted. A run that was killed goes on where it was, training at its
    last checkpoint, and ends with the same weights.

    Under `torchrun` the first process does every stage, and all train together. They need to see the output folder.

    Args:
        config: The run.
        show_progress: Show bars.

    Returns:
        The student's folder and the results.

    Raises:
        FileExistsError: If the output folder holds something else, or the run of another collection, teacher or
            student, or is in use.
        ValueError: If the configuration cannot work; known before any work is done.

    Example:
        >>> run(RunConfig.load("config.yaml")).student  # doctest: +SKIP
    """
    together = _Together(config) if launched() > 1 else None
    if together is not None and not together.first:
        return _take_part(Parts(config, show_progress=False), together)
    parts = Parts(config, show_progress=show_progress)
    who = {
        "collection": config.collection.source,
        "teacher": config.teacher and (config.teacher.model or config.teacher.url),
        "student": config.student.model,
    }
    left_out = {"before", "after"} if config.evaluation is None else set()
    left_out |= {"candidates", "dataset"} if config.teacher is None else set()
    asked = [stage for stage in ALL if stage.name not in left_out]
    with _claimed(parts.output, who):
        result = RunResult(parts.student)
        complete = parts.output / ".complete.json"
        if together is None and (there := read_object(complete)) and there == _state(parts, asked):
            logger.info("%s is complete: nothing to do", parts.output)
            result.skipped, asked = [stage.name for stage in asked], []
        else:
            parts.check()
            config.save(parts.output / CONFIG_FILE)
        for stage in asked:
            inputs = _pending(stage, parts)
            if together is not None and stage is TRAIN:
                together.agree(train=inputs is not None)
            if inputs is None:
                result.skipped.append(stage.name)
                continue
            stage.work(parts)
            _mark(stage, parts, inputs, complete=True)
            result.done.append(stage.name)
        if asked and (state := _state(parts, asked)):
            write_text(complete, json.dumps(state, indent=2) + "\n")
        if config.evaluation is not None:
            found = parts.results()
            result.before, result.after, result.bm25 = found["before"], found["after"], found.get("BM25")
            result.comparisons = parts.comparisons()
        return result


class _Together:
    """What the processes of `torchrun` say to each other.

    Args:
        config: The run.
    """

    def __init__(self, config: RunConfig) -> None:
        # Made before the trainer makes its own, which takes over the group that is there.
        cpu = bool(config.training.get("use_cpu", not accelerator.is_available()))
        self._state = PartialState(cpu=cpu, timeout=_PATIENCE)
        self.first = self._state.is_main_process

    def agree(self, train: bool | None = None) -> bool:
        """Wait until every process is here, and return what the first one says: whether there is training to do."""
        self._state.wait_for_everyone()
        said: list[Any] = broadcast_object_list([train])
        return bool(said[0])


def _take_part(parts: Parts, together: _Together) -> RunResult:
    """Do what the first process cannot do alone: train, if it is not done yet."""
    if trains := together.agree():
        TRAIN.work(parts)
    return RunResult(parts.student, done=[TRAIN.name] if trains else [])


def _pending(stage: Stage, parts: Parts) -> dict[str, Any] | None:
    """Make room for a stage and return its inputs, None if it is complete."""
    made = stage.made(parts)
    inputs: dict[str, Any] = json.loads(json.dumps(stage.inputs(parts), sort_keys=True))
    found = read_object(_marker(stage, parts)) or {}
    others = changed(found.get("inputs", {}), inputs)
    if found and not others and found.get("complete") and made.exists():
        logger.info("%s: complete, nothing to do", stage.name)
        return None
    if found and others:
        logger.info("%s: done again, since these have changed: %s", stage.name, ", ".join(others))
        # A card is part of its student, and written anew.
        for path in () if stage.name == "card" else (made, adapter_folder(made)):
            if kept := _set_aside(path, parts.output):
                logger.warning("%s: what it had made is now %s", stage.name, kept)
    else:
        logger.info("%s: %s", stage.name, "goes on" if found else "begins")
    # Before the work, too: what a killed stage left behind is only of use while its inputs are the same.
    _mark(stage, parts, inputs, complete=False)
    return inputs


def _state(parts: Parts, asked: list[Stage]) -> dict[str, Any] | None:
    """Return hashes of all that a run reads and has made, by which a complete one is known without loading anything.

    None where the Hub, or a server, would have to be asked whether its collection or teacher has changed.
    """
    config = parts.config
    models = config.teacher.models if config.teacher is not None else [str(config.loss.embedding_teacher)]
    sources = [config.collection.source, *models, config.student.model, *config.candidates.sources]
    sources += [source for _, source in named_sources(config.datasets)]
    sources += [] if config.dev is None or config.dev.source is None else [config.dev.source]
    if config.evaluation is not None:
        sources += [*config.evaluation.tasks, *filter(None, [config.evaluation.first_stage])]
    found = [named(source)[0] for source in sources]
    here = all(Path(source).exists() for source in found[: 1 + len(models)])
    if not here or (config.teacher is not None and config.teacher.url is not None):
        return None
    made = {stage.name: stage.made(parts) for stage in asked}
    return {
        "config": content_hash({**config.to_dict(), "output": None}),
        "versions": content_hash(installed_versions(("st-wkl",))),
        "sources": content_hash([source_digest(source) for source in found]),
        "made": content_hash({name: digest(path) if path.exists() else None for name, path in made.items()}),
    }


def _marker(stage: Stage, parts: Parts) -> Path:
    return parts.output / _MARKERS / f"{stage.name}.json"


def _mark(stage: Stage, parts: Parts, inputs: dict[str, Any], *, complete: bool) -> None:
    write_text(_marker(stage, parts), json.dumps({"inputs": inputs, "complete": complete}, indent=2) + "\n")


@contextmanager
def _claimed(output: Path, who: Mapping[str, Any]) -> Iterator[None]:
    """Make sure that a folder is this run's, and this process the only one in it.

    Args:
        output: The folder; made if there is none.
        who: What makes it this run's, whatever else is tried in it.

    Raises:
        FileExistsError: If it holds something else or another run, or is in use.
    """
    path = output / _RUN_FILE
    with owned(output):
        found = read_object(path) or {}
        if not found and not holds_nothing(output):
            raise FileExistsError(f"{output} holds something that is no run of st-wkl. Set another output.")
        if found and (other := {key: found.get(key) for key in who if found.get(key) != who[key]}):
            told = ", ".join(f"{key} {value!r}" for key, value in other.items())
            raise FileExistsError(
                f"{output} holds another run, with {told}. Set another output, or delete that one if it may go."
            )
        (output / ".lock").unlink(missing_ok=True)  # where earlier versions had it
        if not found:
            write_text(path, json.dumps({"st-wkl": 1, **who}, indent=2) + "\n")
        for left in output.glob(".dataset.*"):  # of a process of an earlier version that was killed while it wrote
            shutil.rmtree(left, ignore_errors=True)
        try:
            yield
        except BaseException:
            if not found and {file.name for file in output.iterdir()} <= {_RUN_FILE}:  # it has done nothing
                shutil.rmtree(output)
            raise


def _set_aside(made: Path, output: Path) -> Path | None:
    """Move what a stage had made to `replaced/`, and return where it is now."""
    if not made.exists():
        return None
    number = 1
    while (kept := output / "replaced" / f"{number}-{made.name}").exists():
        number += 1
    kept.parent.mkdir(parents=True, exist_ok=True)
    os.replace(made, kept)
    return kept
