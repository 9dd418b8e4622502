"""All stages in their order, each done if it is not done yet."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from st_wkl._files import write_text
from st_wkl.config import RunConfig
from st_wkl.pipeline import folder, stages
from st_wkl.pipeline.parts import Parts

if TYPE_CHECKING:
    from st_wkl.evaluation import Comparison, Results

logger = logging.getLogger(__name__)

_MARKERS = ".stages"


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


def run(config: RunConfig, *, show_progress: bool = True) -> RunResult:
    """Do all stages of a run that are not done yet.

    A stage's marker, written last and in one step, holds a fingerprint of its inputs. While that is the same the stage
    is skipped. A stage whose inputs have changed is done again, and so is every later one that its outcome reaches;
    what it had made is moved to `replaced/`, not deleted. A run that was killed goes on where it was, training at its
    last checkpoint, and ends with the same weights.

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
    parts = Parts(config, show_progress=show_progress)
    who = {
        "collection": config.collection.source,
        "teacher": config.teacher.model,
        "student": config.student.model,
    }
    with folder.claimed(parts.output, who):
        parts.check()
        config.save(parts.output / folder.CONFIG_FILE)
        result = RunResult(parts.student)
        for stage in stages.ALL:
            if stage.name in ("before", "after") and config.evaluation is None:
                continue
            (result.done if _do(stage, parts) else result.skipped).append(stage.name)
        if config.evaluation is not None:
            result.before, result.after = parts.results("before"), parts.results("after")
            result.comparisons = parts.comparisons()
        return result


def _do(stage: stages.Stage, parts: Parts) -> bool:
    """Do a stage, and tell whether there was anything to do."""
    made, marker = stage.made(parts), parts.output / _MARKERS / f"{stage.name}.json"
    inputs = json.loads(json.dumps(stage.inputs(parts), sort_keys=True))
    found = folder.read_json(marker)
    if found.get("inputs") == inputs and found.get("complete") and made.exists():
        logger.info("%s: complete, nothing to do", stage.name)
        return False
    if found and found.get("inputs") != inputs:
        changed = sorted(key for key in inputs if found.get("inputs", {}).get(key) != inputs[key])
        logger.info("%s: done again, since these have changed: %s", stage.name, ", ".join(changed))
        # A card is part of its student, and written anew.
        if stage.name != "card" and (kept := folder.set_aside(made, parts.output)):
            logger.info("%s: what it had made is now %s", stage.name, kept)
    else:
        logger.info("%s: %s", stage.name, "goes on" if found else "begins")
    # Before the work, too: what a killed stage left behind is only of use while its inputs are the same.
    write_text(marker, json.dumps({"inputs": inputs, "complete": False}, indent=2) + "\n")
    stage.work(parts)
    write_text(marker, json.dumps({"inputs": inputs, "complete": True}, indent=2) + "\n")
    return True
